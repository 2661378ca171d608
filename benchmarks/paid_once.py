"""What it costs that nothing is paid for twice: requests, time and CPU per miss and per hit.

    python benchmarks/paid_once.py

The API is the sandbox, in a process of its own; the stores are a local folder, S3 on moto's server and S3 on Ceph's
gateway (Debian's packages ceph-common, ceph-mon, ceph-osd, radosgw; left out where they are missing). Requests are
counted by a proxy before the store, in calls that are not timed. Calls are one after the other; of several rounds, in
which the ways take turns, the best counts: the median of its times, and its CPU of this process, shared by its calls.
"""

from __future__ import annotations

import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

# the S3 services are those of the tests
sys.path.insert(0, str(Path(__file__).parents[1]))

from prefect_ttapi.api.client import TTAPIClient
from prefect_ttapi.generation.engine import Engine
from prefect_ttapi.generation.persisting import Paid
from prefect_ttapi.generation.runs import RunContext
from prefect_ttapi.ledger.ledger import Ledger
from prefect_ttapi.requests import ImageRequest
from prefect_ttapi.results import StoredImage
from prefect_ttapi.sandbox import Sandbox
from prefect_ttapi.storage.store import ImageStore
from tests.support.ceph import PACKAGES, ceph_server, missing_programs
from tests.support.meddling import meddling_proxy
from tests.support.s3 import S3Server, moto_server

CALLS = 30
ROUNDS = 3
COUNTED = 10
TTL = 4.0  # seconds, of the claim whose renewals are counted
CLAIM, RECORD = b"x" * 600, b"x" * 1100  # bytes, about what the ledger writes

#: The guarantee beside the image itself, as promised: requests of a miss that looks first, of a hit with one image.
PROMISED = {
    "miss": Counter({"PUT": 2, "GET": 1}),
    "miss, told by a listing": Counter({"PUT": 2}),
    "hit": Counter({"GET": 1, "HEAD": 1}),
    "hit, told by a listing": Counter({"GET": 1}),
}


@dataclass(frozen=True)
class Setting:
    """A store, and who asks it."""

    store: ImageStore
    client: TTAPIClient

    listed: dict[str, int] = field(default_factory=dict)

    @property
    def ledger(self) -> Ledger:
        return Ledger(self.store, self.client.api_origin, "benchmark")

    def list_images(self) -> None:
        self.listed.update({self.store.uri(found.key): found.size for found in self.store.list("images/")})

    def pay(self, request: ImageRequest, *, known_absent: bool = False) -> bool:
        engine = Engine(self.client, self.store, self.ledger, RunContext.current())
        found = engine.try_generate(request, known_absent=known_absent)
        return isinstance(found, Paid) and found.sent


def image_alone(setting: Setting, request: ImageRequest) -> Callable[[], object]:
    image = setting.client.generate(request).images[0]
    return lambda: setting.store.put_image(image, {})


def ask_and_store(setting: Setting, request: ImageRequest) -> Callable[[], object]:
    return lambda: setting.store.put_image(setting.client.generate(request).images[0], {})


def bare(setting: Setting, request: ImageRequest) -> Callable[[], object]:
    """As many reads and writes as a miss takes beside its image, of as many bytes, and no more than that."""
    key, store = f"bare/{request.request_hash}.json", setting.store

    def call() -> None:
        store.read(key)
        store.compare_and_swap(key, CLAIM, None)
        store.write(key, RECORD, "application/json")

    return call


def miss(setting: Setting, request: ImageRequest) -> Callable[[], object]:
    return lambda: expect(setting.pay(request))


def told_miss(setting: Setting, request: ImageRequest) -> Callable[[], object]:
    return lambda: expect(setting.pay(request, known_absent=True))


def hit(setting: Setting, request: ImageRequest) -> Callable[[], object]:
    return lambda: expect(not setting.pay(request))


def told_hit(setting: Setting, request: ImageRequest) -> Callable[[], object]:
    listed = setting.listed

    def gone(images: Iterable[StoredImage]) -> list[StoredImage]:
        return [image for image in images if listed.get(image.uri) != image.size_bytes]

    return lambda: expect(setting.ledger.look_up(request.request_hash, missing=gone) is not None)


#: From a setting and a request to a call; what the call needs is there by then. The hits are of what `miss` paid for.
WAYS: dict[str, Callable[[Setting, ImageRequest], Callable[[], object]]] = {
    "image alone": image_alone,
    "ask and store": ask_and_store,
    "as many bare requests": bare,
    "miss": miss,
    "miss, told by a listing": told_miss,
    "hit": hit,
    "hit, told by a listing": told_hit,
}


@dataclass(frozen=True)
class Cost:
    """Of a call: seconds, and seconds of CPU in this process."""

    wall: float
    cpu: float


def expect(so: bool) -> None:
    if not so:
        raise SystemExit("a miss was a hit, or a hit a miss: the figures would be of something else")


def calls_of(way: str, setting: Setting, name: str, number: int) -> list[Callable[[], object]]:
    # other prompts give other pictures: one that is stored already would cost less
    asked = "miss" if way.startswith("hit") else way
    prompts = [f"{asked}, {name}, {one}" for one in range(number)]
    requests = [ImageRequest(prompt=prompt, model="gpt-image-1") for prompt in prompts]
    if way == "hit, told by a listing":
        setting.list_images()
    return [WAYS[way](setting, request) for request in requests]


