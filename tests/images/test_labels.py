"""Labels in files: found wherever encoders put them, inserted without another byte changing, taken out again."""

from __future__ import annotations

import io
import random
import struct
import tracemalloc
import zlib
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from prefect_ttapi.errors import PictureError
from prefect_ttapi.images.labels import Labels, mark, read_labels, unmark
from prefect_ttapi.images.spool import Spool
from prefect_ttapi.images.xmp import EMPTY, GENERATED, Packet, Statement
from tests.support.pictures import manifest_store, noisy, png_of, with_credentials

SAID = Statement("gpt-image-2", request_hash="ab" * 32, source_sha256="cd" * 32)

#: What an editor leaves: its own prefixes, a property that we would give, a comment that looks like the end.
THEIRS = b"""<?xpacket begin="" id="W5M0MpCehiHzreSzNTczkc9d"?>
<xmp:xmpmeta xmlns:xmp="adobe:ns:meta/"><R:RDF xmlns:R="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<R:Description R:about="" xmlns:x="http://ns.adobe.com/xap/1.0/" x:CreatorTool="An editor 9" x:Rating="5">
<!-- </R:RDF> --><dc:rights xmlns:dc="http://purl.org/dc/elements/1.1/">Zo\xc3\xab</dc:rights>
</R:Description></R:RDF></xmp:xmpmeta>
<?xpacket end="w"?>"""


def marked(data: bytes, said: Statement = SAID, packet: bytes | None = None) -> bytes:
    return b"".join(mark(io.BytesIO(data), said, packet))


def unmarked(data: bytes) -> bytes:
    return b"".join(unmark(io.BytesIO(data)))


def labels(data: bytes) -> Labels:
    found = read_labels(io.BytesIO(data))
    assert found is not None
    return found


def frames(data: bytes) -> list[bytes]:
    with Image.open(io.BytesIO(data)) as image:
        return [_frame(image, number) for number in range(getattr(image, "n_frames", 1))]


def _frame(image: Image.Image, number: int) -> bytes:
    image.seek(number)
    return image.convert("RGBA").tobytes()


def rest(data: bytes) -> dict[str, Any]:
    """What else Pillow finds in a file."""
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        return {name: value for name, value in image.info.items() if "xmp" not in name} | {"size": image.size}


EXIF = Image.Exif()
EXIF[0x9286] = b"\xff\xd9\xff\xe1 a comment"

VARIANTS: list[tuple[str, str, dict[str, Any]]] = [
    *[("PNG", mode, {}) for mode in ("1", "L", "LA", "P", "RGB", "RGBA")],
    ("PNG", "RGB", {"icc_profile": b"p" * 3000, "exif": EXIF.tobytes(), "dpi": (72, 72)}),
    ("PNG", "RGBA", {"save_all": True}),
    *[("JPEG", mode, {}) for mode in ("L", "RGB", "CMYK")],
    ("JPEG", "RGB", {"progressive": True, "comment": b"\xff\xd9 no end", "exif": EXIF.tobytes()}),
    ("JPEG", "RGB", {"icc_profile": b"p" * 200_000, "exif": EXIF.tobytes()}),
    *[("WEBP", mode, {"lossless": lossless}) for mode in ("RGB", "RGBA") for lossless in (False, True)],
    ("WEBP", "RGB", {"exif": EXIF.tobytes(), "icc_profile": b"p" * 3001}),
    ("WEBP", "RGBA", {"save_all": True}),
]


