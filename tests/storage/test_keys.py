"""Key templates: what they may say, what they make of values, and which keys can't live together."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta, timezone
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefect_ttapi.errors import KeyTemplateError
from prefect_ttapi.images.headers import EXTENSIONS
from prefect_ttapi.images.renditions import Rendition, Version, versions_of
from prefect_ttapi.requests import ImageRequest
from prefect_ttapi.results import StoredImage
from prefect_ttapi.storage.keys import (
    DEFAULT_KEY,
    LONGEST_SLUG,
    LONGEST_VALUE,
    NAMES,
    Keys,
    KeyTemplate,
    of_any_size,
    segment,
    slug,
)
from prefect_ttapi.storage.objects import LONGEST_KEY, TakenKeys, checked_key

REQUEST = ImageRequest(prompt="A lighthouse at dusk", model="gpt-image-2", n=2)
IMAGE = StoredImage(
    uri="s3://p/images/a.jpg",
    sha256="a",
    size_bytes=1,
    media_type="image/jpeg",
    width=1024,
    height=768,
    index=1,
)
WHEN = datetime(2031, 5, 4, 23, 30, tzinfo=UTC)
LEGAL = set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._~/=+-")


def keys_of(
    template: str,
    values: Mapping[str, object] | None = None,
    request: ImageRequest = REQUEST,
    **options: object,
) -> Keys:
    given = {"date": WHEN, "values": values or {}} | options
    return Keys(KeyTemplate(template, list(values or {})), request, **given)


def key_of(template: str, values: dict | None = None, version: Version = None, **options: object) -> str:
    return keys_of(template, values, **options).of(IMAGE, version)


def refused(template: str, *names: str) -> str:
    with pytest.raises(KeyTemplateError) as caught:
        KeyTemplate(template, names)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_default_names_image_and_request() -> None:
    """Slug, 12 digits of the hash, position and type: readable, and unique to the image."""
    assert key_of(DEFAULT_KEY) == f"a-lighthouse-at-dusk-{REQUEST.request_hash[:12]}-1.jpg"


def test_every_name_and_format_spec() -> None:
    """All names of the template, with specs as in Python; a date's slashes make folders."""
    assert (
        key_of("{date:%Y/%m/%d}/{model}/{size}/{index:03d}.{ext}")
        == "2031/05/04/gpt-image-2/1024x768/001.jpg"
    )
    assert (
        key_of("{batch}/{name}_{date}.{ext}", batch="May 2031")
        == "May-2031/a-lighthouse-at-dusk_2031-05-04.jpg"
    )
    assert key_of("{slug:.5}~{hash:.4}") == f"a-lig~{REQUEST.request_hash[:4]}"
    assert all(key_of(f"x{{{name}}}") for name in NAMES)


def test_dates_are_utc() -> None:
    """The same moment gives the same key, whatever time zone it comes in; without one it counts as UTC."""
    elsewhere = WHEN.astimezone(timezone(timedelta(hours=9)))
    for date in (WHEN, elsewhere, WHEN.replace(tzinfo=None)):
        assert key_of("{date:%Y-%m-%d-%H%M}", date=date) == "2031-05-04-2330"


def test_values_of_ones_own() -> None:
    """Columns of a prompts file are names too; numbers take numbers' specs; `name` and `slug` may be given."""
    assert key_of("{sku}/{price:.2f}.{ext}", {"sku": "AB-12_x", "price": 3.5}) == "AB-12_x/3.50.jpg"
    assert key_of("{name}.{ext}", {"name": "Hero"}) == "Hero.jpg"
    assert key_of("{name}.{ext}", {"name": "  "}) == "a-lighthouse-at-dusk.jpg"
    assert key_of("{slug}.{ext}", {"slug": "mine"}) == "mine.jpg"
    assert key_of("{shot:%B}", {"shot": WHEN}) == "May"


def test_facts_can_not_be_replaced() -> None:
    """A column that is called like one of the template's facts changes nothing of the fact."""
    assert key_of("{index}-{model}", {"index": "77", "model": "mine"}) == "1-gpt-image-2"


