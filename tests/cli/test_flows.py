"""Flows to deploy: what their forms ask, and what an hourly retry sends again."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from prefect import flow
from prefect.client.schemas.objects import State, StateType
from prefect.utilities.callables import parameter_schema
from prefect.utilities.schema_tools.validation import is_valid_schema, validate

from prefect_ttapi import BatchReport, generate_batch
from prefect_ttapi.capabilities import MODELS, RULES
from prefect_ttapi.cli.flows import images, is_worth_it, retry, review
from prefect_ttapi.cli.run import campaign
from prefect_ttapi.credentials import TTAPICredentials
from prefect_ttapi.images.labels import Labels, read_labels
from prefect_ttapi.lineage.manifest import Row
from prefect_ttapi.requests import ImageRequest
from prefect_ttapi.sandbox import Sandbox
from prefect_ttapi.storage.store import ImageStore

OURS = [campaign, retry, images, review]


@flow
def own(request: ImageRequest, more: Sequence[ImageRequest] = ()) -> None:
    """A flow of a user's own."""


def sentences(fields: dict[str, dict[str, Any]]) -> list[str]:
    """The names of the fields that no sentence explains."""
    return [
        name for name, field in fields.items() if not re.match(r"[A-Za-z].*\.$", field["description"], re.S)
    ]


def test_what_delivers_offers_the_same_of_copies() -> None:
    """Whether copies replace, are marked and are signed can be said wherever they can be asked for, in one wording."""
    wanted = parameter_schema(campaign)
    for deployed in (retry, images):
        form = parameter_schema(deployed)
        for name in ("deliver", "key", "overwrite", "mark", "sign", "max_in_flight"):
            told, expected = form.properties[name], wanted.properties[name]
            assert told["description"].split() == expected["description"].split()
            assert told["default"] == expected["default"] if "default" in expected else "default" not in told
        assert form.definitions["ContentCredentialsSigner"]["block_type_slug"]


@pytest.mark.parametrize("deployed", OURS, ids=lambda deployed: deployed.name)
def test_forms_of_our_flows(deployed: Any) -> None:
    """Each field has a sentence and a bound or a list where it needs one, and blocks can be picked."""
    form = parameter_schema(deployed)
    is_valid_schema(form.model_dump())
    assert sentences(form.properties) == []
    for name, block in (("store", ImageStore), ("deliver", ImageStore), ("credentials", TTAPICredentials)):
        if name in form.properties:
            picked = form.properties[name]["anyOf"][0]["$ref"].rpartition("/")[2]
            assert form.definitions[picked]["block_type_slug"] == block._block_type_slug
    numbers = [
        kind
        for field in form.properties.values()
        for kind in field.get("anyOf", [field])
        if kind.get("type") in ("integer", "number")
    ]
    assert all({"minimum", "exclusiveMinimum"} & kind.keys() for kind in numbers)


def test_lists_of_the_form_are_those_of_the_models() -> None:
    """What the form of a batch on demand offers, some model takes, and the other way round."""
    fields = parameter_schema(images).properties
    for name in ("model", "quality", "output_format", "background", "moderation"):
        assert fields[name]["default"] in fields[name]["enum"]
    asked = ImageRequest.model_json_schema()["properties"]
    for name in ("quality", "output_format", "background", "moderation"):
        assert set(fields[name]["enum"]) == set(asked[name]["enum"])
    for name in ("n", "output_compression"):
        assert {fields[name][end] for end in ("minimum", "maximum")} == {
            asked[name][end] for end in ("minimum", "maximum")
        }
    assert set(fields["size"]["enum"]) == set(asked["size"]["anyOf"][0]["enum"])


def test_a_request_in_the_form_of_a_flow_of_ones_own() -> None:
    """Prefect makes lists, bounds and sentences of a request that is a parameter, and validates what comes by them."""
    form = parameter_schema(own).model_dump()
    is_valid_schema(form)
    fields = form["definitions"]["ImageRequest"]["properties"]
    assert sentences(fields) == []
    assert fields["model"]["enum"] == list(MODELS)
    assert fields["n"]["maximum"] == 10
    assert ">>>" not in form["definitions"]["ImageRequest"]["description"]
    for request in (
        {"prompt": "a fox"},
        {"prompt": "a fox", "model": "gpt-image-2", "size": "2048x1152"},
        {"prompt": "a fox", "model": "dall-e-3", "size": "1792x1024", "style": "vivid"},
        ImageRequest(prompt="a fox").model_dump(),
    ):
        assert validate({"request": request, "more": [request]}, form) == []
        ImageRequest.model_validate(request)
    for wrong in ({"n": 11}, {"quality": "best"}, {"size": "huge"}, {"style": "bold"}, {"partial_images": 4}):
        assert validate({"request": {"prompt": "a fox"} | wrong}, form, raise_on_error=False) != []


