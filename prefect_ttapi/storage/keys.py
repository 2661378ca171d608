"""Templates for the keys of delivered images: `{date:%Y/%m/%d}/{slug}-{hash}-{index}.{ext}`."""

from __future__ import annotations

import difflib
import hashlib
import math
import re
import string
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from functools import cached_property, lru_cache
from pathlib import PurePosixPath
from typing import Any, Final

from prefect_ttapi.capabilities import RULES
from prefect_ttapi.errors import KeyTemplateError, StoreError
from prefect_ttapi.images.headers import EXTENSIONS, PROMISED
from prefect_ttapi.images.renditions import ORIGINAL, Version
from prefect_ttapi.requests import ImageRequest
from prefect_ttapi.results import StoredImage
from prefect_ttapi.storage.objects import checked_key

DEFAULT_KEY: Final = "{slug}-{hash}-{index}.{ext}"

#: The template's own names, with an example of each: specs are tried on it.
_EXAMPLES: Final[Mapping[str, object]] = {
    "name": "a-lighthouse",
    "slug": "a-lighthouse",
    "hash": "725f7723f7ec",
    "index": 0,
    "ext": "webp",
    "model": "gpt-image-2",
    "size": "100000x100000",
    "date": datetime(2031, 5, 4, tzinfo=UTC),
    "batch": "batch",
    "rendition": "webp-1024",
}
NAMES: Final = tuple(_EXAMPLES)

#: Stand in a key for what only the answer will tell.
_ANY_SIZE: Final = str(_EXAMPLES["size"])
_ANY_EXTENSION: Final = str(_EXAMPLES["ext"])

#: Names that `values` may give another meaning; the others are facts.
_YOURS: Final = frozenset({"name", "slug"})

_NAMES_ONLY: Final = "a key template takes names and format specs only"

_ILLEGAL: Final = re.compile("[^A-Za-z0-9._~/=+-]")
#: File systems take 255, and beside an image in a folder is a file of its name and `.json`.
_LONGEST_SEGMENT: Final = 250
_WIDEST: Final = 200

#: What an extension says of the bytes under it; of an empty type there are no images here.
_SAYS: Final[Mapping[str, str]] = {
    **dict.fromkeys(
        ("apng", "avif", "bmp", "gif", "heic", "heif", "ico", "jxl", "psd", "svg", "tif", "tiff"), ""
    ),
    **{extension: media_type for media_type, extension in EXTENSIONS.items()},
    **dict.fromkeys(("jpeg", "jpe", "jfif"), "image/jpeg"),
}

#: An extension as files have it, which `.stem` leaves out; not the end of `v1.2`.
_EXTENSION: Final = re.compile(r"(?<=[^/.])\.[A-Za-z][A-Za-z0-9]{0,4}\s*$")

#: Characters of a slug and of any other value in a key.
LONGEST_SLUG: Final = 60
LONGEST_VALUE: Final = 120

#: Latin letters that Unicode does not take apart.
_LETTERS: Final = str.maketrans(
    {"ß": "ss", "æ": "ae", "Æ": "AE", "œ": "oe", "Œ": "OE", "ø": "o", "Ø": "O", "ł": "l", "Ł": "L"}
    | {"đ": "d", "Đ": "D", "ð": "d", "Ð": "D", "þ": "th", "Þ": "TH", "ı": "i", "ħ": "h", "Ħ": "H"}
)


@dataclass(frozen=True)
class _Field:
    """A piece of a template: literal text, then a name with its format spec, or none; `stem`: without an extension."""

    text: str
    name: str | None = None
    spec: str = ""
    stem: bool = False


