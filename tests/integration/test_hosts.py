"""Two hosts with a worker each, and one Prefect server on PostgreSQL, one S3 and one API for both.

What is paid for, and what becomes of the runs, while a cable is pulled, a host dies, or the server is restarted or
replaced.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from prefect_ttapi.ledger.documents import Record, State
from prefect_ttapi.lineage.manifest import Row, read_manifest
from prefect_ttapi.origins import SANDBOX_PATH, origin_of
from prefect_ttapi.sandbox import Sandbox
from prefect_ttapi.storage.store import ImageStore
from tests.support.ceph import CephServer
from tests.support.chaos import checked_records, documents
from tests.support.children import child
from tests.support.clocks import until
from tests.support.hosts import NETWORK, Host, NotPermittedError, Relay, two_hosts
from tests.support.postgres import postgres
from tests.support.prefect_server import PATIENCE, PREFECT, ROOT, Server, prefect_server
from tests.support.tls import identity

pytestmark = pytest.mark.integration

#: Requests that a run has in flight.
WIDTH = 4
#: Seconds that a claim stands where a host is lost, instead of a minute.
TTL = 4.0


@dataclass
class Site:
    """All of it; this process looks at the services from outside of both hosts."""

    folder: Path
    hosts: tuple[Host, Host]
    ceph: CephServer
    database: str
    running: ExitStack
    office: ExitStack = field(default_factory=ExitStack)
    workers: dict[Host, subprocess.Popen[bytes]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        tls = identity(f"{NETWORK}.1")
        self.certificate = self.folder / "certificate.pem"
        self.certificate.write_bytes(tls.pem)
        relays = [
            self.running.enter_context(Relay(with_tls).running()) for with_tls in (None, None, tls.server)
        ]
        self.prefect, self.s3, self.api = relays
        self.s3.lead_to(port_of(self.ceph.url))
        self.start_server()
        self.running.callback(self.stop_server)
        self.deployments = {host: self.start_worker(host) for host in self.hosts}

    def start_server(self) -> None:
        """A server for the database that is there."""
        settings = {"PREFECT_SERVER_DATABASE_CONNECTION_URL": self.database}
        self.server = self.office.enter_context(prefect_server(self.folder, **settings))
        self.prefect.lead_to(port_of(self.server.url))

    def stop_server(self) -> None:
        """It ends as by `systemctl stop`; where it was, connections are refused."""
        self.office.close()
        self.prefect.lead_to(None)

    def start_worker(self, host: Host) -> str:
        """A worker of a pool of its own; gives the deployment that runs there."""
        own = self.folder / host.name
        environment = self.server.environment | {
            "PREFECT_HOME": str(own),
            "PREFECT_API_URL": f"{self.prefect.url}/api",
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "PYTHONPATH": str(ROOT),
            "SSL_CERT_FILE": str(self.certificate),
            "XDG_STATE_HOME": str(own / "state"),
        }
        own.mkdir()
        self.server.ask("work_pools/", name=host.name, type="process")
        flow = self.server.ask("flows/", name="small")
        there = {"name": host.name, "flow_id": flow["id"], "work_pool_name": host.name}
        deployment = self.server.ask("deployments/", **there, entrypoint="tests.support.small_flow.small")
        command = [PREFECT, "worker", "start", "--pool", host.name, "--type", "process"]
        worker = child(command, environment, own / "log", prefix=host.prefix)
        self.workers[host] = self.running.enter_context(worker)
        return deployment["id"]

    def until(self, what: Callable[[], object]) -> None:
        """Wait for something to become true."""
        until(what, self.said, PATIENCE)

    def said(self) -> str:
        """What both workers said, for a test that fails."""
        return "\n".join((self.folder / host.name / "log").read_text() for host in self.hosts)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, ceph: CephServer) -> Iterator[Site]:
    """Up in some 20 seconds."""
    with ExitStack() as running:
        try:
            hosts = running.enter_context(two_hosts())
        except NotPermittedError as error:
            pytest.skip(f"no network namespaces here, which take root's rights: {error}")
        database = running.enter_context(postgres())
        yield Site(tmp_path_factory.mktemp("site"), hosts, ceph, database, running)


@dataclass
class Campaign:
    """So many images, which any number of runs want, on either host."""

    site: Site
    sandbox: Sandbox
    bucket: str
    requests: int
    ttl: float

    def __post_init__(self) -> None:
        self.base_url = self.site.api.url + SANDBOX_PATH
        self.origin = origin_of(self.base_url)
        self.store = ImageStore(url=f"s3://{self.bucket}/art", **self.site.ceph.settings())

    def start(self, host: Host) -> str:
        """A new run of the host's deployment."""
        reached = self.site.ceph.settings(endpoint_url=self.site.s3.url)
        parameters = {
            # a busy machine may take long to start the other run
            "store": {"url": self.store.url, "claim_ttl": self.ttl, "patience_before": 600, **reached},
            "base_url": self.base_url,
            "requests": self.requests,
        }
        create = f"deployments/{self.site.deployments[host]}/create_flow_run"
        return self.site.server.ask(create, parameters=parameters)["id"]

    def state(self, run: str) -> str:
        """The type of a run's state."""
        return self.site.server.state_of(run)

    def end(self, *runs: str) -> None:
        """Wait for runs to be completed."""
        for run in runs:
            self.site.until(lambda run=run: self.state(run) not in ("SCHEDULED", "PENDING", "RUNNING"))
            assert self.state(run) == "COMPLETED", self.site.said()

    def claims(self, host: Host) -> int:
        """Requests that a host is about to send, or has sent."""
        found = [one for one in documents(self.store, self.origin) if one.state is State.CLAIMED]
        return sum(one.holder.host == host.name for one in found)

    def rows(self, run: str) -> list[Row]:
        """The rows of a run's manifest."""
        with self.store.open(self.store.uri(f"batches/{run}/manifest.jsonl")) as lines:
            return list(read_manifest(lines))

    def check_images(self, *runs: str) -> None:
        """Each run has a row with images for each request, the same in all of them."""
        found = [self.rows(run) for run in runs]
        for rows in found:
            assert [row.row for row in rows] == list(range(self.requests))
            assert {row.status for row in rows} <= {"generated", "cached"}
            assert [row.images for row in rows] == [row.images for row in found[0]]

    def check_payments(self) -> dict[str, Record]:
        """Return the records: they name each payment that the API has counted beyond one for each request."""
        assert len(self.sandbox.paid_by_request) == self.requests
        return checked_records(self.store, self.sandbox.paid_by_request, self.origin)

    def check_next(self, host: Host) -> None:
        """A further run is completed, which takes all images, and sends nothing."""
        calls = self.sandbox.calls
        run = self.start(host)
        self.end(run)
        assert self.sandbox.calls == calls


