"""Does a store keep the promises that paying once rests on? Asked before anything is paid for."""

from __future__ import annotations

import io
import random
import secrets
import time
from typing import Final

from prefect_ttapi.errors import StoreError
from prefect_ttapi.storage.layout import PROBE
from prefect_ttapi.storage.objects import Condition, ConflictError, Facts, NoAnswerError, ObjectStore

#: Of many processes that ask at the same moment each write lets one through, the others come again.
_ATTEMPTS: Final = 60
_LONGEST_PAUSE: Final = 0.2  # seconds


def probe(objects: ObjectStore) -> None:
    """Replace a small object as a ledger does, then see a second create and a write with a stale tag refused.

    A store that ignores conditions says yes to both, and would let two machines pay for the same request. The object
    stays: without it a check by one process would look like a broken promise to another.

    Raises:
        StoreError: the store can't be read or written, or takes no heed of conditions.
    """
    stale = _replace(objects)
    for expected, what in ((Condition.NOTHING, "creates an object twice"), (stale, "ignores If-Match")):
        if not _refuses(objects, expected):
            raise StoreError(
                f"{objects.uri(PROBE)}: this store {what}, so that two machines could pay for one request; "
                "use one that honours conditional writes (AWS S3, Cloudflare R2, MinIO, Ceph, a local disk)"
            )


def _replace(objects: ObjectStore) -> str:
    """Replace the probe object, made where there is none; a tag that it no longer has."""
    for _ in range(_ATTEMPTS):
        found = objects.read(PROBE)
        try:
            tag = found[1] if found else _write(objects, Condition.NOTHING)
            _write(objects, tag)
        except ConflictError:
            # another process is asking the same
            time.sleep(random.uniform(0, _LONGEST_PAUSE))  # noqa: S311 - chance, not secrecy
        else:
            return tag
    raise StoreError(
        f"{objects.uri(PROBE)}: this store refuses conditional writes that are as expected; use another store"
    )


def _refuses(objects: ObjectStore, expected: Condition | str) -> bool:
    try:
        _write(objects, expected)
    except ConflictError:
        return True
    return False


def _write(objects: ObjectStore, expected: Condition | str) -> str:
    """Write something new; its tag. It may be written any number of times: tried again without an answer."""
    document = b'{"probe": "%s"}' % secrets.token_hex(16).encode()
    for _ in range(2):
        try:
            return objects.write(PROBE, lambda: io.BytesIO(document), Facts("application/json"), expected)
        except NoAnswerError:
            continue
    return objects.write(PROBE, lambda: io.BytesIO(document), Facts("application/json"), expected)