@settings(max_examples=60, deadline=None)
@given(
    variant=st.sampled_from(VARIANTS),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    theirs=st.sampled_from([None, THEIRS, THEIRS + b" " * 2001]),
    prompt=st.none() | st.text(max_size=300),
    tail=st.sampled_from([b"", b"\0" * 7, b"a second picture"]),
)
def test_marking_changes_nothing_else(
    variant: tuple[str, str, dict[str, Any]],
    size: tuple[int, int],
    theirs: bytes | None,
    prompt: str | None,
    tail: bytes,
) -> None:
    """Pixels, profiles, camera data and what follows are as before; without the mark, every byte is."""
    form, mode, options = variant
    data = noisy(form, mode, size, **options, **({"xmp": theirs} if theirs else {})) + tail
    said = Statement(SAID.model, SAID.request_hash, SAID.source_sha256, prompt)
    result = marked(data, said)
    assert frames(result) == frames(data)
    assert rest(result) == rest(data)
    assert result.endswith(tail)
    found = labels(result)
    assert (found.request_hash, found.source_sha256) == (SAID.request_hash, SAID.source_sha256)
    assert found.marks[0] == "xmp"
    assert "prompt" in found.marks or not (prompt or "").strip()
    assert labels(data).marks == ()
    assert unmarked(result) == data
    assert unmarked(data) == data
    assert marked(data, said) == result


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_pillow_finds_the_packet(form: str) -> None:
    """The packet is where others look for it, and says what it must."""
    with Image.open(io.BytesIO(marked(noisy(form)))) as image:
        xmp = image.info["xmp"]
    packet = Packet(xmp)
    assert packet["Iptc4xmpExt:DigitalSourceType"] == GENERATED
    assert packet["xmp:CreatorTool"] == packet["Iptc4xmpExt:AISystemUsed"] == "gpt-image-2"
    assert packet["xmpMM:DerivedFrom"] == "sha256:" + "cd" * 32
    assert not packet.tells_prompt
    said = Statement(SAID.model, SAID.request_hash, SAID.source_sha256, 'a <b> & "Zoë"\0')
    told = labels(marked(noisy(form), said))
    assert told.marks == ("xmp", "prompt")
    assert Packet(told.xmp or b"")["Iptc4xmpExt:AIPromptInformation"] == 'a <b> & "Zoë"\ufffd'


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("own", [True, False])
def test_what_a_packet_says_is_kept(form: str, own: bool) -> None:
    """A packet of the file's own, or of the image that it was made of, is added to."""
    data = noisy(form, **({"xmp": THEIRS} if own else {}))
    packet = labels(marked(data, packet=None if own else THEIRS)).xmp or b""
    said = Packet(packet)
    assert said["xmp:CreatorTool"] == "An editor 9"
    assert said.properties["http://purl.org/dc/elements/1.1/rights"] == "Zoë"
    assert said.generated
    added = packet.index(b"<rdf:Description xmlns:ttapi")
    assert THEIRS.startswith(packet[:added])
    assert THEIRS.endswith(packet[packet.index(b"</rdf:Description>\n") + 19 :])


def test_what_must_come_first_in_a_jpeg_does() -> None:
    """The packet's segment is right behind those of JFIF and Exif, before a colour profile."""
    data = marked(noisy("JPEG", exif=EXIF.tobytes(), icc_profile=b"p" * 99))
    places = [
        data.index(name) for name in (b"JFIF", b"Exif", b"http://ns.adobe.com/xap/1.0/", b"ICC_PROFILE")
    ]
    assert places == sorted(places)


def test_a_packed_packet_is_read() -> None:
    """PNG may hold the packet deflated."""
    data = noisy("PNG", xmp=THEIRS, zip=True)
    assert labels(data).xmp == THEIRS
    assert "xmp" in labels(marked(data)).marks


