"""Signing copies with Content Credentials, and reading them: with c2pa's own Reader, and with hostile bytes."""

from __future__ import annotations

import io
import json
import pickle
import random
import re
import struct
import sys
import threading
import time
import traceback
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import c2pa
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID
from PIL import Image

from prefect_ttapi.credentials import ContentCredentialsSigner
from prefect_ttapi.errors import SigningError
from prefect_ttapi.images import labels, signing
from prefect_ttapi.images.signing import ASSERTION, Change, Signature, Signer, read_signature
from prefect_ttapi.images.spool import Spool
from prefect_ttapi.images.xmp import GENERATED
from prefect_ttapi.sandbox import Sandbox
from tests.support.certificates import STATEMENT, Chain, chain_for, key_pem, picture, signer

FORMS = ("PNG", "JPEG", "WEBP")


def told_by_c2pa(image: Spool) -> dict[str, Any]:
    """What c2pa's own reader, with its own settings but for the network, says of an image."""
    with c2pa.Context.from_dict({"verify": {"remote_manifest_fetch": False}}) as context:
        return json.loads(c2pa.Reader(image.open(), context=context).json())


def read(data: bytes | Spool, media_type: str) -> Signature | None:
    return read_signature(data.open() if isinstance(data, Spool) else io.BytesIO(data), media_type)


