"""Certificates and private keys: read from PEM, and checked for whether images can be signed with them.

To be imported where the extra `provenance` is installed. The native library checks them, too, but does not say what
is wrong.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509.oid import NameOID

from prefect_ttapi.errors import printable

if TYPE_CHECKING:
    from prefect_ttapi.images.signing import Algorithm

#: What each kind of key can sign with, the first by default: elliptic curves by name.
_ALGORITHMS: Final[Mapping[str, tuple[Algorithm, ...]]] = {
    "secp256r1": ("es256",),
    "secp384r1": ("es384",),
    "secp521r1": ("es512",),
    "RSA": ("ps256", "ps384", "ps512"),
    "Ed25519": ("ed25519",),
}
_SMALLEST_RSA: Final = 2048  # bits

#: Uses of a certificate, one of which C2PA asks for: e-mail protection, signing of documents, and C2PA's own.
_USES: Final = frozenset({"1.3.6.1.5.5.7.3.4", "1.3.6.1.5.5.7.3.36", "1.3.6.1.4.1.62558.2.1"})

_LONGEST_NAME: Final = 200


def certificates_in(pem: bytes) -> list[x509.Certificate]:
    """Return the certificates: the signer's own, then the one that it was issued with, and so on."""
    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError:
        raise ValueError(
            "the certificates can't be read: they must be PEM (-----BEGIN CERTIFICATE-----)"
        ) from None


def private_key_in(pem: bytes) -> PrivateKeyTypes:
    """Return the key."""
    try:
        return load_pem_private_key(pem, None)
    except TypeError:
        raise ValueError(
            "the private key has a passphrase: store it without (openssl pkey -in KEY -out NEW)"
        ) from None
    except (ValueError, UnsupportedAlgorithm):
        raise ValueError(
            "the private key can't be read: it must be PEM (-----BEGIN PRIVATE KEY-----)"
        ) from None


def check_chain(chain: Sequence[x509.Certificate], key: PrivateKeyTypes) -> None:
    """Raise ValueError if the key does not belong to the first certificate, or that one is not good for signing."""
    public = key.public_key()
    place = next((place for place, one in enumerate(chain, start=1) if one.public_key() == public), None)
    if place is None:
        raise ValueError(f"the private key does not belong to the certificate of {name_of(chain[0])}")
    if place > 1:
        raise ValueError(
            f"the chain is in the wrong order: the private key belongs to certificate {place}, which must be the first"
        )
    for place, (one, issuer) in enumerate(pairwise(chain), start=1):
        try:
            one.verify_directly_issued_by(issuer)
        except (ValueError, TypeError, InvalidSignature):
            raise ValueError(
                f"the chain is broken, or in the wrong order: certificate {place} ({name_of(one)}) was not issued with "
                f"certificate {place + 1} ({name_of(issuer)})"
            ) from None
    _check_use(chain[0])


def _check_use(own: x509.Certificate) -> None:
    """Check what C2PA asks of a signer's certificate."""

    def said(kind: Any) -> Any:
        try:
            return own.extensions.get_extension_for_class(kind).value
        except x509.ExtensionNotFound:
            return None

    usage, uses, limits = said(x509.KeyUsage), said(x509.ExtendedKeyUsage), said(x509.BasicConstraints)
    wrong = {
        "is an authority's own": limits is not None and limits.ca,
        "lacks the key usage digitalSignature": usage is None or not usage.digital_signature,
        "lacks an extended key usage that C2PA knows, such as emailProtection": not _USES
        & {use.dotted_string for use in uses or ()},
        "lacks an authority key identifier": own.issuer != own.subject
        and said(x509.AuthorityKeyIdentifier) is None,
    }
    for why in (why for why, holds in wrong.items() if holds):
        raise ValueError(f"the certificate of {name_of(own)} can't sign images: it {why}")


def check_time(chain: Sequence[x509.Certificate]) -> None:
    """Raise ValueError if a certificate is not yet valid, or no longer."""
    now = datetime.datetime.now(datetime.UTC)
    for one in chain:
        begin, end = one.not_valid_before_utc, one.not_valid_after_utc
        if not begin <= now < end:
            when = (
                f"expired on {end:%Y-%m-%d %H:%M}"
                if now >= end
                else f"is not valid before {begin:%Y-%m-%d %H:%M}"
            )
            raise ValueError(f"the certificate of {name_of(one)} {when} UTC")


def algorithm_for(key: PrivateKeyTypes, asked: Algorithm | None) -> Algorithm:
    """Return the algorithm that a key signs with.

    Raises:
        ValueError: it can't sign images, or not with what was asked for.
    """
    kind = type(key).__name__
    if isinstance(key, EllipticCurvePrivateKey):
        kind = key.curve.name
    elif isinstance(key, Ed25519PrivateKey):
        kind = "Ed25519"
    elif isinstance(key, RSAPrivateKey):
        kind = "RSA"
        if key.key_size < _SMALLEST_RSA:
            raise ValueError(f"the RSA key has {key.key_size} bits: {_SMALLEST_RSA} are the least")
    possible = _ALGORITHMS.get(kind)
    if possible is None:
        raise ValueError(f"a key of the kind {kind} can't sign images: these can: {', '.join(_ALGORITHMS)}")
    if asked is not None and asked not in possible:
        raise ValueError(
            f"the algorithm {asked} does not go with the {kind} key: these do: {', '.join(possible)}"
        )
    return asked or possible[0]


def name_of(certificate: x509.Certificate) -> str:
    """Return whom a certificate is for."""
    for kind in (NameOID.COMMON_NAME, NameOID.ORGANIZATION_NAME):
        for attribute in certificate.subject.get_attributes_for_oid(kind):
            return printable(str(attribute.value))[:_LONGEST_NAME]
    return "no name"
