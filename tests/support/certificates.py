"""Certificates for signing images, right or wrong in one way, and pictures to sign."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from functools import cache

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from PIL import Image

from prefect_ttapi.images.signing import Signer
from prefect_ttapi.images.spool import Spool
from prefect_ttapi.images.xmp import Statement
from tests.support.pictures import saved

STATEMENT = Statement("gpt-image-2", request_hash="ab" * 32, source_sha256="cd" * 32)


@dataclass
class Chain:
    """A signer's certificate, the authority's, and the key, as PEM."""

    own: bytes
    authority: bytes
    key: bytes

    @property
    def pem(self) -> bytes:
        return self.own + self.authority


def key_pem(key: PrivateKeyTypes, passphrase: bytes | None = None) -> bytes:
    hidden = BestAvailableEncryption(passphrase) if passphrase else NoEncryption()
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, hidden)


def chain_for(
    name: str = "Acme shop",
    *,
    seconds: tuple[float, float] = (-3600, 3600),
    key: PrivateKeyTypes | None = None,
    uses: tuple[x509.ObjectIdentifier, ...] = (ExtendedKeyUsageOID.EMAIL_PROTECTION,),
    signs: bool = True,
    is_authority: bool = False,
    names_issuer: bool = True,
) -> Chain:
    """A chain that is valid in these seconds from now."""
    key = key or ec.generate_private_key(ec.SECP256R1())
    root = ec.generate_private_key(ec.SECP256R1())
    root_name, own_name = (
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)]) for text in (f"{name} authority", name)
    )
    now = datetime.datetime.now(datetime.UTC)

    def begun(subject: x509.Name, public: object, ca: bool) -> x509.CertificateBuilder:
        builder = x509.CertificateBuilder(root_name, subject, public, x509.random_serial_number())
        begin, end = (now + datetime.timedelta(seconds=one) for one in seconds)
        return (
            builder.not_valid_before(begin)
            .not_valid_after(end)
            .add_extension(x509.BasicConstraints(ca, None), critical=True)
        )

    own = begun(own_name, key.public_key(), is_authority)
    usage = [signs, not signs, *[False] * 7]
    own = own.add_extension(x509.KeyUsage(*usage), critical=True)
    if uses:
        only_time = uses == (ExtendedKeyUsageOID.TIME_STAMPING,)  # openssl wants it to be critical
        own = own.add_extension(x509.ExtendedKeyUsage(uses), critical=only_time)
    if names_issuer:
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(root.public_key())
        own = own.add_extension(issuer, critical=False)
    authority = begun(root_name, root.public_key(), True)
    made = [one.sign(root, hashes.SHA256()).public_bytes(Encoding.PEM) for one in (own, authority)]
    return Chain(*made, key_pem(key))


@cache
def signer() -> Signer:
    chain = chain_for()
    return Signer.of(chain.pem, chain.key)


def picture(form: str, side: int = 32) -> Spool:
    """A picture with some noise in it."""
    return Spool.of([saved(Image.effect_noise((side, side), 60).convert("RGB"), form)])
