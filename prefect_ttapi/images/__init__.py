"""Bytes of pictures: types and sizes, temporary files, renditions, marks and signatures; no Prefect."""