@contextmanager
def campaign(site: Site, requests: int, latency: float, ttl: float = 60.0) -> Iterator[Campaign]:
    """With an API of its own, and an empty store."""
    with Sandbox(tiny=True, latency=latency) as sandbox:
        site.api.lead_to(port_of(sandbox.base_url))
        yield Campaign(site, sandbox, site.ceph.new_bucket(), requests, ttl)


def port_of(url: str) -> int:
    port = urlsplit(url).port
    assert port
    return port


def test_overlapping_runs_pay_once(site: Site) -> None:
    """Two runs of one campaign, one on each host, share the work: one call for each distinct request."""
    with campaign(site, requests=60, latency=0.5) as images:
        runs = [images.start(host) for host in site.hosts]
        images.end(*runs)
        images.check_images(*runs)
        assert set(images.sandbox.paid_by_request.values()) == {1}
        assert images.sandbox.calls == images.requests
        payers = {record.run_id for record in images.check_payments().values()}
        assert payers == set(runs)


def test_a_host_that_is_cut_off_loses_nothing(site: Site) -> None:
    """The other goes on, and pays again only for what the records name; the one that returns has all images, too."""
    away, here = site.hosts
    with campaign(site, requests=16, latency=2.0, ttl=TTL) as images:
        runs = [images.start(away)]
        site.until(lambda: images.claims(away) == WIDTH and images.sandbox.in_flight == WIDTH)
        away.cut_off()
        try:
            cut = time.monotonic()
            runs.append(images.start(here))
            images.end(runs[1])
            assert time.monotonic() - cut > TTL
            time.sleep(TTL)
            assert images.state(runs[0]) == "RUNNING"
        finally:
            away.come_back()
        images.end(runs[0])
        images.check_images(*runs)
        twice = [hash_ for hash_, paid in images.sandbox.paid_by_request.items() if paid > 1]
        assert 1 <= len(twice) <= WIDTH
        records = images.check_payments()
        for hash_ in twice:
            record = records[hash_]
            named = [record.run_id, *(note.run_id for note in (*record.maybe_paid, *record.also_paid))]
            assert set(named) == set(runs)
        assert not list((site.folder / away.name / "state").rglob("*.json"))
        images.check_next(away)


def test_the_server_is_restarted(site: Site) -> None:
    """A run whose server is away for some seconds goes on, and its end is recorded; nothing is sent twice."""
    host, _ = site.hosts
    with campaign(site, requests=60, latency=0.7) as images:
        run = images.start(host)
        site.until(lambda: images.sandbox.paid >= WIDTH)
        site.stop_server()
        paid = images.sandbox.paid
        site.start_server()
        assert images.sandbox.paid >= paid + WIDTH, "it went on meanwhile"
        images.end(run)
        images.check_images(run)
        assert images.sandbox.calls == images.requests
        images.check_next(host)


def test_the_server_is_replaced(site: Site, prefect_ui: Server) -> None:
    """A run that its server has never heard of has all its images; a worker that asks again may tell of a crash."""
    host, _ = site.hosts
    with campaign(site, requests=24, latency=0.7) as images:
        run = images.start(host)
        site.until(lambda: images.sandbox.paid >= WIDTH)
        site.prefect.lead_to(port_of(prefect_ui.url))
        site.until(lambda: f"Execution of flow run '{run}' exited" in site.said())
        site.prefect.lead_to(port_of(site.server.url))
        images.check_images(run)
        assert images.sandbox.calls == images.requests
        assert images.state(run) in ("RUNNING", "CRASHED")
        images.check_next(host)


def test_a_host_dies(site: Site) -> None:
    """What it may have sent is sent again, once its claims have lapsed, and noted; its run stays "Running"."""
    host, dying = site.hosts
    with campaign(site, requests=16, latency=2.0, ttl=TTL) as images:
        dead = images.start(dying)
        site.until(lambda: images.claims(dying) == WIDTH and images.sandbox.in_flight == WIDTH)
        site.workers[dying].kill()
        run = images.start(host)
        images.end(run)
        images.check_images(run)
        records = images.check_payments()
        twice = [hash_ for hash_, paid in images.sandbox.paid_by_request.items() if paid > 1]
        assert 1 <= len(twice) <= WIDTH
        assert {note.run_id for hash_ in twice for note in records[hash_].maybe_paid} == {dead}
        assert images.state(dead) == "RUNNING"
