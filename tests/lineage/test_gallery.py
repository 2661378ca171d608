"""The gallery's pages: whole in themselves, movable, and inert whatever the prompts say."""

from __future__ import annotations

import base64
import hashlib
import html.parser
import json
import re
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefect_ttapi.lineage.gallery import Gallery, ThumbnailPack
from prefect_ttapi.lineage.manifest import Row
from prefect_ttapi.results import DeliveredImage, StoredImage
from tests.support.rows import failed, generated, stored, totals_of

HOSTILE = [
    "</script><script>alert(1)</script>",
    "<!--<script>",
    "]]>&lt;&#60;\u2028\u2029",
    "$title ${data} $$",
    "\u202eright to left",
    "x" * 32_000,
]
TEXTS = st.sampled_from(HOSTILE) | st.text(min_size=1, max_size=80).filter(str.strip)


class Page(html.parser.HTMLParser):
    """A page's tags in order, its attributes, and the text of script, style and data."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.inside: dict[str, str] = {}
        self._in = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        self._in = dict(attrs).get("type") or tag

    def handle_endtag(self, tag: str) -> None:  # noqa: ARG002 - its caller names it
        self._in = ""

    def handle_data(self, data: str) -> None:
        self.inside[self._in] = self.inside.get(self._in, "") + data

    @property
    def data(self) -> dict[str, Any]:
        made: dict[str, Any] = json.loads(self.inside["application/json"])
        return made

    @property
    def policy(self) -> str:
        return next(value for name, value in self.attributes if value.startswith("default-src"))


class Thumbnails(ThumbnailPack):
    """The same for every image; remembers which were asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def get(self, sha256: str) -> bytes:
        self.asked.append(sha256)
        return b"webp"


def gallery_of(rows: list[Row], store: str = "file:///out", **told: Any) -> Gallery:
    facts = {
        "title": "campaign",
        "totals": totals_of(rows),
        "thumbnails": Thumbnails(),
        "made": datetime(2031, 5, 20, 12, 30, tzinfo=UTC),
        "run_id": "5f0c1c1e",
        "run_url": "http://127.0.0.1:4200/runs/flow-run/5f0c1c1e",
        "folder_uri": f"{store}/batches/1",
        "store_uri": store,
    }
    return Gallery(**facts | told)


def gallery(rows: list[Row], **told: Any) -> dict[str, str]:
    return {name: "".join(pieces) for name, pieces in gallery_of(rows, **told).pages(rows)}


def shown(rows: list[Row], **told: Any) -> Page:
    return Page(gallery(rows, **told)["index.html"])


def image_of(image: StoredImage, delivered: tuple[DeliveredImage, ...] = (), **where: str) -> dict[str, Any]:
    row = generated().model_copy(update={"images": (image,), "delivered": delivered})
    made: dict[str, Any] = shown([row], **where).data["rows"][0]["images"][0]
    return made


@given(st.lists(TEXTS, min_size=1, max_size=4), TEXTS)
def test_nothing_from_outside_is_markup(texts: list[str], title: str) -> None:
    """Hostile prompts, titles, errors and values add no tag and no attribute, and arrive whole as data."""

    def batch(words: list[str]) -> list[Row]:
        return [
            row
            for n, text in enumerate(words)
            for row in (
                generated(2 * n, text, values={text[:9]: text}),
                failed(2 * n + 1, text, error=text, error_type=text[:20], maybe_paid=(text,)),
            )
        ]

    page, plain = shown(batch(texts), title=title), shown(batch(["plain"] * len(texts)), title="plain")
    assert page.tags == plain.tags
    assert [name for name, _ in page.attributes] == [name for name, _ in plain.attributes]
    assert [row["prompt"] for row in page.data["rows"][::2]] == texts
    assert [row["error"] for row in page.data["rows"][1::2]] == texts
    assert not re.search("[<>&\u2028\u2029\ud800-\udfff]", page.inside["application/json"])


def test_the_policy_allows_what_is_on_the_page_only() -> None:
    """Style and script are allowed by their hashes, images from beside the page or in it, and nothing else."""
    page = shown([generated(0)], run_url=None)
    for tag, directive in (("style", "style-src"), ("script", "script-src")):
        digest = base64.b64encode(hashlib.sha256(page.inside[tag].encode()).digest()).decode()
        assert f"{directive} 'sha256-{digest}';" in page.policy
    assert page.policy.startswith("default-src 'none';")
    assert "img-src 'self' file: data:;" in page.policy
    assert "unsafe" not in page.policy
    assert "http" not in page.policy