def actions(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    return next(
        one["data"]["actions"] for one in manifest["assertions"] if one["label"].startswith("c2pa.actions")
    )


@pytest.mark.parametrize("form", FORMS)
def test_a_copy_is_signed_as_made_by_the_model(form: str) -> None:
    """It is valid to c2pa's reader, says who made it, has our request, and neither thumbnails nor another pixel."""
    media_type, plain = f"image/{form.lower()}", picture(form)
    marked = Spool.of(labels.mark(plain.open(), STATEMENT))
    signed = signer().sign(marked.open, media_type, STATEMENT)
    told = told_by_c2pa(signed)
    assert told["validation_state"] == "Valid"
    manifest = told["manifests"][told["active_manifest"]]
    (made,) = actions(manifest)
    assert (made["action"], made["digitalSourceType"]) == ("c2pa.created", GENERATED)
    assert made["softwareAgent"]["name"] == "gpt-image-2"
    (ours,) = [one["data"] for one in manifest["assertions"] if one["label"] == ASSERTION]
    assert ours == {"request_hash": "ab" * 32, "source_sha256": "cd" * 32}
    assert "thumbnail" not in json.dumps(told)
    assert signed.size_bytes - marked.size_bytes < 5_000
    said = labels.read_labels(signed.open())
    assert said is not None
    assert said.marks == ("credentials", "xmp")
    assert said.request_hash == "ab" * 32
    pixels = [Image.open(one.open()).convert("RGB").tobytes() for one in (plain, signed)]
    assert pixels[0] == pixels[1]
    found = read(signed, media_type)
    assert found == Signature(
        signed_by="Acme shop",
        made_with="prefect-ttapi",
        algorithm="Es256",
        request_hash="ab" * 32,
        source_sha256="cd" * 32,
    )


@pytest.mark.parametrize("form", FORMS)
def test_a_copy_of_a_signed_original_builds_on_it(form: str) -> None:
    """The original is the one ingredient, opened first, with its own manifest; then what was done to it."""
    media_type = f"image/{form.lower()}"
    original = signer().sign(picture(form).open, media_type, STATEMENT)
    copies = {
        (): signer().sign(original.open, media_type, STATEMENT, (original.open, media_type)),
        ("c2pa.resized", "c2pa.converted"): signer().sign(
            picture("WEBP", 16).open,
            "image/webp",
            STATEMENT,
            (original.open, media_type),
            Change("webp-16", ("c2pa.resized", "c2pa.converted")),
        ),
    }
    for changes, copy in copies.items():
        told = told_by_c2pa(copy)
        assert told["validation_state"] == "Valid"
        manifest = told["manifests"][told["active_manifest"]]
        assert [one["action"] for one in actions(manifest)] == ["c2pa.opened", *changes]
        (parent,) = manifest["ingredients"]
        assert parent["relationship"] == "parentOf"
        assert actions(told["manifests"][parent["active_manifest"]])[0]["digitalSourceType"] == GENERATED
        assert copy.size_bytes < original.size_bytes + 20_000


def test_a_prompt_is_told_only_where_the_statement_has_it() -> None:
    """The prompt of `mark="prompt"` is in our assertion."""
    with_prompt = signer().sign(
        picture("PNG").open, "image/png", signing.Statement("dall-e-2", "ab" * 32, "cd" * 32, "a red car")
    )
    assert "a red car" in json.dumps(told_by_c2pa(with_prompt))


KEYS = {
    "es256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "es384": lambda: ec.generate_private_key(ec.SECP384R1()),
    "es512": lambda: ec.generate_private_key(ec.SECP521R1()),
    "ps256": lambda: rsa.generate_private_key(65537, 2048),
    "ed25519": ed25519.Ed25519PrivateKey.generate,
}


@pytest.mark.parametrize("algorithm", KEYS)
def test_every_algorithm_signs(algorithm: str) -> None:
    """Without one, the algorithm goes by the key."""
    chain = chain_for(key=KEYS[algorithm]())
    made = Signer.of(chain.pem, chain.key)
    assert made.algorithm == algorithm
    made.check()
    signed = read(made.sign(picture("PNG").open, "image/png", STATEMENT), "image/png")
    assert signed is not None
    assert (signed.problem, str(signed.algorithm).lower()) == (None, algorithm)


def test_an_rsa_key_can_sign_with_a_longer_hash() -> None:
    """`algorithm` chooses among those that go with the key."""
    chain = chain_for(key=KEYS["ps256"]())
    Signer.of(chain.pem, chain.key, "ps512").check()


GOOD = chain_for()
OTHER = chain_for("Another shop")
WRONG: dict[str, tuple[Chain | tuple[bytes, bytes], str | None, str]] = {
    "expired": (chain_for(seconds=(-7200, -3600)), None, r"the certificate of Acme shop expired on \d{4}"),
    "not yet valid": (chain_for(seconds=(3600, 7200)), None, "Acme shop is not valid before"),
    "another's key": (
        (GOOD.pem, OTHER.key),
        None,
        "the private key does not belong to the certificate of Acme shop",
    ),
    "swapped": (
        (GOOD.authority + GOOD.own, GOOD.key),
        None,
        "wrong order: the private key belongs to certificate 2",
    ),
    "another's authority": (
        (GOOD.own + OTHER.authority, GOOD.key),
        None,
        r"certificate 1 \(Acme shop\) was not issued with certificate 2 \(Another shop authority\)",
    ),
    "wrong algorithm": (GOOD, "ps256", "ps256 does not go with the secp256r1 key: these do: es256"),
    "no certificates": ((b"hello", GOOD.key), None, "the certificates can't be read"),
    "no key": ((GOOD.pem, b"hello"), None, "the private key can't be read"),
    "half a key": ((GOOD.pem, GOOD.key[:90]), None, "the private key can't be read"),
    "hidden key": (
        (GOOD.pem, key_pem(KEYS["es256"](), b"sesame")),
        None,
        "the private key has a passphrase",
    ),
    "short key": (
        chain_for(key=rsa.generate_private_key(65537, 1024)),  # noqa: S505
        None,
        "has 1024 bits: 2048",
    ),
    "curve": (chain_for(key=ec.generate_private_key(ec.SECP256K1())), None, "secp256k1 can't sign images"),
    "no use": (chain_for(uses=()), None, "lacks an extended key usage"),
    "web server": (chain_for(uses=(ExtendedKeyUsageOID.SERVER_AUTH,)), None, "lacks an extended key usage"),
    "no signatures": (chain_for(signs=False), None, "lacks the key usage digitalSignature"),
    "authority": (chain_for(is_authority=True), None, "it is an authority's own"),
    "no issuer": (chain_for(names_issuer=False), None, "lacks an authority key identifier"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_sign_is_refused_at_once(name: str) -> None:
    """Each with what is wrong, in one line, and nothing of the key."""
    given, algorithm, says = WRONG[name]
    pem, key = (given.pem, given.key) if isinstance(given, Chain) else given
    with pytest.raises(ValueError, match=says) as caught:
        Signer.of(pem, key, algorithm)  # type: ignore[arg-type]
    told = "".join(traceback.format_exception(caught.value))
    assert "\n" not in str(caught.value)
    assert not any(line in told for line in key.decode().splitlines() if len(line) > 30)


def test_a_certificate_that_ends_while_it_is_used() -> None:
    """From then on, signing is refused; what was signed before without a time stamp is no longer valid."""
    chain = chain_for(seconds=(-60, 1))
    short = Signer.of(chain.pem, chain.key)
    time.sleep(1)
    with pytest.raises(
        SigningError, match="can't sign as Acme shop: the certificate of Acme shop expired on"
    ):
        short.sign(picture("PNG").open, "image/png", STATEMENT)
    signed_then = Path(__file__).parents[1] / "fixtures" / "expired.png"
    found = read(signed_then.read_bytes(), "image/png")
    assert str(found) == "signed by Acme shop, with prefect-ttapi; not valid: certificate expired"


def test_a_renewed_certificate_is_the_same_signer() -> None:
    """Who signed a copy is judged by the names of the signer and of the authority."""
    again, other = (Signer.of(chain.pem, chain.key).identity for chain in (chain_for(), OTHER))
    assert signer().identity == again != other


def test_the_key_stays_where_it_is() -> None:
    """It is in no repr, and a signer can't be pickled."""
    body = GOOD.key.decode().splitlines()[1]
    made = Signer.of(GOOD.pem, GOOD.key)
    assert body not in repr(made) + str(made)
    with pytest.raises(TypeError, match="holds a private key"):
        pickle.dumps(made)


def test_what_is_no_image_cannot_be_signed() -> None:
    """What the native library can't do is a SigningError of one line."""
    for body, media_type in ((b"hello", "image/png"), (b"BM" + bytes(60), "image/bmp")):
        with pytest.raises(SigningError, match=r"^can't sign as Acme shop: .+$"):
            signer().sign(lambda body=body: io.BytesIO(body), media_type, STATEMENT)


@contextmanager
def server(answer_after: float = 0) -> Iterator[tuple[str, list[str]]]:
    """An HTTP server that answers 500, and the paths that it was asked for."""
    asked: list[str] = []
    ended = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(self.path)
            ended.wait(answer_after)
            self.send_response(500)
            self.end_headers()

        do_GET = do_POST  # noqa: N815 - the name that http.server asks for

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{http.server_port}", asked
        finally:
            ended.set()
            http.shutdown()
            thread.join()


def test_a_time_stamp_authority_that_fails() -> None:
    """It is asked once; without its time stamp nothing is signed."""
    with server() as (address, asked), pytest.raises(SigningError, match=r"HTTP error .status = 500"):
        Signer.of(GOOD.pem, GOOD.key, time_stamps=f"{address}/tsa").check()
    assert asked == ["/tsa"]


def test_a_time_stamp_authority_that_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """The native library would wait for ever."""
    monkeypatch.setattr(signing, "PATIENCE", 0.2)
    with (
        server(answer_after=30) as (address, _),
        pytest.raises(SigningError, match=f"{address}/tsa gave no time stamp"),
    ):
        Signer.of(GOOD.pem, GOOD.key, time_stamps=f"{address}/tsa").check()


def test_credentials_that_lie_elsewhere_are_never_fetched() -> None:
    """Neither to read them, nor to sign what was made from the image, nor by its XMP."""
    with server() as (address, asked):
        info = c2pa.C2paSignerInfo("es256", GOOD.pem, GOOD.key, None)
        made = {"action": "c2pa.created", "digitalSourceType": GENERATED}
        told = {"assertions": [{"label": "c2pa.actions.v2", "data": {"actions": [made]}}]}
        remote = io.BytesIO()
        with c2pa.Builder(told) as builder, c2pa.Signer.from_info(info) as native:
            builder.set_no_embed()
            builder.set_remote_url(f"{address}/manifest.c2pa")
            builder.sign(native, "image/png", picture("PNG").open(), remote)
        found = read(remote.getvalue(), "image/png")
        original = Spool.of([remote.getvalue()])
        signed = signer().sign(picture("PNG").open, "image/png", STATEMENT, (original.open, "image/png"))
        assert told_by_c2pa(signed)["validation_state"] == "Valid"
    assert found is not None
    assert "remote" in str(found.problem)
    assert asked == []


def test_a_changed_picture_is_not_valid() -> None:
    """A flipped bit of the picture is told, with what was signed still readable."""
    data = bytearray(signer().sign(picture("JPEG").open, "image/jpeg", STATEMENT).read_bytes())
    data[-20] ^= 1
    found = read(bytes(data), "image/jpeg")
    assert found is not None
    assert found.signed_by == "Acme shop"
    assert "hash" in str(found.problem)


def test_an_image_without_credentials_has_no_signature() -> None:
    """Nor has what is no image."""
    assert read(picture("WEBP"), "image/webp") is None
    found = read(b"hello", "image/png")
    assert found is not None
    assert found.problem


def mutations(data: bytes, start: int, count: int) -> Iterator[bytes]:
    """Copies of `data`, changed from `start` on; always the same ones."""
    chance = random.Random(count)  # noqa: S311 - no secret
    for _ in range(count):
        changed = bytearray(data)
        for _ in range(chance.choice((1, 1, 2, 8))):
            at = chance.randrange(start, max(start + 1, len(changed)))
            kind = chance.randrange(5)
            if kind == 0:
                changed[at : at + 1] = bytes([chance.randrange(256)])
            elif kind == 1:
                number = chance.choice((0, 1, 8, 0x7FFF_FFFF, 0xFFFF_FFFF))
                changed[at : at + 4] = number.to_bytes(4)
            elif kind == 2:
                del changed[at : at + chance.randrange(1, 64)]
            elif kind == 3:
                changed[at:at] = changed[at : at + chance.randrange(1, 200)]
            else:
                del changed[at:]
        yield bytes(changed)


def png_with(store: bytes) -> bytes:
    """A PNG with this manifest store."""
    plain = picture("PNG", 8).read_bytes()
    chunk = b"caBX" + store
    return (
        plain[:33] + struct.pack(">I", len(store)) + chunk + struct.pack(">I", zlib.crc32(chunk)) + plain[33:]
    )


def store_in(png: bytes) -> bytes:
    at = png.index(b"caBX")
    return png[at + 4 : at + 4 + int.from_bytes(png[at - 4 : at])]


@pytest.mark.parametrize("form", FORMS)
def test_damaged_credentials_are_told_and_crash_nothing(form: str) -> None:
    """Whatever bytes are in the file: a result, never an exception; the native library would end the process."""
    media_type = f"image/{form.lower()}"
    once = signer().sign(picture(form).open, media_type, STATEMENT)
    data = signer().sign(once.open, media_type, STATEMENT, (once.open, media_type)).read_bytes()
    told = [read(changed, media_type) for changed in mutations(data, data.index(b"jumb") - 12, 100)]
    assert sum(found is not None and found.problem is not None for found in told) > 50
    assert all(found is None or "\n" not in str(found) for found in told)


def test_damaged_stores_are_told_and_crash_nothing() -> None:
    """The same, with a container that is in order around the damaged boxes."""
    png = signer().sign(picture("PNG").open, "image/png", STATEMENT).read_bytes()
    told = [read(png_with(store), "image/png") for store in mutations(store_in(png), 0, 200)]
    assert sum(found is not None and found.problem is not None for found in told) > 150


def test_boxes_in_boxes_and_endless_lists_are_refused() -> None:
    """What is nested thousands of times, or claims to be endless, takes neither the stack nor the memory."""
    png = signer().sign(picture("PNG").open, "image/png", STATEMENT).read_bytes()
    store = store_in(png)
    description = store[8 : 8 + int.from_bytes(store[8:12])]
    depth, size = 10_000, 8 + len(description)
    nested = b"".join((size * (depth - level)).to_bytes(4) + b"jumb" + description for level in range(depth))
    at = next(found.start() for found in re.finditer(rb"(?<!jumd)cbor", store))
    length = int.from_bytes(store[at - 4 : at]) - 8
    endless = [
        store[: at + 4] + (opening * length)[:length] + store[at + 4 + length :]
        for opening in (b"\x81", b"\x9f", b"\xa1\0", b"\xc1", b"\x9b" + b"\xff" * 8, b"\x5b\0" + b"\xff" * 7)
    ]
    for hostile in (nested, *endless):
        found = read(png_with(hostile), "image/png")
        assert found is not None
        assert found.problem


def test_credentials_that_are_too_large_are_not_read() -> None:
    """A list of nothing takes a hundred times its length of memory; nor is a copy signed that builds on it."""
    png = png_with(
        store_in(signer().sign(picture("PNG").open, "image/png", STATEMENT).read_bytes()) + bytes(2**21)
    )
    found = read(png, "image/png")
    assert found is not None
    assert "too much to be read" in str(found)
    with pytest.raises(SigningError, match="own credentials have 2,1"):
        signer().sign(picture("PNG").open, "image/png", STATEMENT, (lambda: io.BytesIO(png), "image/png"))


def test_without_the_extra_nothing_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading tells of no signature; signing says what to install."""
    signed = signer().sign(picture("PNG").open, "image/png", STATEMENT)
    installed = signer()
    monkeypatch.setitem(sys.modules, "c2pa", None)
    assert read(signed, "image/png") is None
    with pytest.raises(SigningError, match="c2pa"):
        installed.check()
    says = r'pip install "prefect-ttapi\[provenance\]"'
    with pytest.raises(ValueError, match=says):
        Signer.of(GOOD.pem, GOOD.key)
    with pytest.raises(ValueError, match=says):
        ContentCredentialsSigner.for_testing()
    with pytest.raises(ValueError, match=says), Sandbox(content_credentials=True):
        pass
