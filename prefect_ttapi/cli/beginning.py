"""The commands `init`, which writes a folder to deploy, and `bootstrap`, which prepares a Prefect server for it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Final, TypeVar, cast

import httpx
import yaml
from prefect.blocks.core import Block
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import (
    GlobalConcurrencyLimitCreate,
    GlobalConcurrencyLimitUpdate,
    WorkPoolCreate,
)
from prefect.events.schemas.automations import AutomationCore
from prefect.exceptions import ObjectNotFound
from prefect.settings import get_current_settings
from prefect.workers.process import ProcessWorker

from prefect_ttapi.cli.arguments import Preparing
from prefect_ttapi.cli.reporting import say
from prefect_ttapi.cli.stores import store_at
from prefect_ttapi.credentials import TTAPICredentials
from prefect_ttapi.errors import printable
from prefect_ttapi.storage.store import ImageStore

_B = TypeVar("_B", bound=Block)

#: Prefect's concurrency limit that runs which share the account share.
ACCOUNT: Final = "ttapi-account"
#: Its slots, where nobody says how many.
_IN_FLIGHT: Final = 16

_GIVEN_BY_THE_SERVER: Final = {"id", "owner_resource"}

_NEXT: Final = """\
Next, in {folder}:
  prefect-ttapi run prompts.csv --store ./images --deliver ./website --key "{{name}}.{{ext}}" --sandbox
  prefect-ttapi open ./images
