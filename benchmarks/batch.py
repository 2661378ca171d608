"""A batch against what people write by hand: seconds, CPU and memory of the client, side by side in one run.

    python benchmarks/batch.py                     # all that is asked, about 15 minutes on two cores
    python benchmarks/batch.py slow --plot slow.png   # needs: pip install -c constraints.txt -e ".[dev,bench]"

Three ways do the same work, each in a process of its own: `script` (threads, httpx, json, base64, s3fs; no Prefect),
`map` (the obvious Prefect way: `@task` and `.map`, results on the same S3 where they are to be found again) and `ours`
(`generate_batch`, with ledger, manifest, gallery and artifacts). The API is the sandbox, S3 is moto's server, and there
is a Prefect server: all on this machine. Time, CPU and memory count from when everything is imported and a first small
request was made. Linux only: it reads /proc.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
from measuring import memory
from ways import KEY, Job, Load

# Prefect's server is that of the tests
sys.path.insert(0, str(Path(__file__).parents[1]))

from prefect_ttapi.sandbox import Sandbox
from tests.support.ports import free_ports
from tests.support.prefect_server import ROOT, prefect_server

SAMPLE = 0.2  # seconds between looks at a child's memory


@dataclass(frozen=True)
class Cost:
    """Of one child: seconds, CPU seconds, megabytes at the peak and above its idle size, calls to the API."""

    way: str
    wall: float
    cpu: float
    peak: float
    above_idle: float
    calls: int
    samples: list[tuple[float, float, int]] = field(default_factory=list, repr=False)


@contextmanager
def process(command: list[str], log: Path, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A child process, ended at the end."""
    with (
        log.open("a") as stderr,
        subprocess.Popen(command, stderr=stderr, text=True, start_new_session=True, **options) as started,
    ):
        try:
            yield started
        finally:
            if started.poll() is None:
                os.killpg(started.pid, signal.SIGTERM)
                try:
                    started.wait(10)
                except subprocess.TimeoutExpired:
                    os.killpg(started.pid, signal.SIGKILL)


def wait_for(url: str, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            httpx.get(url, timeout=5)
        except httpx.TransportError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
        else:
            return


def wait_until_idle(pid: int, seconds: float = 120) -> None:
    """What one run left for the Prefect server to do is not to meet the next one."""

    def ticks() -> int:
        return sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]))

    deadline = time.monotonic() + seconds
    before = ticks()
    while time.monotonic() < deadline:
        time.sleep(2)
        now = ticks()
        if now - before < 0.1 * 2 * os.sysconf("SC_CLK_TCK"):
            return
        before = now


@contextmanager
def servers(folder: Path) -> Iterator[tuple[str, dict[str, str], int]]:
    """An S3 service; the environment of processes that are to use a Prefect server of our own, and its process."""
    (port,) = free_ports(1)
    moto = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    s3, home = f"http://127.0.0.1:{port}", folder / "prefect"
    home.mkdir()
    with (
        process(moto, folder / "moto.log", stdout=subprocess.DEVNULL),
        prefect_server(home, PREFECT_SERVER_UI_ENABLED="false") as server,
    ):
        wait_for(s3)
        yield s3, {**server.environment, "PYTHONPATH": str(ROOT)}, server.pid


class Bench:
    """Runs jobs, each in a process of its own."""

    def __init__(self, folder: Path, s3: str, environment: dict[str, str], server: int) -> None:
        self._folder = folder
        self._s3 = s3
        self._environment = environment
        self._server = server
        self._places = 0

    def place(self, kind: str) -> str:
        """A new folder or bucket."""
        self._places += 1
        if kind == "folder":
            return str(self._folder / f"store-{self._places}")
        import boto3

        key, secret = KEY.values()
        session = boto3.Session(key, secret, region_name="us-east-1")
        client = session.client("s3", endpoint_url=self._s3)
        client.create_bucket(Bucket=f"store-{self._places}")
        client.close()
        return f"s3://store-{self._places}"

    def run(self, way: str, load: Load, store: str, *, thumbnails: bool = True) -> Cost:
        """What the way costs. Its results, where it keeps any, are beside the images."""
        wait_until_idle(self._server)
        options = {"image_bytes": load.image_bytes, "tiny": load.tiny, "latency": load.latency}
        with Sandbox(**options) as sandbox:
            results = f"{store}/results"
            job = Job(way, load, store, results, sandbox.base_url, self._s3, thumbnails)
            return self._measured(job, sandbox)

    def _measured(self, job: Job, sandbox: Sandbox) -> Cost:
        command = [sys.executable, str(Path(__file__).with_name("ways.py"))]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "env": self._environment}
        log = self._folder / f"{job.way}.log"
        with process(command, log, **pipes) as started:
            assert started.stdin is not None  # noqa: S101 - it is a pipe
            assert started.stdout is not None  # noqa: S101
            started.stdin.write(json.dumps(asdict(job)) + "\n")
            started.stdin.flush()
            if "ready" not in started.stdout.readline():
                raise SystemExit(f"{job.way} broke down:\n{log.read_text()[-3000:]}")
            before, began = sandbox.calls, time.perf_counter()
            started.stdin.write("go\n")
            started.stdin.flush()
            samples = self._watch(started, sandbox, began)
            line = started.stdout.readline()
            if not line:
                raise SystemExit(f"{job.way} broke down:\n{log.read_text()[-3000:]}")
            told = json.loads(line)
            return Cost(
                job.way,
                told["wall"],
                told["cpu"],
                told["peak"],
                told["peak"] - told["idle"],
                sandbox.calls - before,
                samples,
            )

    @staticmethod
    def _watch(
        started: subprocess.Popen[str], sandbox: Sandbox, began: float
    ) -> list[tuple[float, float, int]]:
        import select

        samples = []
        while True:
            try:
                samples.append((time.perf_counter() - began, memory(pid=started.pid), sandbox.images))
            except (FileNotFoundError, IndexError):
                return samples
            if select.select([started.stdout], [], [], SAMPLE)[0]:
                return samples