def test_a_jpegs_extended_packet_is_read() -> None:
    """What does not fit into one segment is in others, in any order, under the name that the first one gives."""
    guid, more = "0123456789ABCDEF" * 2, Packet(EMPTY).with_statement(SAID)
    first = THEIRS.replace(
        b"x:Rating", f'n:HasExtendedXMP="{guid}" xmlns:n="http://ns.adobe.com/xmp/note/" x:Rating'.encode()
    )
    data = noisy("JPEG", xmp=first)
    pieces = [
        b"http://ns.adobe.com/xmp/extension/\0"
        + guid.encode()
        + struct.pack(">II", len(more), at)
        + more[at : at + 500]
        for at in (500, 0, 1000)
    ]
    segments = b"".join(b"\xff\xe1" + struct.pack(">H", len(piece) + 2) + piece for piece in pieces)
    assert 1000 < len(more) <= 1500
    assert "xmp" in labels(data[:2] + segments + data[2:]).marks
    assert "xmp" not in labels(data[:2] + segments.replace(guid.encode(), b"F" * 32) + data[2:]).marks


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_content_credentials_are_found(form: str) -> None:
    """A whole manifest store counts, in one piece or several; one that is cut short, or of another kind, doesn't."""
    data = noisy(form)
    for size in (100, 3_000, 200_000):
        whole = with_credentials(data, manifest_store(size))
        assert labels(whole).marks == ("credentials",)
        assert frames(whole) == frames(data)
    store = manifest_store(3_000)
    for damaged in (store[:-1], store[:30], b"", store.replace(b"c2pa\0\x11", b"json\0\x11"), b"\0" * 400):
        assert labels(with_credentials(data, damaged)).marks == ()
    assert labels(marked(with_credentials(data, store))).marks == ("credentials", "xmp")


HUGE = EMPTY + b" " * 50_000_000


@pytest.mark.parametrize(
    ("packet", "why"),
    [
        (b"", "can't be read: no element found"),
        (b"<x", "can't be read"),
        (b'<!DOCTYPE x [<!ENTITY e "entity">]><x>&e;</x>', "it has a document type"),
        (EMPTY.decode().encode("utf-16"), "can't be read|no place for properties"),
        (EMPTY.replace(b"</rdf:RDF>", b""), "mismatched tag"),
        (b"<x/>", "no place for properties"),
        (b"<a>" * 20_000, "no element found|unclosed"),
        (b"\xff" * 9, "not well-formed"),
    ],
)
def test_a_packet_that_is_no_use_is_refused(packet: bytes, why: str) -> None:
    """Nothing is added to what can't be read, nothing is read of it, and nothing stumbles over it."""
    with pytest.raises(PictureError, match=why):
        Packet(packet).with_statement(SAID)
    plain = noisy("WEBP")
    chunk = b"XMP " + struct.pack("<I", len(packet)) + packet + bytes(len(packet) % 2)
    data = plain[:4] + struct.pack("<I", len(plain) - 8 + len(chunk)) + plain[8:] + chunk
    assert labels(data) == Labels(xmp=labels(data).xmp)
    with pytest.raises(PictureError, match=why):
        marked(data)
    assert unmarked(data) == data


def test_another_source_is_not_said_twice() -> None:
    """A packet that says that a camera made the picture is not overruled, nor contradicted."""
    camera = Packet(EMPTY).with_statement(SAID).replace(b"trainedAlgorithmicMedia", b"digitalCapture")
    data = noisy("PNG", xmp=camera)
    assert labels(data).marks == ()
    with pytest.raises(PictureError, match=r"its source type is 'http://cv\.iptc.*digitalCapture'"):
        marked(data)


def test_what_is_read_has_a_limit() -> None:
    """50 MB of XMP, plain or deflated, take no memory, and are an error only where something is to be added."""
    packed = zlib.compress(HUGE, 1)
    head = b"XML:com.adobe.xmp\0"
    for text in (head + b"\0\0\0\0" + HUGE, head + b"\1\0\0\0" + packed):
        data = io.BytesIO(png_of(1, 1, zlib.compress(bytes(4)), iTXt=text))
        tracemalloc.start()
        try:
            assert read_labels(data) == Labels()
            assert tracemalloc.get_traced_memory()[1] < 8_000_000
        finally:
            tracemalloc.stop()
        with pytest.raises(PictureError, match="too large"):
            mark(data, SAID)