prefect.yaml says how to run it every night."""


def run(address: str) -> None:
    """Write the files, none of which may be there yet.

    Raises:
        ValueError: one of them is there.
    """
    folder = Path(address).expanduser().absolute()
    places = {"folder": folder, "store": folder / "images", "deliver": folder / "website"}
    quoted = {name: json.dumps(str(path)) for name, path in places.items()}
    written = {
        "prompts.csv": _text("project/prompts.csv"),
        "flow.py": _text("project/flow.py.txt"),  # no module of this package
        "prefect.yaml": _text("project/prefect.yaml").format(**quoted),
    }
    there = [name for name in written if (folder / name).exists()]
    if there:
        held = " and ".join(there)
        raise ValueError(f"{folder} has {held} already: nothing was written; name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in written.items():
        (folder / name).write_text(text, encoding="utf-8")
    say(f"Written: {', '.join(written)}.", _NEXT.format(folder=folder))


def _text(name: str) -> str:
    """Return what a file says that comes with the package."""
    return files("prefect_ttapi.cli").joinpath(name).read_text(encoding="utf-8")


#: What became of a thing, as one of these words, and which thing it is.
_Done = tuple[str, str]
_MADE, _CHANGED, _LEFT, _MISSING = "made", "changed", "left", "MISSING"


def bootstrap(asked: Preparing) -> int:
    """Make what deployments need, and say what was made, changed or left; return the exit status.

    Raises:
        ValueError: no server is named, or an address or a key is malformed.
    """
    server = get_current_settings().api.url
    if server is None:
        raise ValueError("there is no Prefect server to set up: set PREFECT_API_URL")
    say(f"On {server}:")
    status = 0
    try:
        with get_client(sync_client=True) as client:
            for done, what in _everything(client, asked):
                tell = print if done == _MISSING else say  # what is missing is said to the quiet, too
                tell(f"  {done:<9}{what}")
                status |= done == _MISSING
    except httpx.HTTPError as error:
        raise OSError(f"the Prefect server at {server} failed: {printable(str(error))}") from error
    return int(status)


def _everything(client: SyncPrefectClient, asked: Preparing) -> Iterator[_Done]:
    yield _credentials(client, asked.name)
    yield _store(client, asked)
    yield _pool(client, asked.pool)
    yield _limit(client, asked.in_flight)
    for automation in yaml.safe_load(_text("automations.yaml"))["automations"]:
        yield _automation(client, AutomationCore.model_validate(automation))


def _credentials(client: SyncPrefectClient, name: str) -> _Done:
    what = f"credentials block {name}"
    variables = {"api_key": "TTAPI_API_KEY", "base_url": "TTAPI_BASE_URL"}
    given = {field: value for field, name_of in variables.items() if (value := os.environ.get(name_of))}
    saved = _saved(client, TTAPICredentials, name)
    if saved is None:
        if "api_key" not in given:
            return _MISSING, f"{what}: TTAPI_API_KEY is not set"
        TTAPICredentials.from_env().save(name)
        return _MADE, what
    before = {field: getattr(saved, field) for field in TTAPICredentials.model_fields}
    wanted = TTAPICredentials.model_validate(before | given)
    if wanted.api_origin != saved.api_origin:
        return _MISSING, _elsewhere(what, saved.api_origin, wanted.api_origin)
    changed = [field for field, value in before.items() if getattr(wanted, field) != value]
    if not changed:
        return _LEFT, what
    wanted.save(name, overwrite=True)
    return _CHANGED, f"{what}: {', '.join(changed)}"


def _store(client: SyncPrefectClient, asked: Preparing) -> _Done:
    what = f"store block {asked.name}"
    address = asked.store or os.environ.get("TTAPI_STORE")
    saved = _saved(client, ImageStore, asked.name)
    if not address:
        nowhere = f"{what}: neither --store nor TTAPI_STORE says where the store is"
        return (_LEFT, f"{what}: {saved.url}") if saved else (_MISSING, nowhere)
    wanted = store_at(address, asked.endpoint_url)
    if saved is None:
        wanted.save(asked.name)
        return _MADE, f"{what}: {wanted.url}"
    if saved.url != wanted.url or (asked.endpoint_url and saved.endpoint_url != wanted.endpoint_url):
        return _MISSING, _elsewhere(what, saved.identity, wanted.identity)
    return _LEFT, f"{what}: {saved.url}"


def _elsewhere(what: str, saved: str, wanted: str) -> str:
    reason = f"since everything would be paid for again at {wanted}"
    return f"{what}: it leads to {saved} and was left so, {reason}: give another --name, or edit the block"


def _saved(client: SyncPrefectClient, kind: type[_B], name: str) -> _B | None:
    try:
        client.read_block_document_by_name(name, kind.get_block_type_slug())
    except ObjectNotFound:
        return None
    return cast(_B, kind.load(name))


def _pool(client: SyncPrefectClient, name: str) -> _Done:
    try:
        found = client.read_work_pool(name)
    except ObjectNotFound:
        template = ProcessWorker.get_default_base_job_template()
        client.create_work_pool(WorkPoolCreate(name=name, type="process", base_job_template=template))
        return _MADE, f"work pool {name} (process)"
    return _LEFT, f"work pool {name} ({found.type})"


def _limit(client: SyncPrefectClient, slots: int | None) -> _Done:
    what = f"concurrency limit {ACCOUNT}"
    try:
        found = client.read_global_concurrency_limit_by_name(ACCOUNT)
    except ObjectNotFound:
        wanted = slots or _IN_FLIGHT
        client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=ACCOUNT, limit=wanted))
        return _MADE, f"{what}: {wanted}"
    if slots is None or found.limit == slots:
        return _LEFT, f"{what}: {found.limit}"
    client.update_global_concurrency_limit(ACCOUNT, GlobalConcurrencyLimitUpdate(limit=slots))
    return _CHANGED, f"{what}: {found.limit} -> {slots}"


def _automation(client: SyncPrefectClient, wanted: AutomationCore) -> _Done:
    what = f"automation {wanted.name}"
    found = next(iter(client.read_automations_by_name(wanted.name)), None)
    if found is None:
        client.create_automation(wanted)
        return _MADE, what
    # whether it is paused is for people to say
    wanted.enabled = found.enabled
    if found.model_dump(exclude=_GIVEN_BY_THE_SERVER) == wanted.model_dump(exclude=_GIVEN_BY_THE_SERVER):
        return _LEFT, what
    client.update_automation(found.id, wanted)
    return _CHANGED, what