def test_no_external_requests() -> None:
    """No tag of the page names another host, and its script calls for nothing."""
    page = shown([generated(0)], run_url=None)
    addresses = [value for name, value in page.attributes if name in ("src", "href", "action", "data")]
    assert addresses == ["data:,", "./manifest.jsonl"]
    assert not re.search(
        r"fetch\(|XMLHttpRequest|import\(|innerHTML|insertAdjacentHTML|eval\(", page.inside["script"]
    )
    assert not re.search(r"url\(|@import", page.inside["style"])


@pytest.mark.parametrize("store", ["file:///out", "s3://bucket/pre_fix/a b"])
def test_links_are_relative_in_the_store(store: str) -> None:
    """Images of the same store are linked from the page's place, so that all can be moved together."""
    image = image_of(stored(uri=f"{store}/images/ab.png"), store=store)
    assert (image["href"], image["beside"]) == ("../../images/ab.png", True)


def test_links_leave_the_store_where_they_must() -> None:
    """Elsewhere a public address comes first; one that no browser can open is shown as text."""
    source = stored(uri="file:///out/images/a.png")
    uris = [
        ("file:///shop/a%20b.png", None),
        ("s3://shop/a.png", None),
        ("s3://shop/b.png", "https://cdn.example.com/b.png"),
        ("s3://shop/c.png", "javascript:alert(1)"),
        ("file:///out/site/d.png", "https://cdn.example.com/d.png"),
        ("file:///outer/e.png", None),
    ]
    copies = tuple(
        DeliveredImage(uri=uri, url=url, sha256=source.sha256, source_uri=source.uri) for uri, url in uris
    )
    assert [copy["href"] for copy in image_of(source, copies)["copies"]] == [
        "file:///shop/a%20b.png",
        None,
        "https://cdn.example.com/b.png",
        None,
        "../../site/d.png",
        "file:///outer/e.png",
    ]


@pytest.mark.parametrize(
    ("uri", "href"),
    [
        ("file:///out/batches/1/javascript:alert(1)", "./javascript:alert(1)"),
        ("javascript:alert(1)", None),
        ("s3://bucket/x?y#z", None),
    ],
)
def test_hostile_addresses(uri: str, href: str | None) -> None:
    """No address becomes a link that runs something."""
    assert image_of(stored(uri=uri))["href"] == href


def test_keys_of_s3_are_encoded_in_links() -> None:
    """A key may hold what means something in a URL; the link leads to the key."""
    image = image_of(stored(uri="s3://bucket/images/50% off?#1.png"), store="s3://bucket")
    assert image["href"] == "../../images/50%25%20off%3F%231.png"


def test_what_a_card_knows() -> None:
    """A card has the whole chain: prompt, what was asked, hash, sha256, tokens, runs, values, copies."""
    page = shown([generated(4, "a lighthouse", count=2, values={"sku": "7"}, task_run_id="t-1")])
    (row,) = page.data["rows"]
    assert row["asked"] == {"model": "gpt-image-2", "size": "1024x1024"}
    assert row["values"] == {"sku": "7"}
    assert row["hash"] == generated(4).request_hash
    assert row["origin"]["Answered"] == "2026-05-20 12:00:00 UTC"
    assert row["origin"]["Tokens"] == "4,169: 9 in, 4,160 out"
    assert row["origin"]["Paid in task run"] == "t-1"
    assert [image["sha256"] for image in row["images"]] == [f"{n:064x}" for n in (40, 41)]
    assert base64.b64decode(row["images"][0]["thumbnail"]) == b"webp"
    assert row["images"][1]["copies"][0]["uri"] == "file:///out/site/lighthouse-4-41.png"


def test_a_card_knows_its_marks() -> None:
    """What the file says of where it comes from is in the card's data, and in what all pages are searched by."""
    marked = [stored(n, marks=marks) for n, marks in enumerate([("credentials",), (), None])]
    rows = [generated(n, images=(image,)) for n, image in enumerate(marked * 200)]
    assert [row["images"][0]["marks"] for row in shown(rows[:3]).data["rows"]] == [["credentials"], [], None]
    search = Page(gallery(rows)["search.html"])
    assert [card[8] for card in search.data[:3]] == [["credentials"], [], None]


def test_an_illegal_item_is_shown_as_given() -> None:
    """A row that never was a request shows what was given for it."""
    item = {"prompt": "wide", "size": "9x9", "extra": {"a": [1]}}
    (row,) = shown([Row(row=0, status="failed", given=item, error="size: is '9x9'")]).data["rows"]
    assert row["prompt"] == "wide"
    assert row["asked"] == {"size": "9x9", "extra": "{'a': [1]}"}
    assert row["images"] == []