def test_values_are_data() -> None:
    """Whatever a value holds, it stays one part between two slashes, and never climbs."""
    assert key_of("a/{v}/b", {"v": "../../etc/passwd"}) == "a/etc-passwd/b"
    assert key_of("a/{v}", {"v": "x/y\\z\n{hash}"}) == "a/x-y-z-hash"
    assert key_of("{v:/>8}", {"v": "x"}) == "x"


@pytest.mark.parametrize(
    ("written", "names"),
    [
        ("{Category}", ["category"]),
        ("{category}", ["Category"]),
        ("{Product ID}", ["product_id"]),
        ("{product_id}", ["Product ID"]),
        ("{Body (HTML)}", ["body_html"]),
        ("{Nr.}", ["nr"]),
        ("{Größe}", ["größe"]),
        ("{category}", ["Category", "category"]),
    ],
)
def test_values_are_named_as_their_column_is(written: str, names: list[str]) -> None:
    """A template takes a column's name as it stands in the file, or as it is in lower case; exactly wins."""
    values = {name: f"of {name}" for name in names}
    exact = written[1:-1]
    wanted = exact if exact in values else names[0]
    assert key_of(f"{written}.{{ext}}", values) == f"of-{segment(wanted)}.jpg"
    assert KeyTemplate(written, names).needed == {wanted}


def test_names_that_may_mean_two_things_are_refused() -> None:
    """Two values, or a value and one of the template's own names, that are written nearly alike are told apart."""
    assert "{CATEGORY} may be 'Category' or 'category': write one of them as it is" in refused(
        "{CATEGORY}", "Category", "category"
    )
    assert "{Size} may be the template's own {size}" in refused("{Size}", "size")
    assert key_of("{Size}") == "1024x768"
    assert key_of("{Size}", {"Size": "M"}) == "M"
    assert key_of("{Name}", {"name": "mine"}) == "mine"


def test_a_value_without_its_extension() -> None:
    """`.stem` leaves out what files end in, and nothing else; it goes with paths and other specs."""
    for value, key in {
        "x.jpg": "x.png",
        "a.b.JPEG": "a.b.png",
        "v1.2": "v1.2.png",
        ".jpg": "jpg.png",
    }.items():
        assert keys_of("{f.stem}.{ext}", {"f": value}).planned()[0] == key.replace(".png", ".webp")
    assert key_of("{F.stem:.3}.{ext}", {"f": "abcdef.png"}) == "abc.jpg"
    assert key_of("{f.stem:path}.{ext}", {"f": "a/b.c/hero.jpg"}) == "a/b.c/hero.jpg"
    assert key_of("{f.stem}.{ext}", {"f": 7}) == "7.jpg"


def test_a_path_keeps_its_slashes_where_the_template_asks() -> None:
    """`:path` makes folders of a value's slashes, and of Windows' backslashes; the parts are as any value's."""
    assert key_of("{p:path}", {"p": "assets/img/hero.jpg"}) == "assets/img/hero.jpg"
    assert key_of("x/{p:path}", {"p": "my assets\\größe\\hero.jpg"}) == "x/my-assets/grosse/hero.jpg"
    assert key_of("{p}", {"p": "assets/img/hero.jpg"}) == "assets-img-hero.jpg"


@pytest.mark.parametrize(
    "value", ["../x", "a/../x", "a/./x", "/etc/x", "a//x", "a/", "a/ /x", "\\\\host\\x", "C:\\x", "a/.."]
)
def test_a_path_that_leads_elsewhere_is_refused(value: str) -> None:
    """No absolute path, no step up, no empty part: whatever the slashes."""
    with pytest.raises(KeyTemplateError, match=r"\{p:path\} can't be made of .* a relative path is needed"):
        key_of("{p:path}", {"p": value})


@pytest.mark.parametrize(
    ("template", "way"),
    [
        ("{f}", "{f.stem}.{ext}"),
        ("{f:path}", "{f.stem:path}.{ext}"),
        ("a/hero.{x}", "{x.stem}.{ext}"),
        ("a/hero.webp", ".{ext}"),
    ],
)
def test_an_extension_that_the_bytes_are_not_is_refused_before_paying(template: str, way: str) -> None:
    """What the request asks for is known before; the way out is told, and it works."""
    values = {"f": "x.webp", "x": "webp"}
    with pytest.raises(KeyTemplateError) as caught:
        keys_of(template, values).planned()
    assert str(caught.value).endswith(f".webp, but the image is image/png: end the key template in {way}")
    webp = ImageRequest(prompt="x", model="gpt-image-1", output_format="webp")
    assert keys_of(template, values, webp).planned()
    assert keys_of("{f.stem}.{ext}", values).planned()