def measure(way: str, setting: Setting, name: str) -> Cost:
    calls = calls_of(way, setting, name, CALLS)
    walls, cpu = [], time.process_time()
    for call in calls:
        started = time.perf_counter()
        call()
        walls.append(time.perf_counter() - started)
    return Cost(statistics.median(walls), (time.process_time() - cpu) / CALLS)


def count(way: str, setting: Setting, seen: list[tuple[str, str]]) -> Counter[str]:
    """Requests to the store by kind, of all counted calls together."""
    calls = calls_of(way, setting, "counted", COUNTED)
    before = len(seen)
    for call in calls:
        call()
    return Counter(method for method, _ in seen[before:])


def count_renewals(setting: Setting, seen: list[tuple[str, str]]) -> int:
    """Writes of a claim while it is held for its time to live."""
    ledger = Ledger(setting.store, setting.client.api_origin, "benchmark", ttl=TTL)
    with ledger.try_acquire(ImageRequest(prompt="renewed").request_hash):
        before = len(seen)
        time.sleep(TTL)
        return len(seen) - before


@contextmanager
def servers() -> Iterator[tuple[str, S3Server]]:
    """The sandbox's address, and moto's server, in a child process."""
    child = subprocess.Popen(
        [sys.executable, __file__, "serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with child:
        sandbox, moto = json.loads(child.stdout.readline())
        yield sandbox, S3Server(moto)
        child.stdin.close()


def serve() -> None:
    """Run both on free ports, which are printed, for as long as standard input is open."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    with moto_server() as moto, Sandbox(tiny=True) as sandbox:
        print(json.dumps([sandbox.base_url, moto.url]), flush=True)
        sys.stdin.read()


def new_bucket(server: S3Server) -> str:
    client = server.client()
    client.create_bucket(Bucket="pictures")
    client.close()
    return "s3://pictures"


def requests_per_call(found: Counter[str]) -> str:
    return ", ".join(f"{number / COUNTED:g} {kind}" for kind, number in sorted(found.items())) or "-"


def compare(place: str, store: ImageStore, server: S3Server | None, client: TTAPIClient) -> bool:
    """Print what one store costs; whether it takes the requests that were promised."""
    setting = Setting(store, client)
    store.check()
    rounds = [{way: measure(way, setting, f"round {number}") for way in WAYS} for number in range(ROUNDS)]
    costs = {
        way: Cost(min(one[way].wall for one in rounds), min(one[way].cpu for one in rounds)) for way in WAYS
    }
    counts: dict[str, Counter[str]] = {way: Counter() for way in WAYS}
    renewals = None
    if server is not None:
        with meddling_proxy(server.url, lambda *_: None) as proxy:
            there = ImageStore(url=store.url, **server.settings(endpoint_url=proxy.url))
            there.check()
            counted = Setting(there, client)
            counts = {way: count(way, counted, proxy.seen) for way in WAYS}
            renewals = count_renewals(counted, proxy.seen)
    base = costs["image alone"]
    for way, cost in costs.items():
        columns = [
            f"{value * 1e3:9.2f} ({value / reference:5.2f})"
            for value, reference in ((cost.wall, base.wall), (cost.cpu, base.cpu))
        ]
        print(f"{place:<8}{way:<25}{requests_per_call(counts[way]):<24}{''.join(columns)}", flush=True)
    beside = costs["miss"].cpu - costs["ask and store"].cpu
    print(
        f"{place:<8}a miss takes {beside * 1e3:.2f} ms of CPU beside asking and storing, "
        f"{(beside - costs['as many bare requests'].cpu) * 1e3:.2f} ms of it beside bare requests"
        + (f"; a claim is renewed {renewals} times in its time to live" if renewals is not None else "")
    )
    return server is None or kept_promise(place, counts)


def kept_promise(place: str, counts: dict[str, Counter[str]]) -> bool:
    """Whether the guarantee takes no more requests than promised; says so where it does."""
    kept = True
    for way, promised in PROMISED.items():
        image: Counter[str] = Counter() if way.startswith("hit") else counts["ask and store"]
        beside = {kind: number - image[kind] for kind, number in counts[way].items()}
        if any(number > promised[kind] * COUNTED for kind, number in beside.items()):
            print(f"{place:<8}MORE than promised for a {way}: {requests_per_call(Counter(beside))}")
            kept = False
    return kept


def main() -> None:
    print(f"{'store':<8}{'per request':<25}{'requests':<24}{'wall, ms':>17}{'CPU, ms':>17}")
    missing = missing_programs()
    with (
        tempfile.TemporaryDirectory() as folder,
        servers() as (sandbox, moto),
        TTAPIClient("benchmark", sandbox) as client,
        nullcontext() if missing else ceph_server() as ceph,
    ):
        kept = [compare("folder", ImageStore(url=folder), None, client)]
        for place, server in (("moto", moto), ("ceph", ceph)):
            if server is not None:
                store = ImageStore(url=new_bucket(server), **server.settings())
                kept.append(compare(place, store, server, client))
    if missing:
        print(f"ceph    left out: there is no {', '.join(missing)}; install Debian's packages {PACKAGES}")
    print("in brackets: the ratio to storing the image alone")
    sys.exit(0 if all(kept) else 1)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["serve"]:
            serve()
        case _:
            main()
