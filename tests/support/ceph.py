"""Ceph's S3 service from Debian's packages: signatures, checksums and conditional writes are real there.

One monitor, one OSD that keeps its objects in memory and one gateway, all on loopback, in a folder of their own.
"""

from __future__ import annotations

import http.client
import itertools
import shutil
import subprocess
import tempfile
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.ports import free_ports
from tests.support.s3 import S3Server

PROGRAMS = ("ceph", "ceph-mon", "ceph-osd", "monmaptool", "radosgw", "radosgw-admin")
PACKAGES = "ceph-common, ceph-mon, ceph-osd and radosgw"

#: Seconds after which a step of the start, or a daemon that is to stop, has failed.
PATIENCE = 60.0

CONFIGURATION = """
[global]
fsid = {cluster}
mon host = v2:127.0.0.1:{mon_port}
public addr = 127.0.0.1
auth cluster required = none
auth service required = none
auth client required = none
# the gateway insists on encryption otherwise, which takes keys
ms mon client mode = crc
keyring = /dev/null
admin socket =
pid file =
run dir = {folder}
log file = {folder}/$name.log
mon cluster log file = {folder}/cluster.log
mon data = {folder}/mon
mon data avail crit = 0
osd data = {folder}/osd
rgw data = {folder}/rgw
osd objectstore = memstore
memstore device bytes = 1073741824
osd crush chooseleaf type = 0
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 4
osd pool default pgp num = 4
osd pool default pg autoscale mode = off
# changes of the cluster's map, and clients that wait for one, else take seconds each
paxos propose interval = 0.02
paxos min wait = 0.01
objecter tick interval = 0.2
# without tcp_nodelay each answer with a body takes 48 ms
rgw frontends = beast endpoint=127.0.0.1:{port} tcp_nodelay=1
rgw thread pool size = 64
rgw enable gc threads = false
rgw enable lc threads = false
"""

#: Made before there is an OSD: one that runs may miss a new pool where maps change this quickly.
POOLS = (
    ".rgw.root",
    "default.rgw.log",
    "default.rgw.control",
    "default.rgw.meta",
    "default.rgw.buckets.index",
    "default.rgw.buckets.data",
    "default.rgw.buckets.non-ec",
)

_numbers = itertools.count(1)


class CephError(Exception):
    """Ceph did not start; the message ends with what it said."""


@dataclass(frozen=True)
class CephServer(S3Server):
    """Where the gateway is, and the key of its only user."""

    def new_bucket(self) -> str:
        """The name of a new, empty bucket."""
        name = f"pictures-{next(_numbers)}"
        client = self.client()
        client.create_bucket(Bucket=name)
        client.close()
        return name

    def fill(self, bucket: str, keys: Iterable[str]) -> None:
        """Put empty objects there: unsigned, as signing thousands would take longer than sending them."""
        address = self.url.removeprefix("http://")
        mine, opened = threading.local(), []

        def put(key: str) -> None:
            if not hasattr(mine, "connection"):
                mine.connection = http.client.HTTPConnection(address)
                opened.append(mine.connection)
            mine.connection.request("PUT", f"/{bucket}/{key}", headers={"Content-Length": "0"})
            with mine.connection.getresponse() as answer:
                if answer.status != 200:
                    raise CephError(f"can't put {key}: {answer.status} {answer.read()!r}")

        client = self.client()
        client.put_bucket_acl(Bucket=bucket, ACL="public-read-write")
        with ThreadPoolExecutor(6) as threads:
            for _ in threads.map(put, keys):
                pass
        client.put_bucket_acl(Bucket=bucket, ACL="private")
        client.close()
        for connection in opened:
            connection.close()


def missing_programs() -> list[str]:
    """Those of Ceph's programs that this machine lacks."""
    return [program for program in PROGRAMS if not shutil.which(program)]


@contextmanager
def ceph_server() -> Iterator[CephServer]:
    """A cluster of its own; its daemons are stopped at the end, also where the start fails half way.

    Raises:
        CephError: a program is missing, or a step of the start fails or takes longer than a minute.
    """
    if missing := missing_programs():
        raise CephError(f"there is no {', '.join(missing)}: install Debian's packages {PACKAGES}")
    with tempfile.TemporaryDirectory(prefix="ceph-") as name, ExitStack() as daemons:
        folder, (mon_port, port), osd = Path(name), free_ports(2), str(uuid.uuid4())
        cluster = str(uuid.uuid4())
        configuration, monitors = folder / "ceph.conf", str(folder / "monmap")
        configuration.write_text(
            CONFIGURATION.format(cluster=cluster, folder=folder, mon_port=mon_port, port=port)
        )
        settings = ("-c", str(configuration))
        server = CephServer(f"http://127.0.0.1:{port}", "AKIACEPHTESTS", "ceph-tests-only-secret")

        where = f"[v2:127.0.0.1:{mon_port}]"
        _run("monmaptool", "--create", "--fsid", cluster, "--addv", "a", where, monitors)
        _run("ceph-mon", *settings, "--id", "a", "--mkfs", "--monmap", monitors)
        daemons.enter_context(_daemon(folder, "ceph-mon", *settings, "--id", "a"))
        orders = [f"osd new {osd}", *(f"osd pool create {pool}" for pool in POOLS)]
        _run("ceph", *settings, "--connect-timeout", str(int(PATIENCE)), orders="\n".join(orders))

        (folder / "osd").mkdir()
        _run("ceph-osd", *settings, "--id", "0", "--mkfs", "--osd-uuid", osd)
        daemons.enter_context(_daemon(folder, "ceph-osd", *settings, "--id", "0"))
        # waits until the OSD serves
        user = ("--uid", "tests", "--display-name", "tests")
        keys = ("--access-key", server.access_key_id, "--secret-key", server.secret_access_key)
        _run("radosgw-admin", *settings, "user", "create", *user, *keys)

        gateway = daemons.enter_context(_daemon(folder, "radosgw", *settings, "--name", "client.rgw"))
        _wait_until_it_answers(port, gateway, folder / "radosgw.out")
        yield server


@pytest.fixture(scope="session")
def ceph() -> Iterator[CephServer]:
    """One Ceph for all tests, up in about 2 seconds; each takes buckets of its own."""
    with ceph_server() as server:
        yield server


def _run(*command: str, orders: str = "") -> None:
    try:
        subprocess.run(command, input=orders, capture_output=True, text=True, timeout=PATIENCE, check=True)
    except subprocess.SubprocessError as error:
        said = getattr(error, "stderr", None) or ""
        raise CephError(f"{error}: {said[-2000:]}") from error


@contextmanager
def _daemon(folder: Path, program: str, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """A daemon in the foreground; it dies with this process, too, if that is killed."""
    command = ("setpriv", "--pdeathsig", "KILL", program, *arguments, "--foreground")
    with (folder / f"{program}.out").open("wb") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_it_answers(port: int, gateway: subprocess.Popen[bytes], output: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and gateway.poll() is None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
        with suppress(OSError, http.client.HTTPException):
            connection.request("GET", "/")
            if connection.getresponse().status == 200:
                connection.close()
                return
        connection.close()
        time.sleep(0.05)
    raise CephError(f"radosgw does not answer: {output.read_text(errors='replace')[-2000:]}")