@pytest.mark.parametrize(
    ("key", "fits"),
    [
        *[("x.jpg", True), ("x.JPEG", True), ("x.jfif", True), ("x.v2", True), ("x", True), ("x.bin", True)],
        *[("x.png", False), ("x.webp", False), ("x.tiff", False), ("x.gif", False), ("x.svg", False)],
    ],
)
def test_an_extension_that_the_bytes_are_not_is_found_on_delivery(key: str, fits: bool) -> None:
    """The image itself is a JPEG: only what says so, or says nothing of images, is its name."""
    if fits:
        assert key_of("{f}", {"f": key}) == key
    else:
        with pytest.raises(KeyTemplateError, match="but the image is image/jpeg"):
            key_of("{f}", {"f": key})


def test_a_rendition_is_judged_by_its_own_type() -> None:
    """The extension is to be that of the rendition, whatever the image is."""
    webp, jpeg = Rendition(format="webp"), Rendition(format="jpeg")
    for version in (webp, jpeg):
        keys = keys_of("{rendition}.webp", versions=[version])
        for judge in (keys.planned, partial(keys.of, IMAGE, version)):
            if version is webp:
                assert judge()
            else:
                with pytest.raises(KeyTemplateError, match="but the image is image/jpeg"):
                    judge()


@pytest.mark.parametrize("value", [None, float("nan")])
def test_a_null_value_is_told(value: object) -> None:
    """What pandas or a database has for nothing is no text "None" in a key."""
    with pytest.raises(KeyTemplateError, match="needs a value for 'sku', but it is null"):
        key_of("{sku}.{ext}", {"sku": value})


def test_values_that_do_not_fit_are_named() -> None:
    """A value that is missing or blank, or a spec that does not fit it, is an error that names it."""
    for values in ({}, {"sku": None}, {"sku": " "}):
        with pytest.raises(KeyTemplateError, match="needs a value for 'sku'"):
            Keys(KeyTemplate("{sku}.{ext}", ["sku"]), REQUEST, WHEN, values).of(IMAGE)
    with pytest.raises(KeyTemplateError, match=r"\{price:\.2f\} does not fit the value 'three'"):
        key_of("{price:.2f}", {"price": "three"})


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{slgu}.{ext}", "unknown name {slgu}; did you mean {slug}?"),
        ("{zzzz}", "unknown name {zzzz}; legal: name slug hash index ext model size date batch"),
        ("{slug.__class__}", "is no name"),
        ("{slug[0]}", "is no name"),
        ("{slug!r}", "{slug!r} is no name"),
        ("{}", "is no name"),
        ("{0}", "is no name"),
        ("{index:{slug}}", "too clever"),
        ("{index:0999999999d}", "too clever"),
        ("{slug:99999999}", "too clever"),
        ("{index:q}", "does not fit"),
        ("{slug:03d}", "does not fit"),
        ("{slug", "malformed"),
        ("slug}", "malformed"),
        ("/etc/{slug}", "it is absolute"),
        ("../{slug}", "'..'"),
        ("a/../{slug}", "'..'"),
        ("a//{slug}", "empty"),
        ("{slug}/", "empty"),
        ("", "it is empty"),
        ("a b/{slug}", "holds ' '"),
        ("größe/{slug}", "holds 'ö'"),
        ("a\n{slug}", r"holds '\n'"),
        ("{{slug}}", "holds '{'"),
        ("C:{slug}", "holds ':'"),
        ("x" * 251, "longer than 250"),
        ("/".join(["x" * 100] * 11), "1,024 bytes"),
    ],
)
def test_illegal_templates_are_refused_up_front(template: str, why: str) -> None:
    """What can't work, or is hostile, is refused before there is any request, in one line that says what it is."""
    assert why in refused(template)


