"""What it costs to get images out of an answer: ours against the usual ways.

    python benchmarks/decode.py

A child process answers over loopback HTTP with PNGs in base64. Each way runs in processes of its own, in
rounds, with one client for all calls of a round; the best call counts for the times, the worst for memory. Only
ours checks that the images are complete, reads their size and hashes them. Its images lie in temporary files,
the others' in memory. Memory is the peak above the idle size after a first small answer. Linux only.
"""

from __future__ import annotations

import base64
import gc
import json
import os
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

from measuring import forget_peak, memory

# pictures are put together as those of the tests
sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.support.pictures import png_of

WIDTH = 1024
KEY = "benchmark"


@dataclass(frozen=True)
class Load:
    """An answer of `images` PNGs of `megabytes` each, asked for `calls` times."""

    images: int
    megabytes: float
    calls: int

    @property
    def name(self) -> str:
        return f"{self.images} x {self.megabytes:g} MB"

    @property
    def path(self) -> str:
        return f"/{self.images}/{self.megabytes:g}"


FIRST = Load(1, 0.01, 1)
LOADS = (Load(1, 1.5, 20), Load(10, 1.5, 5), Load(10, 12, 2))
ROUNDS = 3  # the ways take turns, so that what else the machine does meets all of them


@dataclass(frozen=True)
class Cost:
    """Seconds, seconds of CPU in the client's process, megabytes above the idle size."""

    wall: float
    cpu: float
    memory: float


def png(megabytes: float) -> bytes:
    """A PNG of random pixels, about `megabytes` long."""
    row = 1 + 3 * WIDTH
    height = max(1, round(megabytes * 1e6 / row))
    pixels = b"".join(b"\0" + os.urandom(row - 1) for _ in range(height))
    return png_of(WIDTH, height, zlib.compress(pixels, 0))


def answer(load: Load) -> bytes:
    items = [{"b64_json": base64.b64encode(png(load.megabytes)).decode()} for _ in range(load.images)]
    usage = {"input_tokens": 9, "output_tokens": 4160, "total_tokens": 4169}
    return json.dumps({"created": 1745818538, "data": items, "usage": usage}).encode()


def serve() -> None:
    """Answer on a free port, which is printed, for as long as standard input is open."""
    answers = {load.path: answer(load) for load in (FIRST, *LOADS)}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            body = answers[self.path.removesuffix("/v1/images/generations")]
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        Thread(target=server.serve_forever).start()
        print(server.server_port, flush=True)
        sys.stdin.read()
        server.shutdown()


#: From a load to the images of its answer. Each way below makes one for a server's address.
Way = Callable[[Load], Sequence[object]]


def ours(server: str) -> Way:
    from prefect_ttapi.api.client import TTAPIClient
    from prefect_ttapi.requests import ImageRequest

    clients = {load: TTAPIClient(KEY, server + load.path) for load in (FIRST, *LOADS)}
    return lambda load: (
        clients[load].generate(ImageRequest(prompt="noise", model="gpt-image-1", n=load.images)).images
    )


def plain(server: str) -> Way:
    import httpx

    client = httpx.Client(timeout=60)

    def images(load: Load) -> Sequence[object]:
        answer = client.post(f"{server}{load.path}/v1/images/generations", json={"prompt": "noise"}).json()
        return [base64.b64decode(item["b64_json"]) for item in answer["data"]]

    return images


def pydantic(server: str) -> Way:
    import httpx
    from pydantic import Base64Bytes, BaseModel

    class Item(BaseModel):
        b64_json: Base64Bytes

    class Answer(BaseModel):
        data: list[Item]

    client = httpx.Client(timeout=60)

    def images(load: Load) -> Sequence[object]:
        body = client.post(f"{server}{load.path}/v1/images/generations", json={"prompt": "noise"}).content
        return [item.b64_json for item in Answer.model_validate_json(body).data]

    return images


def openai(server: str) -> Way:
    from openai import OpenAI

    def images(load: Load) -> Sequence[object]:
        client = clients[load]
        answer = client.images.generate(prompt="noise", model="gpt-image-1", n=load.images)
        return [base64.b64decode(item.b64_json) for item in answer.data]

    clients = {load: OpenAI(api_key=KEY, base_url=f"{server}{load.path}/v1") for load in (FIRST, *LOADS)}
    return images


WAYS = {
    "prefect_ttapi": ours,
    "httpx .json() + b64decode": plain,
    "pydantic Base64Bytes": pydantic,
    "openai client": openai,
}


def measure(way: str, load: Load, server: str) -> Cost:
    images = WAYS[way](server)
    images(FIRST)
    gc.collect()
    forget_peak()
    idle = memory()
    walls, cpus = [], []
    for _ in range(load.calls):
        gc.collect()  # what is left of the last call does not count for this one
        wall, cpu = time.perf_counter(), time.process_time()
        kept = images(load)
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
        if len(kept) != load.images:
            raise SystemExit(f"{way} gave {len(kept)} images")
        del kept
    return Cost(min(walls), min(cpus), memory("VmHWM") - idle)


def child(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, __file__, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def costs(way: str, load: Load, server: str) -> Cost:
    with child("measure", way, str(LOADS.index(load)), server) as process:
        output, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"{way} failed on {load.name}")
    return Cost(**json.loads(output))


def best(costs: list[Cost]) -> Cost:
    return Cost(
        min(cost.wall for cost in costs), min(cost.cpu for cost in costs), max(cost.memory for cost in costs)
    )


def compare() -> None:
    print(f"{'answer':<13}{'way':<27}{'wall, ms':>16}{'CPU, ms':>16}{'memory, MB':>16}")
    with child("serve") as server:
        address = f"http://127.0.0.1:{server.stdout.readline().strip()}"
        for load in LOADS:
            rounds = [{way: costs(way, load, address) for way in WAYS} for _ in range(ROUNDS)]
            found = {way: best([costs_of[way] for costs_of in rounds]) for way in WAYS}
            base = found["httpx .json() + b64decode"]
            for way, cost in found.items():
                columns = [
                    f"{value * scale:8.1f} ({value / reference:5.2f})"
                    for value, reference, scale in (
                        (cost.wall, base.wall, 1e3),
                        (cost.cpu, base.cpu, 1e3),
                        (cost.memory, base.memory, 1),
                    )
                ]
                print(f"{load.name:<13}{way:<27}{''.join(columns)}", flush=True)
    print("in brackets: the ratio to httpx .json() + b64decode")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["serve"]:
            serve()
        case ["measure", way, load, server]:
            print(json.dumps(asdict(measure(way, LOADS[int(load)], server))))
        case _:
            compare()
