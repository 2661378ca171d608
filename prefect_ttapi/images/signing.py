"""Content Credentials (C2PA): sign a copy of an image, and read who signed one and whether that still holds.

The work is c2pa-python's, which comes with the extra `provenance` and is imported when it is needed. It sends nothing
over the network, except to the time-stamp authority that a signer names.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from io import SEEK_END, BytesIO
from typing import TYPE_CHECKING, Any, BinaryIO, Final, Literal, NoReturn, Self

from PIL.Image import new
from pydantic import BaseModel, ConfigDict

from prefect_ttapi.errors import SigningError, printable
from prefect_ttapi.images.labels import Labels, read_labels
from prefect_ttapi.images.renditions import in_worker
from prefect_ttapi.images.spool import Body, Spool
from prefect_ttapi.images.xmp import GENERATED, Statement

if TYPE_CHECKING:
    from cryptography.x509 import Certificate

Algorithm = Literal["es256", "es384", "es512", "ps256", "ps384", "ps512", "ed25519"]

#: What brings the libraries.
EXTRA: Final = 'pip install "prefect-ttapi[provenance]"'

#: Our own assertion in a manifest: which request the image answers, and the SHA-256 of what the model made.
ASSERTION: Final = "prefect_ttapi.request"

#: Seconds for a signature that needs a time stamp: the native library itself would wait for ever.
PATIENCE: Final = 60.0

#: How the native library works here: without previews, which cost a hundred times the time, and without any request.
_SETTINGS: Final[dict[str, Any]] = {
    "builder": {"thumbnail": {"enabled": False}},
    "core": {"allowed_network_hosts": [], "allow_redirects": False},
    "verify": {"remote_manifest_fetch": False, "ocsp_fetch": False, "verify_timestamp_trust": False},
}

#: How a manifest names the image that it builds on.
_ORIGINAL: Final = {"label": "original", "title": "original", "relationship": "parentOf"}

#: No list of authorities is asked, here or anywhere: that is told in words, and is no fault of the file.
_UNTRUSTED: Final = "signingCredential.untrusted"

#: Bytes of credentials that are read: lists of nothing take a hundred times their length of memory.
_LARGEST: Final = 2 * 1024 * 1024

#: The native library holds an image twice while it signs it: of larger ones, one is signed at a time.
_LARGE: Final = 16 * 1024 * 1024
_large: Final = threading.Lock()

#: Characters of a text that somebody else's manifest may bring along.
_LONGEST: Final = 200

_BLOCK: Final = 256 * 1024


def is_installed() -> bool:
    """Return whether the extra `provenance` is there."""
    return all(find_spec(name) for name in ("c2pa", "cryptography"))


@dataclass(frozen=True)
class Change:
    """The change that was made to an original.

    Attributes:
        recipe: the recipe of a rendition; None for a copy, with or without a mark.
        actions: the change in C2PA's words: `c2pa.resized`, `c2pa.converted`.
    """

    recipe: str | None = None
    actions: tuple[str, ...] = ()


#: A copy.
UNCHANGED: Final = Change()


def _manifest(statement: Statement, change: Change, *, builds_on: bool) -> dict[str, Any]:
    """Return the definition of a manifest.

    Args:
        builds_on: the original has credentials, and is the manifest's one ingredient.
    """
    opened = {"action": "c2pa.opened", "parameters": {"ingredientIds": [_ORIGINAL["label"]]}}
    created = {
        "action": "c2pa.created",
        "digitalSourceType": GENERATED,
        "softwareAgent": {"name": statement.model},
    }
    actions = [opened if builds_on else created, *({"action": action} for action in change.actions)]
    ours = {
        "request_hash": statement.request_hash,
        "source_sha256": statement.source_sha256,
        "recipe": change.recipe,
        "prompt": statement.prompt,
    }
    told = {name: said for name, said in ours.items() if said}
    return {
        "claim_generator_info": [{"name": "prefect-ttapi"}],
        "assertions": [
            {"label": "c2pa.actions.v2", "data": {"actions": actions}},
            *([{"label": ASSERTION, "data": told}] if told else []),
        ],
    }


@dataclass(frozen=True, eq=False)
class Signer:
    """Sign with one certificate, from any thread. `Signer.of` makes a signer, and checks its certificates and key.

    Attributes:
        name: the name that the certificate was issued to.
        identity: a digest that stays the same when the same authority renews a certificate for the same name.
        algorithm: the algorithm of the signatures.
        time_stamps: the address of a time-stamp authority.
    """

    name: str
    identity: str
    algorithm: Algorithm
    time_stamps: str | None
    _chain: Sequence[Certificate] = field(repr=False)
    _key: bytes = field(repr=False)

    @classmethod
    def of(
        cls,
        certificates: bytes,
        private_key: bytes,
        algorithm: Algorithm | None = None,
        time_stamps: str | None = None,
    ) -> Self:
        """Return the signer.

        Args:
            certificates: the certificates in PEM: the signer's own, then the one that it was issued with, and so on.
            private_key: the key of the first certificate, in PEM without a passphrase.
            algorithm: the algorithm of the signatures, by default the one that goes with the key.
            time_stamps: the address of a time-stamp authority (RFC 3161).

        Raises:
            ValueError: a line that says what is wrong with them, without the key; or the extra is not installed.
        """
        if not is_installed():
            raise ValueError(f"signing needs an extra: {EXTRA}")
        from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

        from prefect_ttapi.images import certificates as checks

        chain, key = checks.certificates_in(certificates), checks.private_key_in(private_key)
        checks.check_chain(chain, key)
        checks.check_time(chain)
        own = chain[0]
        who = own.subject.public_bytes() + own.issuer.public_bytes()
        return cls(
            checks.name_of(own),
            hashlib.sha256(who).hexdigest()[:16],
            checks.algorithm_for(key, algorithm),
            time_stamps,
            chain,
            key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        )

    def __reduce__(self) -> NoReturn:
        """Refuse to be pickled: the workers of a distributed task runner get the block instead."""
        raise TypeError("a signer can't be pickled: it holds a private key")

    def check(self) -> None:
        """Sign a picture of one pixel, so that what can't work is known before it is needed.

        Raises:
            SigningError: it can't be done; the message says why.
        """
        picture = BytesIO()
        new("L", (1, 1)).save(picture, "PNG")
        self.sign(lambda: BytesIO(picture.getvalue()), "image/png", Statement("none", "0" * 64, "0" * 64))

    def sign(
        self,
        image: Body,
        media_type: str,
        statement: Statement,
        original: tuple[Body, str] | None = None,
        change: Change = UNCHANGED,
    ) -> Spool:
        """Return a copy of an image with Content Credentials. No two are the same bytes.

        Args:
            image: opens the image to sign; any later change to it makes the signature invalid.
            media_type: the image's media type.
            statement: what the credentials say of the image.
            original: opens the image that this one was made from, with its media type. If it has credentials of its
                own, the new ones build on them.
            change: what was done to the original.

        Raises:
            SigningError: it can't be done; the message says why.
        """
        from prefect_ttapi.images.certificates import check_time

        try:
            check_time(self._chain)
            ingredient = original if original is not None and _has_credentials(original[0]) else None
            manifest = _manifest(statement, change, builds_on=ingredient is not None)
            work = partial(self._signed, image, media_type, manifest, ingredient)
            return work() if self.time_stamps is None else _within(PATIENCE, work)
        except TimeoutError:
            why = f"{self.time_stamps} gave no time stamp within {PATIENCE:.0f} s"
            raise SigningError(f"can't sign as {self.name}: {why}") from None
        except Exception as error:  # the native library's, or of the streams that it reads
            raise SigningError(f"can't sign as {self.name}: {_in_short(error)}") from error

    def _signed(
        self, image: Body, media_type: str, manifest: dict[str, Any], ingredient: tuple[Body, str] | None
    ) -> Spool:
        import c2pa
        from cryptography.hazmat.primitives.serialization import Encoding

        chain = b"".join(certificate.public_bytes(Encoding.PEM) for certificate in self._chain)
        info = c2pa.C2paSignerInfo(self.algorithm, chain, self._key, self.time_stamps)
        with (
            c2pa.Context.from_dict(_SETTINGS) as context,
            c2pa.Signer.from_info(info) as signer,
            c2pa.Builder(manifest, context) as builder,
            tempfile.TemporaryFile(prefix="ttapi-") as signed,
        ):
            if ingredient is not None:
                with ingredient[0]() as file:
                    builder.add_ingredient(_ORIGINAL, ingredient[1], file)
            with image() as file, _large if file.seek(0, SEEK_END) > _LARGE else nullcontext():
                file.seek(0)
                builder.sign(signer, media_type, file, signed)
            signed.seek(0)
            return Spool.of(iter(partial(signed.read, _BLOCK), b""))


def _within(seconds: float, work: Callable[[], Spool]) -> Spool:
    """Return what `work` gives in a thread of its own, or raise TimeoutError after so many seconds."""
    ended: Future[Spool] = Future()

    def run() -> None:
        try:
            ended.set_result(work())
        except BaseException as error:
            ended.set_exception(error)

    threading.Thread(target=run, name="ttapi-signing", daemon=True).start()
    return ended.result(seconds)


def _has_credentials(body: Body) -> bool:
    with body() as file:
        return "credentials" in _readable_labels(file).marks


def _readable_labels(file: BinaryIO) -> Labels:
    """Return what an image says of its origin.

    Raises:
        ValueError: its Content Credentials are too large to be read.
    """
    labels = read_labels(file) or Labels()
    if labels.credentials_size > _LARGEST:
        size = f"{labels.credentials_size:,} bytes"
        raise ValueError(f"the image's own credentials have {size}, which is too much to be read")
    return labels


class Signature(BaseModel):
    """The signature of an image's Content Credentials, as they were checked. Nobody vouches for any name in it.

    Attributes:
        signed_by: the names in the certificate.
        made_with: the program that made the credentials.
        algorithm: the algorithm of the signature.
        signed_at: the time of signing, if a time-stamp authority confirms it.
        problem: why the credentials are not valid; None if nothing was changed since they were signed.
        request_hash, source_sha256, recipe: as in `Statement` and `Change`, where this package made the credentials.
    """

    model_config = ConfigDict(frozen=True)

    signed_by: str | None = None
    made_with: str | None = None
    algorithm: str | None = None
    signed_at: str | None = None
    problem: str | None = None
    request_hash: str | None = None
    source_sha256: str | None = None
    recipe: str | None = None

    def __str__(self) -> str:
        """Return it in a line.

        >>> print(Signature(signed_by="Shop", made_with="prefect-ttapi 0.1.0"))
        signed by Shop, with prefect-ttapi 0.1.0; valid, but nobody vouches for that name
        >>> print(Signature(problem="data hash mismatch"))
        not valid: data hash mismatch
        """
        told = {"signed by": self.signed_by, "with": self.made_with, "at": self.signed_at}
        who = ", ".join(f"{word} {what}" for word, what in told.items() if what)
        held = f"not valid: {self.problem}" if self.problem else "valid, but nobody vouches for that name"
        return "; ".join(filter(None, (who, held)))


@in_worker
def read_signature(file: BinaryIO, media_type: str) -> Signature | None:
    """Return who signed the image in `file`; None where it has no credentials, or the extra is not installed.

    Whatever is wrong with them is in the answer; nothing is fetched.
    """
    if not is_installed():
        return None
    import c2pa

    try:
        _readable_labels(file)
        file.seek(0)
        with (
            c2pa.Context.from_dict(_SETTINGS) as context,
            c2pa.Reader(media_type, file, context=context) as reader,
        ):
            return _signature(json.loads(reader.json()))
    except c2pa.C2paError.ManifestNotFound:
        return None
    except Exception as error:  # hostile bytes may lead to any
        return Signature(problem=_in_short(error))


def _signature(told: Mapping[str, Any]) -> Signature:
    active = told["manifests"][told["active_manifest"]]
    signed = active.get("signature_info") or {}
    names = (signed.get("common_name"), signed.get("issuer"))
    program = next(iter(active.get("claim_generator_info") or ()), None) or {
        "name": active.get("claim_generator")
    }
    ours: Mapping[str, Any] = next(
        (one["data"] for one in active.get("assertions") or () if one["label"] == ASSERTION), {}
    )
    return Signature(
        signed_by=_joined(names, ", "),
        made_with=_joined((program.get("name"), program.get("version")), " "),
        algorithm=_cut(signed.get("alg")) or None,
        signed_at=_cut(signed.get("time")) or None,
        problem=None if told.get("validation_state") in ("Valid", "Trusted") else _problem(told),
        **{name: _cut(ours.get(name)) or None for name in ("request_hash", "source_sha256", "recipe")},
    )


def _problem(told: Mapping[str, Any]) -> str:
    failures = (one for one in told.get("validation_status") or () if one.get("code") != _UNTRUSTED)
    said = [_cut(one.get("explanation") or one.get("code")) for one in failures]
    return _joined(dict.fromkeys(said), "; ") or "it can't be told why"


def _joined(parts: Iterable[Any], by: str) -> str | None:
    return by.join(dict.fromkeys(filter(None, map(_cut, parts)))) or None


def _cut(text: Any) -> str:
    return printable(str(text))[:_LONGEST] if text else ""


def _in_short(error: Exception) -> str:
    return _cut(error) or type(error).__name__