@dataclass(frozen=True)
class KeyTemplate:
    """A template over `name slug hash index ext model size date batch rendition` and the names of `values`.

    Format specs are as in Python: `{index:03d}`, `{date:%Y/%m/%d}`. `hash` has the first 12 digits of the request's
    hash, `index` counts its images from 0, `size` is as delivered (`1024x1024`), `name` is the value of that name if
    there is one, else the prompt's slug, `rendition` is `original` for the image itself. Values are data: what no key
    may hold becomes a dash, slashes too. Only the template makes folders: by its slashes, a date's spec, or
    `{image_path:path}`, which keeps a value's slashes. `{filename.stem}` leaves out an extension. Values can be
    named as they are, or nearly so: `{Product ID}` for `product_id`.

    Args:
        template: the keys' pattern.
        names: the names of the values that each request comes with.

    >>> template = KeyTemplate("{campaign}/{slug}.{ext}", ["campaign"])
    >>> Keys(template, ImageRequest(prompt="A cat"), datetime.now(), {"campaign": "May/June"}).planned()
    ['May-June/a-cat.webp']

    Raises:
        KeyTemplateError: unknown or ambiguous name, bad spec, attribute or index access, a key outside the store.
    """

    template: str
    names: Iterable[str] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(self.names))
        for piece in self._pieces:
            if piece.name in _EXAMPLES:
                _filled(piece, _EXAMPLES)
        # a value's own spec is tried on the values; a folder or a step outside shows with any value
        self._checked("".join(p.text + ("x" if p.name else "") for p in self._pieces))

    @property
    def needed(self) -> frozenset[str]:
        """Return the names of values without which there is no key."""
        return frozenset(piece.name for piece in self._pieces if piece.name and piece.name not in _EXAMPLES)

    @cached_property
    def _pieces(self) -> tuple[_Field, ...]:
        try:
            parsed = list(string.Formatter().parse(self.template))
        except ValueError as error:
            raise KeyTemplateError(f"the key template {self.template!r} is malformed: {error}") from None
        return tuple(_piece(tuple(self.names), *part) for part in parsed)

    def rendered(self, facts: Mapping[str, Any], media_type: str) -> str:
        """Return the key that the facts make, of an image of this type.

        Raises:
            KeyTemplateError: a value doesn't fit, or the key's extension is that of another type.
        """
        key = self._checked("".join(_filled(piece, facts) for piece in self._pieces))
        last = self._pieces[-1]
        extension = PurePosixPath(key).suffix[1:]
        if last.name != "ext" and _SAYS.get(extension.lower(), media_type) != media_type:
            spec = ":path" if last.spec == "path" else ""
            way = f"{{{last.name}.stem{spec}}}.{{ext}}" if last.name else ".{ext}"
            raise KeyTemplateError(
                f"its key {key} ends in .{extension}, but the image is {media_type}: end the key template in {way}"
            )
        return key

    def _checked(self, key: str) -> str:
        if illegal := _ILLEGAL.search(key):
            raise KeyTemplateError(
                f"the key template {self.template!r} holds {illegal[0]!r}; keys may hold A-Za-z0-9._~/=+- only"
            )
        try:
            checked_key(key)
        except StoreError as error:
            raise KeyTemplateError(f"the key template {self.template!r} is illegal: {error}") from None
        if any(len(part) > _LONGEST_SEGMENT for part in key.split("/")):
            raise KeyTemplateError(
                f"the key template {self.template!r} makes a name longer than {_LONGEST_SEGMENT} characters"
            )
        return key


@dataclass(frozen=True)
class Keys:
    """The keys of one request's images.

    Attributes:
        template: a template that knows the names of `values`.
        request: the request.
        date: the time when the run was expected to start; in UTC unless it has a time zone.
        values: the request's own values, by name.
        batch: the batch's name.
        versions: the versions of each image that are delivered: renditions; None is the image itself.
        prompt: the text that `slug` is made of; by default the request's prompt.
    """

    template: KeyTemplate
    request: ImageRequest
    date: datetime
    values: Mapping[str, Any] = field(default_factory=dict)
    batch: str = "batch"
    versions: Sequence[Version] = (None,)
    prompt: str | None = None

    def planned(self) -> list[str]:
        """Return the keys of the images before they exist; for `ext` and `size` there are placeholders.

        Raises:
            KeyTemplateError: versions of an image would get one key, a value doesn't fit, or an extension is wrong.
        """
        asked_for = f"image/{self.request.output_format}"
        keys: list[str] = []
        for index in range(self.request.n):
            of_one_image = [
                self._key(index, version, asked_for, _ANY_SIZE, _ANY_EXTENSION) for version in self.versions
            ]
            if len({key.lower() for key in of_one_image}) < len(self.versions):
                raise KeyTemplateError(
                    f"the key template {self.template.template!r} gives versions of an image "
                    f"({', '.join(map(_name_of, self.versions))}) the same key but for {{ext}} and {{size}}: "
                    "add {rendition}"
                )
            keys += of_one_image
        return keys

    def likely(self) -> list[str]:
        """Return the keys that the images will have if they come as they were asked for.

        Where the model chooses the type, there is one for each type; where it chooses the size, see `of_any_size`.
        """
        width, _, height = self.request.size.partition("x")
        chosen = "output_format" in RULES[self.request.model]
        types = [f"image/{self.request.output_format}"] if chosen else sorted(PROMISED)
        keys: dict[str, None] = {}
        for index in range(self.request.n):
            for version in self.versions:
                size = _size_of(version, int(width), int(height)) if height else _ANY_SIZE
                for media_type in [version.media_type] if version else types:
                    with suppress(KeyTemplateError):  # a key that says another type
                        keys[self._key(index, version, media_type, size)] = None
        return list(keys)

    def of(self, image: StoredImage, version: Version = None) -> str:
        """Return the key of one image, or of a rendition of it.

        Raises:
            KeyTemplateError: a value doesn't fit, or the key's extension is not that of the bytes.
        """
        return self._key(image.index, version, image.media_type, _size_of(version, image.width, image.height))

    def _key(self, index: int, version: Version, image_type: str, size: str, ext: str | None = None) -> str:
        media_type = version.media_type if version else image_type
        known = {
            "index": index,
            "ext": ext or EXTENSIONS[media_type],
            "size": size,
            "rendition": _name_of(version),
        }
        return self.template.rendered({**self._facts, **known}, media_type)

    @cached_property
    def _facts(self) -> dict[str, Any]:
        yours = {
            name: value
            for name, value in self.values.items()
            if name not in _EXAMPLES or (name in _YOURS and not is_blank(value))
        }
        slugged = slug(self.request.prompt if self.prompt is None else self.prompt)
        return {
            "slug": slugged,
            "name": yours.get("slug", slugged),
            "hash": self.request.request_hash[:12],
            "model": self.request.model,
            "batch": self.batch,
            "date": _in_utc(self.date),
            **yours,
        }


