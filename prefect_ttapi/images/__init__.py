"""Bytes of pictures: what they are, where they wait, and what is made of them; no Prefect, no network."""