def test_what_a_model_takes_the_form_lets_through() -> None:
    """Every value of the table of rules is in the schema."""
    form = parameter_schema(own).model_dump()
    for model, rules in RULES.items():
        for name, rule in rules.items():
            for value in rule.values:
                asked = {"prompt": "a fox", "model": model, name: value}
                assert validate({"request": asked}, form, raise_on_error=False) == [], asked


@pytest.mark.usefixtures("prefect_server")
def test_copies_of_a_form_replace_and_are_marked(
    credentials: TTAPICredentials, store: ImageStore, tmp_path: Path
) -> None:
    """Where a name is taken nothing is paid for, unless copies replace; they are marked if that is asked for."""
    shop = ImageStore(url=str(tmp_path / "shop"))
    shop.write("a-fox.png", b"another's", "image/png")
    asked: dict[str, Any] = {"deliver": shop, "key": "{slug}.{ext}", "credentials": credentials}
    refused = images(["a fox"], store, **asked, return_state=True)
    assert refused.is_failed()
    assert refused.result(raise_on_failure=False).rows[0].error_type == "KeyTakenError"
    assert images(["a fox"], store, **asked, overwrite=True, mark=True, return_state=True).is_completed()
    (copy,) = shop.list("")
    with shop.open(shop.uri(copy.key)) as file:
        assert "xmp" in (read_labels(file) or Labels()).marks


@pytest.mark.integration
@pytest.mark.usefixtures("prefect_server")
def test_an_hourly_retry_sends_what_may_be_sent(
    sandbox: Sandbox, credentials: TTAPICredentials, store: ImageStore
) -> None:
    """A fault of the server is sent again; refused prompts, a used-up budget and what may be paid for are not.

    The next hour there is nothing left, and a name that no batch has is no failure.
    """
    faults = [
        "[[sandbox:status=503]] [[sandbox:times=1]]",
        "[[sandbox:moderation]]",
        "[[sandbox:status=504]]",
    ]
    impatient = credentials.model_copy(update={"max_attempts": 1})
    requests = [{"prompt": f"a fox {fault}"} for fault in faults]
    options: dict[str, Any] = {"name": "nightly", "raise_on_failure": False}
    first = generate_batch(requests, impatient, store, **options)
    assert [row.error_type for row in first.rows] == ["ServerError", "ModerationError", "UnknownOutcomeError"]

    def hourly(name: str = "nightly", **others: Any) -> State[BatchReport]:
        return retry(store, name, credentials=credentials, return_state=True, **others)

    state = hourly()
    assert state.is_completed()
    (row,) = state.result().rows
    assert (row.status, row.request_hash) == ("generated", first.rows[0].request_hash)
    assert (
        "left to the next campaign, or to a person: 1 ModerationError, 1 UnknownOutcomeError" in state.message
    )
    assert sandbox.calls == 4
    for nothing in (hourly(), hourly("weekly")):
        assert (nothing.type, nothing.message) == (StateType.COMPLETED, "Nothing is to be asked for again.")
    assert sandbox.calls == 4


def test_what_may_have_been_paid_for_is_sent_again_only_if_asked() -> None:
    """Also a request that was under way when its batch ended, whatever ended the batch."""
    row = Row(row=0, status="failed", request=ImageRequest(prompt="a fox"), maybe_paid=("under way",))
    for kind in ("UnknownOutcomeError", "InsufficientBalanceError", "NotStoredError", None):
        perhaps = row.model_copy(update={"error_type": kind})
        assert (is_worth_it(perhaps, False), is_worth_it(perhaps, True)) == (False, True)
    for kind in ("BudgetExceeded", "ModerationError"):
        assert not is_worth_it(row.model_copy(update={"error_type": kind}), True)