def test_a_webps_header_says_what_is_in_the_file() -> None:
    """A file without a header of that kind gets one: the packet, transparency where there is any, and the sides."""
    for mode, flags in (("RGB", 0x04), ("RGBA", 0x14)):
        head = marked(noisy("WEBP", mode, (40, 30), lossless=True))[12:30]
        assert head == b"VP8X" + struct.pack("<II", 10, flags) + b"\x27\0\0\x1d\0\0"
    plain = noisy("WEBP", exif=EXIF.tobytes())
    assert (plain[20], marked(plain)[20]) == (0x08, 0x0C)


def test_a_webp_without_padding_at_its_end() -> None:
    """Some encoders leave it out; the packet still begins where chunks do."""
    exif = EXIF.tobytes()
    padded = noisy("WEBP", exif=exif + bytes(1 - len(exif) % 2))
    data = padded[:4] + struct.pack("<I", len(padded) - 9) + padded[8:-1]
    assert labels(marked(data)).marks == ("xmp",)
    assert (frames(marked(data)), rest(marked(data))) == (frames(padded), rest(padded))


def test_a_jpeg_has_room_for_64_kilobytes() -> None:
    """A longer prompt is cut, whatever its characters; another's packet that leaves no room is an error."""
    said = Statement(SAID.model, SAID.request_hash, SAID.source_sha256, "\U0001f409" * 32_000)
    assert "xmp" in labels(marked(noisy("JPEG"), said)).marks
    with pytest.raises(PictureError, match="more than a JPEG has room for"):
        marked(noisy("JPEG"), packet=THEIRS + b" " * 65_000)


class Endless(io.RawIOBase):
    """A PNG of 128 MiB, of which nothing is kept."""

    HEAD = png_of(1, 1)[:33] + struct.pack(">I4s", 128 * 1024 * 1024, b"IDAT")

    def __init__(self) -> None:
        self._at = 0

    def seek(self, offset: int, whence: int = 0) -> int:
        assert whence == 0
        self._at = offset
        return offset

    def read(self, size: int = -1) -> bytes:
        left = len(self.HEAD) + 128 * 1024 * 1024 + 4 - self._at
        size = max(0, min(size, left))
        data = (self.HEAD[self._at :] + bytes(size))[:size]
        self._at += size
        return data


def test_a_large_image_streams() -> None:
    """128 MiB pass through in pieces."""
    tracemalloc.start()
    try:
        total = sum(map(len, mark(Endless(), SAID)))  # type: ignore[arg-type]
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()
    assert total > 128 * 1024 * 1024


@pytest.mark.parametrize("form", ["GIF", "BMP"])
def test_other_kinds_are_told_apart(form: str) -> None:
    """Of other kinds nothing is known, and they can't be marked."""
    assert read_labels(io.BytesIO(noisy(form))) is None
    with pytest.raises(PictureError, match="neither PNG nor JPEG nor WebP"):
        marked(noisy(form))
    assert unmarked(noisy(form)) == noisy(form)


def _damaged() -> Iterator[bytes]:
    chance = random.Random(7)  # noqa: S311 - no secret
    for form in ("PNG", "JPEG", "WEBP"):
        data = with_credentials(marked(noisy(form, size=(5, 4), xmp=THEIRS)), manifest_store(200))
        for _ in range(300):
            damaged = bytearray(data[: chance.randrange(13, len(data))])
            for _ in range(chance.randrange(4)):
                damaged[chance.randrange(12, len(damaged))] = chance.randrange(256)
            yield bytes(damaged)


def test_damaged_files_cost_nothing() -> None:
    """Whatever is cut off or changed: there are labels or none, and marking gives bytes or an error of ours."""
    for data in _damaged():
        labels(data)
        for work in (marked, unmarked):
            try:
                work(data)
            except ValueError:
                continue


def test_a_spool_can_be_marked() -> None:
    """A file on disk goes the same way as one in memory."""
    data = noisy("PNG", size=(300, 300))
    spool = Spool.of(mark(Spool.of([data]).open(), SAID))
    assert spool.read_bytes() == marked(data)
