"""The ways that `batch.py` compares, each run in a process of its own: how people get images, and ours.

`prepare_...` imports, warms up, and gives what does the work. Run by `batch.py`, which writes the job to stdin.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from measuring import forget_peak, memory

KEY = {"access_key_id": "AKIABENCH", "secret_access_key": "benchmark-only"}


@dataclass(frozen=True)
class Load:
    """Requests, how many at once, and what the API makes of them."""

    requests: int
    in_flight: int = 32
    latency: float = 0.0
    image_bytes: int | None = None
    n: int = 1
    tiny: bool = False


@dataclass(frozen=True)
class Job:
    """What one child does."""

    way: str
    load: Load
    store: str
    results: str
    api: str
    s3: str
    thumbnails: bool = True


def prompts(load: Load) -> list[dict[str, Any]]:
    more = {"n": load.n} if load.n > 1 else {}
    return [{"prompt": f"benchmark {i}", "model": "gpt-image-1"} | more for i in range(load.requests)]


def by_hand(job: Job) -> Callable[[dict[str, Any]], list[str]]:
    """One request to files, as a script does it."""
    import base64
    import hashlib

    import s3fs

    client = httpx.Client(timeout=300, limits=httpx.Limits(max_connections=job.load.in_flight))
    s3 = None
    if job.store.startswith("s3://"):
        key, secret = KEY.values()
        s3 = s3fs.S3FileSystem(key=key, secret=secret, endpoint_url=job.s3)

    def one(request: dict[str, Any]) -> list[str]:
        headers = {"TT-API-KEY": "benchmark"}
        answer = client.post(f"{job.api}/v1/images/generations", json=request, headers=headers)
        answer.raise_for_status()
        files = []
        for item in answer.json()["data"]:
            data = base64.b64decode(item["b64_json"])
            path = f"{job.store}/by-hand/{hashlib.sha256(data).hexdigest()}.png"
            if s3 is not None:
                s3.pipe_file(path, data, ContentType="image/png")
            else:
                Path(path).parent.mkdir(parents=True, exist_ok=True)
                Path(path).write_bytes(data)
            files.append(path)
        return files

    return one


def prepare_script(job: Job) -> Callable[[], None]:
    from concurrent.futures import ThreadPoolExecutor

    one = by_hand(job)
    one({"prompt": "warm-up", "model": "gpt-image-1"})

    def work() -> None:
        with ThreadPoolExecutor(job.load.in_flight) as threads:
            list(threads.map(one, prompts(job.load)))

    return work


def prepare_map(job: Job) -> Callable[[], None]:
    from prefect import flow, task
    from prefect.cache_policies import INPUTS
    from prefect.filesystems import LocalFileSystem, RemoteFileSystem
    from prefect.task_runners import ThreadPoolTaskRunner

    one = by_hand(job)
    results: LocalFileSystem | RemoteFileSystem
    if job.results.startswith("s3://"):
        key, secret = KEY.values()
        settings = {"key": key, "secret": secret, "endpoint_url": job.s3, "client_kwargs": {}}
        results = RemoteFileSystem(basepath=job.results, settings=settings)
    else:
        results = LocalFileSystem(basepath=job.results)
    results.save(f"benchmark-{os.getpid()}", _sync=True)
    generate = task(one, name="generate", cache_policy=INPUTS, persist_result=True, result_storage=results)

    @flow(task_runner=ThreadPoolTaskRunner(max_workers=job.load.in_flight))
    def images(requests: list[dict[str, Any]]) -> int:
        return len(generate.map(requests).result())

    images.with_options(validate_parameters=False)([{"prompt": "warm-up", "model": "gpt-image-1"}])
    return lambda: images(prompts(job.load)) and None


def prepare_ours(job: Job) -> Callable[[], None]:
    from prefect import flow

    from prefect_ttapi import ImageStore, TTAPICredentials, generate_batch

    s3 = {"endpoint_url": job.s3, "region": "us-east-1", **KEY} if job.store.startswith("s3://") else {}
    store = ImageStore(url=job.store, **s3)
    credentials = TTAPICredentials(api_key="benchmark", base_url=job.api, read_timeout=300)

    @flow
    def images(requests: list[dict[str, Any]], name: str) -> int:
        report = generate_batch(
            requests,
            credentials,
            store,
            max_in_flight=job.load.in_flight,
            thumbnails=job.thumbnails,
            name=name,
        )
        return report.totals.images

    images([{"prompt": "warm-up", "model": "gpt-image-1"}], "warm-up")
    return lambda: images(prompts(job.load), "benchmark") and None


WAYS = {"script": prepare_script, "map": prepare_map, "ours": prepare_ours}


def child() -> None:
    """Do the job that stdin names; say when it begins, and what it cost."""
    load = json.loads(sys.stdin.readline())
    job = Job(**{**load, "load": Load(**load["load"])})
    work = WAYS[job.way](job)
    forget_peak()
    idle = memory()
    print("ready", flush=True)
    sys.stdin.readline()
    began, cpu = time.perf_counter(), time.process_time()
    work()
    wall, cpu = time.perf_counter() - began, time.process_time() - cpu
    print(json.dumps({"wall": wall, "cpu": cpu, "peak": memory("VmHWM"), "idle": idle}), flush=True)


if __name__ == "__main__":
    child()
