"""What is found wrong with a batch before anything is paid for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest

from prefect_ttapi import Budget, IllegalBatchError, Price, agenerate_batch, generate_batch
from prefect_ttapi.batch.generate import check_batch
from prefect_ttapi.batch.items import Item, KeyCheck, row_of, take_in
from prefect_ttapi.batch.options import BatchOptions
from prefect_ttapi.lineage.shown import Shown
from prefect_ttapi.requests import ImageRequest
from prefect_ttapi.storage.store import ImageStore


def test_keys_are_judged_where_they_will_be() -> None:
    """A key that is legal by itself, and too long below the prefix that is delivered to, is found before paying."""
    long, short = (
        ImageStore(url=f"s3://pictures/{'p' * length}", access_key_id="k", secret_access_key="s")
        for length in (300, 30)
    )
    values = {name: name * 120 for name in "abcdef"}
    template = "/".join(f"{{{name}}}" for name in values) + "/{index}.{ext}"
    item = Item(0, ImageRequest(prompt="a cat"), values)
    problems = [
        KeyCheck(BatchOptions(deliver_to=place, key=template).delivery(datetime.now(UTC)), Shown()).problem(
            item
        )
        for place in (long, short)
    ]
    assert problems[1] is None
    assert "1,024 bytes" in problems[0]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"requests": None}, "requests must be an iterable of requests, not NoneType"),
        ({"max_in_flight": None}, "max_in_flight must be a whole number of at least 1, not None"),
        ({"max_in_flight": 2.5}, "max_in_flight must be a whole number"),
        ({"shard_size": "8"}, "shard_size must be a whole number of at least 1, not '8'"),
        ({"budget": {}}, "Budget is needed, not dict"),
        ({"deliver_to": "./site"}, "ImageStore is needed, not str"),
        ({"values": lambda _: None}, "its values must be a mapping of names, not NoneType"),
    ],
)
def test_wrong_arguments_are_told(store, credentials, arguments: dict[str, Any], says: str) -> None:
    """An argument of the wrong kind is an illegal batch, in one line."""
    with pytest.raises(IllegalBatchError, match=says):
        check_batch(
            **{"requests": [{"prompt": "a cat"}], "credentials": credentials, "store": store} | arguments
        )


def test_a_text_is_a_prompt_for_the_default_model() -> None:
    """A list of texts is a batch; one text is none."""
    items = list(take_in(["a red car", "a cat"], None, None, None).items)
    assert [item.request for item in items] == [
        ImageRequest(prompt="a red car"),
        ImageRequest(prompt="a cat"),
    ]
    with pytest.raises(IllegalBatchError, match="not a single one"):
        take_in("a red car", None, None, None)


def test_a_null_in_a_key_names_row_and_column(store, credentials) -> None:
    """What pandas has for nothing is no text in a key."""
    values = [{"sku": "a"}, {"sku": None}]
    with pytest.raises(
        IllegalBatchError, match="request 1: the key template needs a value for 'sku', but it is null"
    ):
        check_batch(
            [{"prompt": "a"}, {"prompt": "b"}],
            credentials,
            store,
            values=values,
            deliver_to=store,
            key="{sku}.{ext}",
        )


def test_an_extension_of_another_type_is_refused_before_paying(store, credentials) -> None:
    """The rows whose keys end in what the image will not be are told, with the way out."""
    values = [{"file": "x.jpg"}, {"file": "y.png"}]
    with pytest.raises(IllegalBatchError, match=r"request 0: its key x.jpg ends in .jpg") as caught:
        check_batch(
            [{"prompt": "a"}, {"prompt": "b"}],
            credentials,
            store,
            values=values,
            deliver_to=store,
            key="{file}",
        )
    assert str(caught.value).endswith("end the key template in {file.stem}.{ext}")
    assert "request 1" not in str(caught.value)


def test_what_looks_like_a_secret_is_in_no_row(caplog: pytest.LogCaptureFixture) -> None:
    """The key template may use it; the rows of a manifest don't have it, and one warning names it."""
    secrets = {"API-Key": "x", "auth_token": "y", "Password": "z", "note": "use sk-Marked-0123456789abcdef"}
    harmless = {"key": "a.png", "tokens": "3", "keyboard": "de", "token_count": "4", "skin": "sk-1"}
    requests = [{"prompt": "a"}, {"prompt": "b"}]
    # who checks a batch before it runs warns of nothing
    checked_before, items = (take_in(requests, [secrets | harmless] * 2, None, None) for _ in range(2))
    assert checked_before.total == 2
    for item in items.items:
        assert isinstance(item, Item)
        assert item.values == secrets | harmless
        assert row_of(item, None).values == harmless
    illegal = {"prompt": "", "api_key": "x"}
    (done,) = take_in(iter([illegal]), None, None, None).items
    assert done.row.given == {"prompt": ""}
    said = [record.getMessage() for record in caplog.records]
    assert sorted(line.split("'")[1] for line in said) == sorted(secrets)
    assert all(line.endswith("look like a secret: they are not copied into the manifest") for line in said)


@pytest.mark.parametrize(
    ("budget", "says"),
    [
        (Budget(tokens=1), "a budget in tokens can't be held: dall-e-3 tells none"),
        (Budget(usd=1, prices={"dall-e-3": Price(per_million_output_tokens=1)}), "needs a price per_image"),
        (Budget(usd=1, prices={"dall-e-3": Price(per_image=0.04)}), None),
    ],
)
def test_a_limit_that_can_not_be_held_is_refused(budget: Budget, says: str | None) -> None:
    """A model that tells no tokens can't be held to a limit of them, nor to one of money that only tokens cost."""
    requests = [{"prompt": "a cat", "model": "dall-e-3"}]
    if says is None:
        assert take_in(requests, None, None, budget).total == 1
    else:
        with pytest.raises(IllegalBatchError, match=says):
            take_in(requests, None, None, budget)


@pytest.mark.parametrize("call", [generate_batch, lambda *a, **k: asyncio.run(agenerate_batch(*a, **k))])
def test_a_misspelt_option_is_told_the_nearest(call: Callable[..., object]) -> None:
    """Before anything is read or sent, of both twins."""
    with pytest.raises(
        TypeError, match="max_inflight is no option of generate_batch: did you mean max_in_flight"
    ):
        call([], None, None, max_inflight=3)
