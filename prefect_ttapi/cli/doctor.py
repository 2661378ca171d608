"""The command `doctor`: is everything there that a run needs? Nothing is paid for, and the key is sent nowhere."""

from __future__ import annotations

import logging
import platform
import re
import tempfile
import time
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from importlib.metadata import version
from pathlib import Path
from typing import Final, NamedTuple

import httpx
import prefect
from prefect.client.orchestration import get_client
from prefect.settings import get_current_settings
from rich.console import Console
from rich.text import Text

from prefect_ttapi.cli.reporting import Loudness, loudness
from prefect_ttapi.cli.stores import credentials_of, store_at
from prefect_ttapi.credentials import TTAPICredentials
from prefect_ttapi.errors import StoreError
from prefect_ttapi.generation.rescue import RescueFolder, rescue_place
from prefect_ttapi.lineage.shown import counted
from prefect_ttapi.origins import DEFAULT_BASE_URL, SANDBOX_ORIGIN
from prefect_ttapi.results import VERSION
from prefect_ttapi.storage import layout

logger = logging.getLogger(__name__)

#: Seconds that this machine's clock may be off: S3 refuses what is signed a quarter of an hour off.
_CLOCK: Final = 60.0

_PATIENCE: Final = 10.0


class Check(NamedTuple):
    """What was found of one thing: `ok` is None where it is good to know, and nothing is wrong."""

    name: str
    ok: bool | None
    told: str


def run(stores: list[str], credentials: str | None, endpoint_url: str | None) -> int:
    """Check everything and say what was found; return 1 where something is wrong."""
    signs = {True: Text("ok   ", "green"), False: Text("wrong", "bold red"), None: Text("note ", "yellow")}
    console, wrong = Console(highlight=False), 0
    for check in _checks(stores, credentials, endpoint_url):
        wrong += check.ok is False
        if check.ok is False or loudness() is not Loudness.QUIET:
            console.print(signs[check.ok], Text(f"{check.name:<9}{check.told}"), soft_wrap=True)
    return 1 if wrong else 0


def _checks(stores: list[str], credentials: str | None, endpoint_url: str | None) -> Iterator[Check]:
    yield from _versions()
    where = f"block {credentials}" if credentials else "TTAPI_API_KEY"
    try:
        found = credentials_of(credentials)
    except ValueError as error:
        yield Check("key", False, f"{error}; or try everything with --sandbox, which needs none")
    else:
        yield Check("key", True, f"found in {where}; whether it is right, only a request can tell")
        yield from _api(found)
    for address in stores:
        yield from _store(address, endpoint_url)
    if not stores:
        yield Check("store", None, "none was named: --store looks at one")
        yield _rescue(None)
    yield _server()


def _versions() -> Iterator[Check]:
    python = platform.python_version()
    yield Check("versions", True, f"prefect-ttapi {VERSION}, Prefect {prefect.__version__}, Python {python}")
    # Prefect up to 3.9.0 asks for no bound of it
    if _numbers(version("sqlalchemy")) >= (2, 1) and _numbers(prefect.__version__) <= (3, 9, 0):
        told = 'beside SQLAlchemy 2.1 no schedule makes a run: pip install "sqlalchemy<2.1"'
        yield Check("versions", False, told)


def _numbers(told: str) -> tuple[int, ...]:
    """Return a version's first three numbers.

    >>> _numbers("3.10.0rc1")
    (3, 10, 0)
    """
    return tuple(int(number) for number in re.findall(r"\d+", told)[:3])


def _api(credentials: TTAPICredentials) -> Iterator[Check]:
    url, started = credentials.base_url, time.time()
    try:
        answer = httpx.get(url, timeout=min(credentials.connect_timeout, _PATIENCE))
    except httpx.HTTPError as error:
        yield Check("API", False, f"{url} can't be reached: {error or type(error).__name__}")
        return
    took = time.time() - started
    yield Check("API", True, f"{url} answers within {took:.1f} s")
    try:
        off = started + took / 2 - parsedate_to_datetime(answer.headers["date"]).timestamp()
    except (KeyError, ValueError):
        return
    told = f"{abs(off):.0f} s {'ahead of' if off > 0 else 'behind'} the API's"
    yield Check("clock", abs(off) < _CLOCK, told if abs(off) >= _CLOCK else "right")


def _store(address: str, endpoint_url: str | None) -> Iterator[Check]:
    try:
        store = store_at(address, endpoint_url).model_copy(update={"patience_before": _PATIENCE})
        with store.before_paying():
            empty = next(store.list(layout.BATCHES), None) is None
        told = f"{store.identity} can be read" + (", and holds no batches yet" if empty else "")
        yield Check("store", True, told)
        store.check()
        told = "can be written, and of two writers at once one loses: the ledger can be kept"
        yield Check("store", True, told)
        yield _rescue(store.rescue_folder)
    except ValueError as error:
        yield Check("store", False, f"{address}: {error}")
        return
    except StoreError as error:
        yield Check("store", False, str(error))
    for origin in (DEFAULT_BASE_URL, SANDBOX_ORIGIN):
        count, place = RescueFolder(store, origin, logger).waiting()
        if count:
            told = f"{counted(count, 'paid answer')} waiting in {place}: a run on this machine puts them into the store"
            yield Check("rescue", False, told)


def _rescue(folder: str | None) -> Check:
    try:
        place = rescue_place(folder)
    except StoreError as error:
        return Check("rescue", False, str(error))
    stays = place.parent != Path(tempfile.gettempdir())
    told = "can be written" if stays else "is in the temporary folder: name one that stays (rescue_folder)"
    return Check("rescue", stays or None, f"the rescue folder {place} {told}")


def _server() -> Check:
    settings = get_current_settings()
    if not settings.api.url:
        told = f"PREFECT_API_URL is not set: each run starts a server of its own, in {settings.home}"
        return Check("server", None, told)
    with get_client(sync_client=True) as client:
        if trouble := client.api_healthcheck():
            return Check("server", False, f"{settings.api.url} can't be reached: {trouble}")
        return Check("server", True, f"{settings.api.url} answers, with Prefect {client.api_version()}")