def test_a_name_close_to_a_column_is_suggested() -> None:
    """The legal names include those of the values at hand."""
    assert "did you mean {product}?" in refused("{prodcut}", "product")
    assert "product" in refused("{zzzz}", "product")


def test_keys_are_known_before_paying() -> None:
    """The planned keys have placeholders for what only the answer tells, and one key for each image asked for."""
    first, second = keys_of("{slug}-{index}-{size}.{ext}").planned()
    assert first.startswith("a-lighthouse-at-dusk-0-")
    assert second == first.replace("-0-", "-1-", 1)
    first, second = keys_of("{slug}-{size}.{ext}").planned()
    assert first == second


def test_renditions_have_keys_of_their_own() -> None:
    """`{rendition}` is its name, `original` for the image; type and size are the rendition's."""
    thumb = Rendition(format="webp", max_size=256, name="thumb")
    keys = keys_of("{rendition}/{slug}-{index}-{size}.{ext}", versions=[None, thumb])
    assert keys.of(IMAGE, thumb) == "thumb/a-lighthouse-at-dusk-1-256x192.webp"
    assert keys.of(IMAGE) == "original/a-lighthouse-at-dusk-1-1024x768.jpg"
    assert [key.split("-at")[0] for key in keys.planned()] == [
        "original/a-lighthouse",
        "thumb/a-lighthouse",
    ] * 2


def test_a_template_travels() -> None:
    """Templates go to workers and compare by what they say."""
    template = KeyTemplate("{sku}", ["sku"])
    assert pickle.loads(pickle.dumps(template)) == template


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A Lighthouse, at dusk!", "a-lighthouse-at-dusk"),
        ("Crème brûlée №5", "creme-brulee-no5"),
        ("Straße nach Łódź", "strasse-nach-lodz"),
        ("ﬁne ½ print", "fine-1-2-print"),
        ("--a--b--", "a-b"),
    ],
)
def test_slugs_read_well(text: str, expected: str) -> None:
    """Latin letters keep their shape, everything between words is one dash."""
    assert slug(text) == expected


def test_slugs_of_other_scripts_stay_apart() -> None:
    """Texts in scripts without ASCII forms have different slugs, also where they share some ASCII words."""
    texts = ["灯台", "猫", "маяк", "منارة", "灯台 at dusk", "猫 at dusk", "🗼", "🐱", "", "!"]
    assert len({slug(text) for text in texts}) == len(texts)
    assert slug("猫 at dusk").startswith("at-dusk-")
    for one, other in (("🐱 at dusk", "🐶 at dusk"), ("∞ loops", "√ loops")):
        assert (slug(one) != slug(other), segment(one) != segment(other)) == (True, True)


@given(st.text())
def test_slugs_and_segments_are_safe(text: str) -> None:
    """Of any text: ASCII, bounded, not empty, no slash, nothing that climbs, and stable under repetition."""
    for made, longest in ((slug(text), LONGEST_SLUG), (segment(text), LONGEST_VALUE)):
        assert 1 <= len(made) <= longest
        assert set(made) <= LEGAL - {"/"}
        assert not made.startswith((".", "-"))
        assert not made.endswith((".", "-"))
    assert set(slug(text)) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
    assert segment(segment(text)) == segment(text)


PIECES = st.sampled_from(
    [
        *["{v}", "{w}", "{slug}", "{hash}", "{index}", "{index:02d}", "{ext}", "{size}", "{date:%Y/%m}"],
        *["/", "-", ".", "..", "~", "a", "B", "{name}", "{v:>9}", "{v:.2}"],
    ]
)
TEXTS = st.text(max_size=30) | st.sampled_from(["..", ".", "/", "a", "A", "a/b", "", "x.lock", "\x00"])


@given(st.lists(PIECES, min_size=1, max_size=8).map("".join), TEXTS, TEXTS, st.text(min_size=1, max_size=50))
def test_no_key_leads_outside(template: str, v: str, w: str, prompt: str) -> None:
    """Whatever template and values: a refusal of ours, or legal keys inside the store."""
    try:
        request = ImageRequest(prompt=prompt)
    except ValueError:
        return
    values = {"v": v, "w": w}
    try:
        made = keys_of(template, values, request)
        keys = [*made.planned(), made.of(IMAGE)]
    except KeyTemplateError:
        return
    for key in keys:
        assert set(key) <= LEGAL
        assert len(key) <= LONGEST_KEY
        assert checked_key(key) == key


