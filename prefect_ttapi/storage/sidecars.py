"""What is known of images in a local folder: `.metadata/<key>.json`, as S3 keeps it in an object's headers.

A sidecar names the tag of the object that it describes, so that one which outlived its object says nothing of the
next. It is no proof of anything: one that a power failure took away, or half of it, is as good as none.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from prefect_ttapi.storage.files import forget
from prefect_ttapi.storage.layout import sidecar_key
from prefect_ttapi.storage.objects import Facts


def write_sidecar(root: Path, key: str, tag: str, facts: Facts) -> None:
    """Describe the object that has this tag. OSError: the file can't be written."""
    path = _path(root, key)
    path.parent.mkdir(parents=True, exist_ok=True)
    said = {name: value for name, value in asdict(facts).items() if value}
    # beside the object, where what a killed process leaves behind is looked for
    temporary = (root / key).with_name(f".tmp-{secrets.token_hex(8)}")
    try:
        temporary.write_text(json.dumps({"tag": tag, **said}, ensure_ascii=False, indent=1), "utf-8")
        temporary.replace(path)
    finally:
        forget(temporary)


def sidecar_metadata(root: Path, key: str, tag: str) -> Mapping[str, str]:
    """The metadata of the object that has this tag; empty where none is kept."""
    try:
        found = json.loads(_path(root, key).read_bytes())
        metadata = dict(found["metadata"]) if found["tag"] == tag else {}
    except (OSError, ValueError, TypeError, LookupError, RecursionError):
        return {}
    return {str(name): str(value) for name, value in metadata.items()}


def remove_sidecar(root: Path, key: str) -> None:
    """Forget what is known of an object."""
    _path(root, key).unlink(missing_ok=True)


def _path(root: Path, key: str) -> Path:
    return root / sidecar_key(key)