def test_an_empty_batch_has_a_page() -> None:
    """A batch of nothing has one page, which says so."""
    made = gallery([])
    assert list(made) == ["index.html"]
    assert "No requests." in made["index.html"]
    assert Page(made["index.html"]).data == {"rows": [], "pages": 1}


def test_a_batch_of_failures_has_a_page() -> None:
    """A batch without a single image has a card for each failure."""
    rows = [failed(0), failed(1, maybe_paid=("sent once",)), Row(row=2, status="skipped")]
    made = gallery(rows)["index.html"]
    assert [row["status"] for row in Page(made).data["rows"]] == ["failed", "failed", "skipped"]
    assert "3 requests: 2 failed, 1 never sent. 1 may have been paid for without giving images." in made


def test_a_big_batch_has_several_pages() -> None:
    """500 cards a page, each row's images in order also over the edge of a page, and links to all pages."""
    rows = [generated(n, count=3) for n in range(334)] + [failed(334)]
    made = gallery(rows)
    assert list(made) == ["index.html", "page-2.html", "page-3.html", "search.html"]
    search = Page(made.pop("search.html"))
    cards = [
        [
            (row["row"], image["index"])
            for row in Page(page).data["rows"]
            for image in row["images"] or [{"index": 0}]
        ]
        for page in made.values()
    ]
    assert [len(page) for page in cards] == [500, 500, 3]
    assert [card for page in cards for card in page] == [
        (row.row, image.index) for row in rows for image in row.images
    ] + [(334, 0)]
    assert all(Page(page).data["pages"] == 3 for page in made.values())
    assert [card[:3] for card in search.data][499:501] == [
        ["index.html", "166.1661", "generated"],
        ["page-2.html", "166.1662", "generated"],
    ]
    assert len(search.data) == 1_003
    assert (
        '<a href="./index.html">1</a><b aria-current=page>2</b><a href="./page-3.html">3</a>'
        in made["page-2.html"]
    )


def test_a_page_is_made_card_by_card() -> None:
    """No more is asked for than what is read, neither of this page nor of the next, so memory does not grow."""
    rows, thumbnails = [generated(n) for n in range(1_001)], Thumbnails()
    asked, made = thumbnails.asked, gallery_of(rows, thumbnails=thumbnails).pages(rows)
    for before in (0, 500):
        _, pieces = next(made)
        head = [next(pieces) for _ in range(3)]
        assert len(asked) == before + 1
        assert max(len(piece) for piece in [*head[1:], *list(pieces)[:-1]]) < 2_000
        assert len(asked) == before + 500


def test_the_head_tells_when_and_by_which_run() -> None:
    """Date and run stand at the head, the run as a link where a browser can open it, and as text elsewhere."""
    assert 'href="http://127.0.0.1:4200/runs/flow-run/5f0c1c1e"' in gallery([])["index.html"]
    assert "20 May 2031, 12:30 UTC" in gallery([])["index.html"]
    page = gallery([], run_id="<b>", run_url="javascript:alert(1)")["index.html"]
    assert "run &lt;b&gt;" in page
    assert "javascript:alert" not in page


@settings(max_examples=20)
@given(st.lists(TEXTS, min_size=2, max_size=4))
def test_nothing_from_outside_is_markup_in_what_is_searched(texts: list[str]) -> None:
    """Hostile prompts arrive as data there, too, cut to a few words, and the page may do nothing but answer."""
    rows = [generated(n, texts[n % len(texts)], values={"name": texts[0]}, count=2) for n in range(251)]
    page = Page(gallery(rows)["search.html"])
    assert page.tags.count("script") == 2
    assert [card[4] for card in page.data[:2]] == [texts[0][:160]] * 2
    assert not re.search("[<>&\u2028\u2029\ud800-\udfff]", page.inside["application/json"])
    digest = base64.b64encode(hashlib.sha256(page.inside["script"].encode()).digest()).decode()
    assert page.policy == f"default-src 'none'; script-src 'sha256-{digest}'; base-uri 'none'"


def test_pages_frame_only_where_there_are_several() -> None:
    """A single page may have no frame; of several, each may frame what lies beside it."""
    made = gallery([generated(n) for n in range(501)])
    assert "frame-src 'self' file:;" in Page(made["page-2.html"]).policy
    assert "frame-src" not in shown([generated(0)]).policy


def test_very_many_pages_have_a_short_pager() -> None:
    """Of 21 pages the first, the last and those around the current one are linked, above and below the cards."""
    rows = [generated(n, count=500) for n in range(21)]
    page = gallery(rows)["page-10.html"]
    nav = re.findall("<nav.*?</nav>", page)
    assert [re.findall(r">(\d+|&hellip;)<", each) for each in nav] == [
        ["1", "&hellip;", *map(str, range(7, 14)), "&hellip;", "21"]
    ] * 2
