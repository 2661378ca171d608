"""Failures on purpose: all forms of errors, by chance that repeats itself or because a prompt says so."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from prefect_ttapi.sandbox import Sandbox
from prefect_ttapi.sandbox.behaviour import FAILURES, Behaviour, Told, fate_of, latency_range

PATH = "/v1/images/generations"
Connect = Callable[..., httpx.Client]


def post(client: httpx.Client, prompt: str) -> httpx.Response:
    return client.post(PATH, json={"prompt": prompt, "model": "gpt-image-2"})


@pytest.mark.parametrize("name", FAILURES)
def test_every_failure_has_its_form(client: httpx.Client, sandbox: Sandbox, name: str) -> None:
    """Each failure of the table arrives with its status and in its envelope; nothing is paid."""
    response = post(client, f"a cat [[sandbox:status={name}]]")
    failure = FAILURES[name]
    assert response.status_code == failure.status
    if failure.envelope == "vendor":
        assert response.json() == {"status": "FAILED", "message": failure.message, "data": None}
    elif failure.envelope == "openai":
        assert response.json()["error"]["code"] == failure.code
    else:
        assert response.headers["content-type"].startswith("text/html")
        assert failure.message in response.text
    assert (sandbox.calls, sandbox.paid) == (1, 0)


def test_rate_limits_say_when_to_come_back(client: httpx.Client) -> None:
    """429 carries a short Retry-After."""
    assert float(post(client, "[[sandbox:status=429]]").headers["retry-after"]) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_cut_loses_the_connection_amid_the_image(
    client: httpx.Client, sandbox: Sandbox, *, stream: bool
) -> None:
    """A cut answer begins well and never ends; the images were made, so it counts as paid."""
    body = {"prompt": "[[sandbox:cut]]", "model": "gpt-image-2", "stream": stream}
    with client.stream("POST", PATH, json=body) as response:
        assert response.status_code == 200
        received: list[bytes] = []
        with pytest.raises(httpx.RemoteProtocolError):
            received.extend(response.iter_raw())
    assert b'"b64_json": "iVBOR' in b"".join(received)
    assert (sandbox.calls, sandbox.paid) == (1, 1)


def test_hang_says_nothing(client: httpx.Client, sandbox: Sandbox) -> None:
    """A hanging call is never answered; it ends when the client gives up, and others are served meanwhile."""
    with pytest.raises(httpx.ReadTimeout):
        client.post(PATH, json={"prompt": "[[sandbox:hang]]"}, timeout=0.2)
    assert post(client, "a cat").status_code == 200
    assert (sandbox.calls, sandbox.paid) == (2, 1)


def test_times_ends_the_failure(client: httpx.Client) -> None:
    """With `times`, a request fails so often and then works; another request counts for itself."""
    one, other = "[[sandbox:status=503]] [[sandbox:times=2]]", "[[sandbox:moderation]] [[sandbox:times=1]]"
    prompts = [one, other, one, one, other]
    assert [post(client, prompt).status_code for prompt in prompts] == [503, 400, 503, 200, 200]


def test_chance_repeats_itself_in_any_order(connect: Connect) -> None:
    """Which calls fail depends on seed, request and repetition, not on the order in which requests arrive."""
    prompts = [f"picture {number}" for number in range(12)] * 2
    seen = []
    for seed, order in ((3, prompts), (3, prompts[::-1]), (4, prompts)):
        with (
            Sandbox(tiny=True, seed=seed, fail={429: 0.3, "moderation": 0.2}) as sandbox,
            connect(base_url=sandbox.base_url) as client,
        ):
            statuses: dict[str, list[int]] = {}
            for prompt in order:
                statuses.setdefault(prompt, []).append(post(client, prompt).status_code)
            seen.append(statuses)
    assert seen[0] == seen[1]
    assert seen[0] != seen[2]
    assert {each for two in seen[0].values() for each in two} == {200, 400, 429}


def test_rates_are_met() -> None:
    """Each failure comes about as often as its rate says, and latency stays in its range."""
    behaviour = Behaviour(latency=(0.5, 1.5), fail={"429": 0.1, "cut": 0.01})
    fates = [fate_of(Told(), f"request {number}", 1, behaviour) for number in range(4000)]
    latencies, failures = zip(*fates, strict=True)
    assert 300 < failures.count("429") < 500
    assert 15 < failures.count("cut") < 75
    assert set(failures) == {"429", "cut", None}
    assert all(0.5 <= each <= 1.5 for each in latencies)
    assert 0.95 < sum(latencies) / 4000 < 1.05


def test_a_certain_failure_is_certain(client: httpx.Client) -> None:
    """A rate of 1 fails always, of 0 never."""
    for rate, failures in ((1.0, {"500"}), (0.0, {None})):
        behaviour = Behaviour(fail={"500": rate})
        assert {fate_of(Told(), str(n), 1, behaviour)[1] for n in range(200)} == failures


def test_no_more_calls_than_there_is_room_for(connect: Connect) -> None:
    """While a call is worked on, with room for one, others get 429; calls one after the other all find room."""
    with (
        Sandbox(tiny=True, room=1) as sandbox,
        connect(base_url=sandbox.base_url) as client,
        ThreadPoolExecutor(1) as thread,
    ):
        assert [post(client, f"dog {number}").status_code for number in range(3)] == [200] * 3
        slow = thread.submit(post, client, "a cat [[sandbox:latency=0.5]]")
        answers = []
        while not slow.done():
            answers.append(post(client, "a dog").status_code)
        assert 429 in answers or slow.result().status_code == 429


@pytest.mark.parametrize(
    "options",
    [
        {"fail": {418: 0.1}},
        {"fail": {429: 1.1}},
        {"fail": {429: -0.1}},
        {"fail": {429: 0.6, 500: 0.6}},
        {"latency": "soon"},
        {"latency": (2, 1)},
        {"latency": -1},
        {"latency": float("nan")},
        {"items": "both"},
        {"room": 0},
    ],
)
def test_impossible_settings_are_refused(options: dict[str, object]) -> None:
    """A sandbox that can't behave as told is not made."""
    with pytest.raises(ValueError):
        Sandbox(**options)


@pytest.mark.parametrize(
    ("given", "seconds"), [(2, (2, 2)), ("0.5", (0.5, 0.5)), ("1-2", (1, 2)), ((0, 3), (0, 3))]
)
def test_latency_is_seconds_or_a_range(
    given: float | str | tuple[float, float], seconds: tuple[float, float]
) -> None:
    """Latency can be said as a number, a text or a pair."""
    assert latency_range(given) == seconds
