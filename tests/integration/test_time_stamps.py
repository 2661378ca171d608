"""A time-stamp authority, played by openssl, confirms when an image was signed."""

from __future__ import annotations

import datetime
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from cryptography.x509.oid import ExtendedKeyUsageOID

from prefect_ttapi.images.signing import Signer, read_signature
from tests.support.certificates import STATEMENT, chain_for, picture

pytestmark = pytest.mark.integration

CONFIGURATION = """
[tsa]
serial = serial
digests = sha256, sha384, sha512
default_policy = 1.2.3.4.1
signer_digest = sha256
ordering = no
tsa_name = no
ess_cert_id_chain = no
ess_cert_id_alg = sha256
"""


@pytest.fixture
def authority(tmp_path: Path) -> Iterator[str]:
    """The address of an authority that answers queries as RFC 3161 says."""
    chain = chain_for("Time", uses=(ExtendedKeyUsageOID.TIME_STAMPING,))
    for name, content in (
        ("own.pem", chain.own),
        ("authority.pem", chain.authority),
        ("key.pem", chain.key),
        ("serial", b"01"),
        ("tsa.conf", CONFIGURATION.encode()),
    ):
        (tmp_path / name).write_bytes(content)
    command = "openssl ts -reply -config tsa.conf -section tsa -queryfile query "
    command += "-inkey key.pem -signer own.pem -chain authority.pem"

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            (tmp_path / "query").write_bytes(self.rfile.read(int(self.headers["content-length"])))
            reply = subprocess.run(command.split(), cwd=tmp_path, capture_output=True, check=True).stdout
            self.send_response(200)
            self.send_header("content-type", "application/timestamp-reply")
            self.send_header("content-length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}/tsa"
        http.shutdown()
        thread.join()


def test_a_time_stamp_outlives_the_certificate(authority: str) -> None:
    """With one, the signature is still valid after the certificate has expired; without one, it is not."""
    chain = chain_for(seconds=(-60, 3))
    begun = datetime.datetime.now(datetime.UTC)
    signed = {
        address: Signer.of(chain.pem, chain.key, time_stamps=address).sign(
            picture("PNG").open, "image/png", STATEMENT
        )
        for address in (authority, None)
    }
    time.sleep(4.5)
    found = {address: read_signature(image.open(), "image/png") for address, image in signed.items()}
    stamped, plain = found[authority], found[None]
    assert stamped is not None
    assert plain is not None
    assert plain.problem == "certificate expired"
    assert (plain.signed_at, stamped.problem) == (None, None)
    assert abs(datetime.datetime.fromisoformat(str(stamped.signed_at)) - begun) < datetime.timedelta(
        minutes=1
    )