def _name_of(version: Version) -> str:
    return version.name if version else ORIGINAL


def _size_of(version: Version, width: int, height: int) -> str:
    if version:
        width, height = version.size_of(width, height)
    return f"{width}x{height}"


def _in_utc(when: datetime) -> datetime:
    return when.replace(tzinfo=UTC) if when.tzinfo is None else when.astimezone(UTC)


def beginning_of(template: str, *, date: datetime, batch: str) -> str:
    """Return the beginning that all keys of a batch share, whatever the values of its requests are.

    >>> beginning_of("shop/{date:%Y/%m}/{slug}.{ext}", date=datetime(2031, 5, 4), batch="batch")
    'shop/2031/05/'
    """
    known = {"date": _in_utc(date), "batch": batch}
    beginning = ""
    for text, name, spec, _ in string.Formatter().parse(template):
        if name is not None and name not in known:
            return beginning + text
        beginning += _filled(_Field(text, name, spec or ""), known)
    return beginning


def of_any_size(key: str) -> tuple[str, re.Pattern[str]] | None:
    """Return the beginning and the pattern of a likely key whose size is not known yet; None for other keys.

    >>> _, pattern = of_any_size("a-100000x100000.png")
    >>> pattern.fullmatch("a-1024x1536.png") is not None, of_any_size("a.png")
    (True, None)
    """
    parts = key.split(_ANY_SIZE)
    return (parts[0], re.compile("[0-9]+x[0-9]+".join(map(re.escape, parts)))) if len(parts) > 1 else None


def slug(text: str) -> str:
    """Return lower-case words of `text` with dashes between them, at most 60 characters.

    If letters or symbols have no ASCII form, 8 digits of the text's hash are added, so that two texts stay two.

    >>> slug("A watercolour of Zoë's café"), slug("灯台"), slug("灯台 lighthouse")
    ('a-watercolour-of-zoe-s-cafe', 'f2df7bb7', 'lighthouse-8b3adf44')
    """
    kept, lossless = _ascii(text, "A-Za-z0-9")
    words = kept.lower()
    # cut between words where there is one in the second half
    cut = words[: LONGEST_SLUG - 9]
    if len(words) > len(cut):
        cut = cut[: cut.rfind("-")] if "-" in cut[len(cut) // 2 :] else cut
    return _joined(cut, text, lossless)


def segment(text: str) -> str:
    """Return `text` as one part of a key between slashes, at most 120 characters.

    `A-Za-z0-9._~=+-` stay as they are. Runs of anything else, slashes too, become a dash. As in `slug`, a
    hash is added where letters were lost, and also where the text was cut.

    >>> segment("SKU_12/b v1.2"), segment("../etc"), segment("Größe L")
    ('SKU_12-b-v1.2', 'etc', 'Grosse-L')
    """
    kept, lossless = _ascii(text, "A-Za-z0-9._~=+")
    cut = kept[: LONGEST_VALUE - 9]
    return _joined(cut, text, lossless and cut == kept)


def _ascii(text: str, legal: str) -> tuple[str, bool]:
    """Return the legal characters of `text` with dashes between them, and whether no letter or digit was lost."""
    apart = unicodedata.normalize("NFKD", text.translate(_LETTERS))
    parts = "".join(part for part in apart if not unicodedata.combining(part))
    # fractions are taken apart with a slash of their own
    lost = (sign for sign in parts.replace("\u2044", "/") if not sign.isascii())
    lossless = not any(sign.isalnum() or unicodedata.category(sign).startswith("S") for sign in lost)
    return re.sub(f"[^{legal}]+", "-", parts).strip("-."), lossless


def _joined(kept: str, text: str, whole: bool) -> str:
    """Return `kept`, with a hash of the whole text if a part of it was lost."""
    if kept and whole:
        return kept
    digits = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:8]
    return f"{kept.rstrip('-.')}-{digits}" if kept else digits