IMAGES = st.builds(
    lambda media_type, size: {"media_type": media_type, "width": size[0], "height": size[1]},
    st.sampled_from([*EXTENSIONS]),
    st.sampled_from([(256, 256), (1024, 1024), (1536, 1024), (1024, 1792)]),
)
RENDITIONS = st.lists(
    st.sampled_from([Rendition(), Rendition(max_size=256), Rendition(format="jpeg", name="x-1")]),
    unique=True,
    max_size=3,
)


NAMED = ["{v}", "{w}", "{slug}", "{index}", "{index:02d}", "{ext}", "{size}", "{rendition}", "{v:.2}", "a"]
TEMPLATES = st.tuples(
    st.sampled_from(["-", "/", "."]), st.lists(st.sampled_from(NAMED), min_size=3, max_size=8)
)


@given(
    TEMPLATES.map(lambda parts: parts[0].join(parts[1])),
    st.lists(st.tuples(TEXTS, st.sampled_from(["a cat", "A cat!", "猫", "犬"]), IMAGES), max_size=3),
    RENDITIONS,
)
def test_no_collision_goes_unreported(
    template: str, given_rows: list[tuple[str, str, dict]], renditions: list[Rendition]
) -> None:
    """Keys that get along before paying get along as delivered, whatever type and size the images turn out to have."""
    taken, delivered = TakenKeys(), TakenKeys()
    versions = versions_of(renditions)
    for row, (v, prompt, facts) in enumerate(given_rows):
        request = ImageRequest(prompt=prompt, model="gpt-image-2", n=2, variant=str(row))
        values = {"v": v, "w": str(row)}
        try:
            made = keys_of(template, values, request, versions=versions)
            planned = made.planned()
        except KeyTemplateError:
            return
        if any(taken.take(key, f"{row} {number}", row) for number, key in enumerate(planned)):
            return
        images = [IMAGE.model_copy(update={**facts, "index": index}) for index in range(2)]
        keys = [made.of(image, version) for image in images for version in versions]
        for number, key in enumerate(keys):
            assert delivered.take(key, f"{row} {number}", row) is None


@pytest.mark.parametrize(
    ("template", "fields", "keys"),
    [
        ("{slug}.{ext}", {"model": "gpt-image-1", "output_format": "webp"}, ["a-cat.webp"]),
        ("{slug}.{ext}", {"model": "dall-e-2"}, ["a-cat.jpg", "a-cat.png", "a-cat.webp"]),
        ("{slug}.png", {"model": "dall-e-2"}, ["a-cat.png"]),
        ("{size}.{ext}", {"model": "gpt-image-1", "size": "1536x1024"}, ["1536x1024.png", "768x512.webp"]),
        (
            "{slug}-{index}.{ext}",
            {"model": "gpt-image-1", "n": 2},
            ["a-cat-0.png", "a-cat-0.webp", "a-cat-1.png", "a-cat-1.webp"],
        ),
    ],
)
def test_likely_keys_are_those_of_what_is_asked_for(
    template: str, fields: dict[str, object], keys: list[str]
) -> None:
    """Types and sizes are those of the request; where the model chooses the type, each that it may choose counts."""
    request = ImageRequest(prompt="a cat", **fields)
    versions = [None] if fields["model"] == "dall-e-2" or len(keys) == 1 else [None, Rendition(max_size=768)]
    likely = keys_of(template, request=request, versions=versions).likely()
    assert likely == keys
    assert not any(map(of_any_size, likely))


def test_a_size_that_nobody_knows_yet_may_be_any() -> None:
    request = ImageRequest(prompt="a cat", model="gpt-image-1")
    (likely,) = keys_of("{slug}-{size}-10x10.{ext}", request=request).likely()
    beginning, pattern = of_any_size(likely)
    assert beginning == "a-cat-"
    assert pattern.fullmatch("a-cat-1024x1536-10x10.png")
    assert not pattern.fullmatch("a-cat-1024x1536-20x20.png")