def table(title: str, costs: list[Cost]) -> None:
    """Print what each way cost, and what ours costs beside the others."""
    print(f"\n{title}\n")
    print(f"{'':24}{'seconds':>10}{'CPU s':>9}{'peak MB':>10}{'above idle':>12}{'calls':>8}")
    for cost in costs:
        print(
            f"{cost.way:24}{cost.wall:10.1f}{cost.cpu:9.1f}{cost.peak:10.0f}{cost.above_idle:12.0f}{cost.calls:8}"
        )
    ours = [cost for cost in costs if cost.way.startswith("ours")]
    others = [cost for cost in costs if not cost.way.startswith("ours")]
    for mine in ours:
        for other in others:
            ratios = (mine.wall / other.wall, mine.cpu / other.cpu, mine.peak / other.peak)
            print(
                f"{mine.way} / {other.way}".ljust(24)
                + "".join(f"{ratio:{width}.2f}" for ratio, width in zip(ratios, (10, 9, 10), strict=True))
            )


def slow(bench: Bench) -> dict[str, Cost]:
    """160 requests of 6 s and 1.4 MB, 32 in flight, to S3: the ideal is 30 s."""
    load = Load(160, 32, 6.0, 1_400_000)
    costs = [bench.run(way, load, bench.place("s3")) for way in ("script", "map", "ours")]
    plain = bench.run("ours", load, bench.place("s3"), thumbnails=False)
    costs.append(replace(plain, way="ours, no thumbnails"))
    table(slow.__doc__ or "", costs)
    return {cost.way: cost for cost in costs}


def cached(bench: Bench) -> dict[str, Cost]:
    """1,600 requests that are all paid for already, from S3 and from a folder."""
    load = Load(1600, 32, tiny=True)
    for kind in ("s3", "folder"):
        costs = []
        for way in ("map", "ours"):
            store = bench.place(kind)
            bench.run(way, load, store)
            costs.append(bench.run(way, load, store))
        table(f"1,600 requests that are all paid for already, from {kind}", costs)
    return {}


def quick(bench: Bench) -> dict[str, Cost]:
    """1,600 tiny images at latency 0, to S3."""
    load = Load(1600, 32, tiny=True)
    costs = [bench.run(way, load, bench.place("s3")) for way in ("map", "ours")]
    table(quick.__doc__ or "", costs)
    return {cost.way: cost for cost in costs}


def long(bench: Bench) -> dict[str, Cost]:
    """10,000 tiny images beside 500, latency 0, to a folder: cost per request, and memory."""
    small, big = (
        bench.run("ours", Load(count, 32, tiny=True), bench.place("folder")) for count in (500, 10_000)
    )
    table(long.__doc__ or "", [replace(small, way="ours, 500"), replace(big, way="ours, 10,000")])
    wall, cpu = (big.wall / 10_000) / (small.wall / 500), (big.cpu / 10_000) / (small.cpu / 500)
    print(
        f"per request: {wall:.2f} of the time, {cpu:.2f} of the CPU; {big.peak - small.peak:+.0f} MB at the peak"
    )
    return {}


def large(bench: Bench) -> dict[str, Cost]:
    """24 requests, 8 in flight, 4 images of 8 MiB each, to S3."""
    load = Load(24, 8, image_bytes=8 * 2**20, n=4)
    costs = [bench.run(way, load, bench.place("s3")) for way in ("script", "ours")]
    table(large.__doc__ or "", costs)
    return {cost.way: cost for cost in costs}


SCENARIOS = {scenario.__name__: scenario for scenario in (slow, cached, quick, long, large)}


def plot(costs: dict[str, Cost], title: str, path: Path) -> None:
    """Images over time, and memory over time, of each way."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, (rate, size) = pyplot.subplots(2, 1, sharex=True, figsize=(9, 7), layout="constrained")
    for way, cost in costs.items():
        seconds, megabytes, images = zip(*cost.samples, strict=True)
        window = max(1, round(2 / SAMPLE))
        pairs = zip(seconds, seconds[window:], images, images[window:], strict=False)
        rate.plot(seconds[window:], [(b - a) / (t - s) for s, t, a, b in pairs], label=way)
        size.plot(seconds, megabytes, label=way)
    rate.set_ylabel("images/s (over 2 s)")
    size.set_ylabel("memory, MB")
    size.set_xlabel("seconds")
    rate.legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    print(f"\n{path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "scenarios", nargs="*", metavar="SCENARIO", help=f"of {', '.join(SCENARIOS)}; else all"
    )
    parser.add_argument(
        "--plot", type=Path, metavar="PNG", help="images/s and memory over time of the first one"
    )
    options = parser.parse_args()
    unknown = set(options.scenarios) - set(SCENARIOS)
    if unknown:
        parser.error(f"there is no scenario {', '.join(sorted(unknown))}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    with tempfile.TemporaryDirectory(prefix="ttapi-bench-") as name:
        folder = Path(name)
        with servers(folder) as (s3, environment, server):
            bench = Bench(folder, s3, environment, server)
            for scenario in options.scenarios or SCENARIOS:
                costs = SCENARIOS[scenario](bench)
                if options.plot and costs:
                    plot(costs, SCENARIOS[scenario].__doc__ or "", options.plot)
                    options.plot = None


if __name__ == "__main__":
    main()