def is_null(value: object) -> bool:
    """Return whether there is no value: None, or the NaN that pandas has in its place."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def is_blank(value: object) -> bool:
    """Return whether there is no value, or only blanks."""
    return is_null(value) or not str(value).strip()


def _piece(
    names: tuple[str, ...], text: str, written: str | None, spec: str | None, conversion: str | None
) -> _Field:
    if written is None:
        return _Field(text)
    if conversion:
        raise KeyTemplateError(f"{{{written}!{conversion}}} is no name: {_NAMES_ONLY}")
    if "{" in (spec or "") or any(int(width) > _WIDEST for width in re.findall(r"[0-9]+", spec or "")):
        raise KeyTemplateError(f"the format spec of {{{written}:{spec}}} is too clever for a key template")
    bare = written.removesuffix(".stem")
    return _Field(text, _meant(bare, names), spec or "", stem=bare != written)


def _meant(written: str, names: tuple[str, ...]) -> str:
    """Return which of the template's names, or of the values' `names`, is written here, exactly or nearly so."""
    legal = [*NAMES, *(name for name in names if name not in _EXAMPLES)]
    if written in legal:
        return written
    plain = plain_name(written)
    known = [*NAMES, *(name for name in names if name not in _YOURS)]  # a fact's name may be a value's, too
    found = [name for name in known if plain and plain_name(str(name)) == plain]
    if len(found) == 1:
        return found[0]
    if not found and not written.isidentifier():
        raise KeyTemplateError(f"{{{written}}} is no name: {_NAMES_ONLY}")
    if not found:
        near = difflib.get_close_matches(written, legal, n=1, cutoff=0.5)
        hint = f"did you mean {{{near[0]}}}?" if near else "legal: " + " ".join(legal)
        raise KeyTemplateError(f"the key template has an unknown name {{{written}}}; {hint}")
    if len(set(found)) == 1:
        raise KeyTemplateError(
            f"{{{written}}} may be the template's own {{{found[0]}}}, which is written so, or the value of that name, "
            "which needs another name to be used in a key"
        )
    raise KeyTemplateError(
        f"{{{written}}} may be {' or '.join(map(repr, found))}: write one of them as it is"
    )


@lru_cache(4096)
def plain_name(name: str) -> str:
    """Return a column's name as key templates use it: an identifier, or empty where none can be made.

    >>> plain_name(" Product-ID (new)"), plain_name("Größe"), plain_name("2nd line"), plain_name("#")
    ('product_id_new', 'größe', '_2nd_line', '')
    """
    lower = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).lower())
    signs = "".join(sign if f"_{sign}".isidentifier() else "_" for sign in lower)
    plain = re.sub("_+", "_", signs).strip("_")
    return plain if not plain or plain.isidentifier() else f"_{plain}"


def _filled(piece: _Field, facts: Mapping[str, Any]) -> str:
    if piece.name is None:
        return piece.text
    value = facts.get(piece.name)
    if is_blank(value):
        what = "null" if is_null(value) and piece.name in facts else "missing or blank"
        raise KeyTemplateError(f"the key template needs a value for {piece.name!r}, but it is {what}")
    if piece.stem:
        value = _EXTENSION.sub("", str(value))
    if piece.spec == "path":
        return piece.text + "/".join(map(segment, _path(piece.name, str(value))))
    is_date = isinstance(value, date)
    try:
        formatted = format(value, piece.spec or ("%Y-%m-%d" if is_date else ""))
    except (ValueError, TypeError) as error:
        raise KeyTemplateError(
            f"{{{piece.name}:{piece.spec}}} does not fit the value {str(value)[:40]!r}: {error}"
        ) from None
    # a date's slashes are its spec's, hence the template's; any other value's are data
    parts = formatted.split("/") if is_date else [formatted]
    return piece.text + "/".join(map(segment, parts))


def _path(name: str, value: str) -> list[str]:
    """Return the parts between the slashes, or backslashes, of a value."""
    parts = value.replace("\\", "/").split("/")
    if any(part.strip() in ("", ".", "..") for part in parts) or re.match("[A-Za-z]:", value):
        raise KeyTemplateError(
            f"{{{name}:path}} can't be made of {value[:60]!r}: a relative path is needed, without '.', '..' or "
            "empty parts"
        )
    return parts
