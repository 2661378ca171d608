"""Placeholder pictures: a landscape in colours of its own for each image, the word SANDBOX, and the prompt.

Nobody should take one for a paid image, and everybody should see which request it belongs to. Equal pictures
are equal bytes. Colours are flat or change by row only: that is what makes a PNG quick to compress.
"""

from __future__ import annotations

import colorsys
import datetime
import io
import math
import random
import secrets
import struct
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

import pybase64
from PIL import Image, ImageDraw, ImageFont

from prefect_ttapi.images.lettering import LINE, Lettering, shortened
from prefect_ttapi.images.signing import EXTRA, Signer, is_installed
from prefect_ttapi.images.xmp import Statement
from prefect_ttapi.requests import ImageRequest

Colour = tuple[int, int, int]

#: Longest part of a prompt that is shown, in characters.
SHOWN: Final = 320

_SMALLEST_WITH_PROMPT: Final = 128  # pixels on the short side; below that letters are smudges
_HILL_STEPS: Final = 48
_FILES_KEPT: Final = 10_000
_TESTING_DAYS: Final = 365
_CHUNK_FRAME: Final = 12  # bytes of a PNG chunk without content: length, name, checksum


@dataclass(frozen=True)
class Picture:
    """What one picture shows, and how it is written.

    Attributes:
        request: its prompt, cut after `SHOWN` characters, model and `n` are shown; a transparent background leaves out
            the sky; format and compression are followed.
        width, height: pixels.
        key: picks colours and shapes: another key is another picture.
        index: which of the images of the answer, from 0.
        blocks: pixels per side of the blocks of an unfinished picture; 1 is a finished one.
    """

    request: ImageRequest
    width: int
    height: int
    key: str
    index: int = 0
    blocks: int = 1


def draw(picture: Picture) -> bytes:
    r"""Return the encoded picture.

    >>> draw(Picture(ImageRequest(prompt="a lighthouse"), 256, 256, key="1"))[:4]
    b'\x89PNG'
    """
    image = _landscape(picture)
    if picture.blocks > 1:
        coarse = (max(1, picture.width // picture.blocks), max(1, picture.height // picture.blocks))
        image = image.resize(coarse, Image.Resampling.BOX).resize(image.size, Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(image)
    _write_sandbox(pen, picture)
    if picture.blocks == 1 and min(picture.width, picture.height) >= _SMALLEST_WITH_PROMPT:
        _write_caption(pen, picture)
    file = io.BytesIO()
    # each format takes the options that it knows: PNG the first, WebP the others, JPEG the quality
    quality = max(1, picture.request.output_compression)
    image.save(file, picture.request.output_format, compress_level=1, quality=quality, method=0)
    return file.getvalue()


def _landscape(picture: Picture) -> Image.Image:
    """Draw sky, sun and four hills; the nearest hill is dark, so that the caption can stand on it."""
    width, height = picture.width, picture.height
    chance = random.Random(f"{picture.key}/{picture.index}")  # noqa: S311 - colours, no secrets
    # steps of the golden ratio: no two images of an answer have the same hue
    hue = random.Random(picture.key).random() + picture.index * 0.618034  # noqa: S311
    warm = (hue + chance.uniform(0.35, 0.65)) % 1
    if picture.request.background == "transparent":
        image = Image.new("RGBA", (width, height), (0, 0, 0, 0))
    else:
        sky = Image.new("RGB", (1, 3))
        sky.putdata([_colour(hue, 0.72, 0.55), _colour(hue + 0.04, 0.5, 0.85), _colour(warm, 0.35, 0.98)])
        column = sky.resize((1, max(1, height * 2 // 3)), Image.Resampling.BICUBIC)
        column = column.crop((0, 0, 1, height))
        image = column.resize((width, height), Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(image)
    radius = min(width, height) * chance.uniform(0.1, 0.17)
    sun = (width * chance.uniform(0.2, 0.8), height * chance.uniform(0.36, 0.46))
    pen.circle(sun, radius, fill=_colour(warm, 0.25, 1.0))
    for nearness in range(4):
        colour = _colour(hue + 0.03 * nearness, 0.45 + 0.1 * nearness, (0.72, 0.55, 0.4, 0.2)[nearness])
        top = height * (0.46 + 0.055 * nearness)
        pen.polygon(_hill(width, height, top, chance), fill=colour)
    return image


def _hill(width: int, height: int, top: float, chance: random.Random) -> list[tuple[float, float]]:
    waves = [(chance.uniform(0.5, 3.0), chance.uniform(0, math.tau)) for _ in range(2)]
    swing = height * 0.025
    ridge = []
    for step in range(_HILL_STEPS + 1):
        part = step / _HILL_STEPS
        rise = sum(swing * math.sin(times * math.tau * part + shift) for times, shift in waves)
        ridge.append((width * part, top + rise))
    return [*ridge, (width, height), (0, height)]


def _write_sandbox(pen: ImageDraw.ImageDraw, picture: Picture) -> None:
    """Write the word as wide as the picture allows: it must be legible on a thumbnail."""
    size = max(8, round(min(picture.width * 0.165, picture.height * 0.3)))
    font = ImageFont.load_default(size)
    bold = size // 22
    middle = (picture.width / 2, picture.height * 0.2)
    shadow = (middle[0] + size / 40, middle[1] + size / 40)
    outline = bold + math.ceil(size / 40)  # all around: behind a transparent picture may be white
    pen.text(shadow, "SANDBOX", fill=(20, 20, 30), font=font, anchor="mm", stroke_width=outline)
    pen.text(middle, "SANDBOX", fill=(255, 255, 255), font=font, anchor="mm", stroke_width=bold)


def _write_caption(pen: ImageDraw.ImageDraw, picture: Picture) -> None:
    """Write the prompt, as large as fits on the nearest hill, and a line of facts under it."""
    unit = min(math.sqrt(picture.width * picture.height), 1.5 * min(picture.width, picture.height))
    margin = round(unit * 0.06)
    width = picture.width - 2 * margin
    top, bottom = picture.height * 0.7, picture.height - margin
    number = f"image {picture.index + 1} of {picture.request.n}"
    line = f"{picture.request.model}   {picture.width}x{picture.height}   {number}"
    facts = Lettering(line, max(8, round(unit * 0.026)))
    facts.write(pen, margin, bottom, facts.text, (190, 200, 210))
    room = bottom - facts.size * 1.8 - top
    prompt = picture.request.prompt
    shown = prompt if len(prompt) <= SHOWN else prompt[:SHOWN] + " ..."
    for share in (0.062, 0.05, 0.04, 0.032):
        lettering = Lettering(shown, max(9, round(unit * share)))
        lines = lettering.wrapped(width)
        fitting = int(room // (lettering.size * LINE))
        if len(lines) <= fitting:
            break
    lettering.write_lines(pen, margin, top, shortened(lines, fitting), (255, 255, 255))


def _colour(hue: float, saturation: float, value: float) -> Colour:
    red, green, blue = colorsys.hsv_to_rgb(hue % 1, saturation, value)
    return round(red * 255), round(green * 255), round(blue * 255)


def padded(png: bytes, noise: bytes) -> bytes:
    """Return `png` made as long as `noise` by a chunk of it before the end, which viewers skip.

    >>> png = draw(Picture(ImageRequest(prompt="a lighthouse"), 16, 16, key="1"))
    >>> len(padded(png, bytes(5000))), padded(png, b"") == png
    (5000, True)
    """
    room = len(noise) - len(png) - _CHUNK_FRAME
    if room < 0:
        return png
    # lower case where the format says: may be skipped, is private, may be copied
    chunk = b"saNd" + noise[:room]
    length, checksum = struct.pack(">I", room), struct.pack(">I", zlib.crc32(chunk))
    return b"".join((png[:-_CHUNK_FRAME], length, chunk, checksum, png[-_CHUNK_FRAME:]))


def certificates_for_testing(name: str) -> tuple[bytes, bytes]:
    """Return certificates and the private key of the first as PEM, made now by an authority that nobody trusts.

    Args:
        name: of whom they are for.

    Raises:
        ValueError: the extra `provenance` is not installed.
    """
    if not is_installed():
        raise ValueError(f"certificates for testing need an extra: {EXTRA}")
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    own, authority = generate_private_key(SECP256R1()), generate_private_key(SECP256R1())
    now, pem = datetime.datetime.now(datetime.UTC), b""
    testing = x509.NameAttribute(NameOID.ORGANIZATION_NAME, "for testing only")
    issuer = x509.Name([testing, x509.NameAttribute(NameOID.COMMON_NAME, f"{name} (authority)")])
    subject = x509.Name([testing, x509.NameAttribute(NameOID.COMMON_NAME, name)])
    issued_by = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key())
    for_signing = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION])
    for key, named, issues in ((own, subject, False), (authority, issuer, True)):
        # digitalSignature for the one, keyCertSign and cRLSign for the other
        usage = x509.KeyUsage(not issues, False, False, False, False, issues, issues, False, False)
        builder = (
            x509.CertificateBuilder(issuer, named, key.public_key(), x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(days=_TESTING_DAYS))
            .add_extension(x509.BasicConstraints(issues, None), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(issued_by, critical=False)
        )
        if not issues:
            builder = builder.add_extension(for_signing, critical=False)
        pem += builder.sign(authority, SHA256()).public_bytes(Encoding.PEM)
    return pem, own.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def signer_for_testing() -> Signer:
    """Return what the sandbox signs with."""
    return Signer.of(*certificates_for_testing("prefect-ttapi sandbox"))


class Studio:
    """Make pictures now, or when their URL is asked for; either takes a while, and belongs in a thread.

    URLs lead to a bounded table of what to draw, not to images: the oldest of 10,000 are forgotten.

    Args:
        image_bytes: length of each finished PNG, filled up with noise; None: as it comes.
        signer: gives finished pictures Content Credentials, by which they grow.
    """

    def __init__(self, image_bytes: int | None = None, signer: Signer | None = None) -> None:
        self._signer = signer
        self._noise = random.Random(0).randbytes(image_bytes or 0)  # noqa: S311 - no secret
        self.files: OrderedDict[str, Picture] = OrderedDict()

    def made(self, picture: Picture) -> bytes:
        """Return the encoded picture."""
        encoded = draw(picture)
        if picture.blocks > 1:
            return encoded
        made = padded(encoded, self._noise) if picture.request.output_format == "png" else encoded
        if self._signer is None:
            return made
        # as the maker of a model does, who knows nothing of our requests
        told = Statement(picture.request.model, request_hash="", source_sha256="")
        kind = f"image/{picture.request.output_format}"
        return self._signer.sign(lambda: io.BytesIO(made), kind, told).read_bytes()

    def base64(self, picture: Picture) -> bytes:
        """Return the encoded picture in base64."""
        return pybase64.b64encode(self.made(picture))

    def file_for(self, picture: Picture) -> str:
        """Return the name of a file that will be drawn when it is asked for."""
        name = f"{secrets.token_urlsafe(16)}.{picture.request.output_format}"
        self.files[name] = picture
        if len(self.files) > _FILES_KEPT:
            self.files.popitem(last=False)
        return name
