"""What artifacts say: bounded, with the reasons of failures, and nothing from outside is markup."""

from __future__ import annotations

import html.parser
import io
import json
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefect_ttapi.images.renditions import thumbnail
from prefect_ttapi.lineage.manifest import Row
from prefect_ttapi.lineage.markdown import Picture, batch_markdown, delivery_markdown, image_table
from prefect_ttapi.lineage.report import BatchReport
from prefect_ttapi.lineage.shown import StoreLinks
from tests.support.rows import failed, generated, picture, stored, totals_of

HOSTILE = [
    "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "</td></tr></table><h1>broken</h1>",
    '" onmouseover="alert(1)',
    "a | b ``` code ``` **bold** [x](javascript:alert(1))",
    "one\n\n# two\n\n<b>three</b>",
    "\u202eright to left \u05e9\u05dc\u05d5\u05dd",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 " * 99,
    "javascript:alert(1)",
    "x" * 32_000,
]
PROMPTS = st.sampled_from(HOSTILE) | st.text(min_size=1, max_size=300).filter(str.strip)
WEBP = thumbnail(io.BytesIO(picture()))
ALLOWED = {"p", "br", "strong", "table", "thead", "tr", "th", "td", "a", "img", "span", "code"}


class Page(html.parser.HTMLParser):
    """The HTML of an artifact: its tags in order, its links, its pictures, its text."""

    def __init__(self, markdown: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.sources: list[str] = []
        self.names: set[str] = set()
        self.text = ""
        self.feed(markdown)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        values = dict(attrs)
        self.names |= values.keys()
        self.links += [values["href"] or ""] if "href" in values else []
        self.sources += [values["src"] or ""] if "src" in values else []

    def handle_data(self, data: str) -> None:
        self.text += data


def pictures(rows: list[Row], thumb: bytes | None = WEBP) -> Iterator[Picture]:
    return (Picture(row, image, thumb) for row in rows for image in row.images)


def report_of(rows: list[Row], **told: Any) -> BatchReport:
    facts = {
        "name": "campaign",
        "flow_run_id": "1",
        "totals": totals_of(rows),
        "manifest_uri": "file:///out/batches/1/manifest.jsonl",
        "gallery_uri": None,
        "seconds": 1.0,
    }
    return BatchReport(**facts | told)


def batch(rows: list[Row], thumb: bytes | None = WEBP) -> str:
    failures = (row for row in rows if row.status == "failed")
    report = report_of(rows, gallery_uri="https://cdn.example.com/index.html")
    return batch_markdown(report, failures, pictures(rows, thumb), StoreLinks())


def delivery(row: Row, links: StoreLinks) -> str:
    return delivery_markdown(row, list(pictures([row])), links, "req-1")


@settings(deadline=None)
@given(st.lists(PROMPTS, min_size=1, max_size=6), st.text(max_size=50))
def test_nothing_from_outside_is_markup(prompts: list[str], name: str) -> None:
    """Hostile prompts, errors, names and addresses add no tag, attribute or line to a batch's artifact."""
    rows = [generated(n, prompt) for n, prompt in enumerate(prompts)]
    rows += [
        failed(n, prompt, error=prompt, error_type=prompt[:20]) for n, prompt in enumerate(prompts, len(rows))
    ]
    plain = [row.model_copy(update={"request": generated().request}) for row in rows]
    made, expected = (
        batch_markdown(
            report_of(some, name=called),
            failures=some[len(prompts) :],
            pictures=pictures(some[: len(prompts)]),
            links=StoreLinks(),
        )
        for some, called in ((rows, name), (plain, "name"))
    )
    assert Page(made).tags == Page(expected).tags
    assert set(Page(made).tags) <= ALLOWED
    assert Page(made).names <= {"href", "src", "width", "dir", "alt", "valign", "cellpadding"}
    assert made.count("\n") == expected.count("\n")


@given(PROMPTS)
def test_nothing_from_outside_is_markup_in_a_delivery(prompt: str) -> None:
    """The same for a delivery's artifact."""
    row, plain = generated(0, prompt), generated(0)
    made, expected = (delivery(each, StoreLinks()) for each in (row, plain))
    assert Page(made).tags == Page(expected).tags
    assert set(Page(made).tags) <= ALLOWED
    assert made.count("\n") == expected.count("\n")


@pytest.mark.parametrize("uri", ["javascript:alert(1)", "data:text/html,<b>", 'file:///a"><b>'])
def test_hostile_addresses(uri: str) -> None:
    """An address that is none to link to is text; one with quotes in it stays in its attribute."""
    row = generated(0, delivered=(), images=(stored(uri=uri),))
    page = Page(batch([row]))
    assert set(page.tags) <= ALLOWED
    assert all(link.startswith(("file:", "https:")) for link in page.links)


def test_pictures_link_to_their_images() -> None:
    """Each thumbnail is a WebP inside the artifact and links to the image, rather a public copy of it."""
    private, public = generated(0), generated(1)
    copy = public.delivered[0].model_copy(update={"url": "https://cdn.example.com/1.png"})
    page = Page(batch([private, public.model_copy(update={"delivered": (copy,)})]))
    assert page.links[1:3] == ["file:///out/site/lighthouse-0-0.png", "https://cdn.example.com/1.png"]
    assert len(page.sources) == 2
    assert all(source.startswith("data:image/webp;base64,") for source in page.sources)


def test_four_columns() -> None:
    """Ten images stand in three lines, four beside each other, each with its caption."""
    markdown = batch([generated(n, f"prompt {n}") for n in range(10)])
    table = markdown[markdown.index("### Images") : markdown.index("### Time")]
    assert [line.count("<td") for line in table.splitlines() if line.startswith("<tr>")] == [4, 4, 2]
    assert "prompt 9" in Page(table).text


def test_an_image_without_a_thumbnail() -> None:
    """An image that no thumbnail could be made of is still linked to."""
    page = Page(batch([generated(0)], thumb=None))
    assert page.sources == []
    assert page.links[1] == "file:///out/site/lighthouse-0-0.png"
    assert "1024 x 1024" in page.text


def test_failures_come_before_pictures() -> None:
    """The reasons of failures stand before the gallery, counted by kind, the first with their words."""
    rows = [generated(0), failed(1, "a red fox"), failed(2, error_type="ServerError", maybe_paid=("twice",))]
    rows += [Row(row=3, status="skipped", error_type="BudgetExceeded")]
    text = Page(batch(rows)).text
    assert "### 2 failed, 1 skipped" in text
    assert "ModerationError 1, ServerError 1, BudgetExceeded 1" in text
    assert text.index("a red fox") < text.index("the prompt was refused") < text.index("### Images")
    assert "1 request may have been paid for without giving images" in text


def test_nothing_failed() -> None:
    """A batch without failures does not talk of them."""
    markdown = batch([generated(0)])
    assert "### " in markdown
    assert "failed," not in markdown
    assert "may have been paid" not in markdown


def test_no_artifact_grows_with_the_batch() -> None:
    """A batch of 2,000 has an artifact of 60 pictures and 20 failures, and says that there are more."""
    rows = [generated(n, "x" * 1_000) for n in range(2_000)] + [
        failed(n, error="e" * 9_000) for n in range(30)
    ]
    markdown = batch(rows)
    assert len(Page(markdown).sources) == 60
    assert "### Images, the first 60" in markdown
    assert "and 10 more in the manifest" in markdown
    assert "2,000 images for 2,030 requests" in markdown
    assert len(markdown) < 60 * (len(WEBP) * 2 + 1_000) + 20 * 1_000


def test_only_what_is_shown_is_read() -> None:
    """No more pictures are asked for than the artifact shows."""
    rows = [generated(n) for n in range(100)]
    left = pictures(rows)
    batch_markdown(report_of(rows), [], left, StoreLinks())
    assert len(list(left)) == 40


def test_what_it_cost_and_how_long_it_took() -> None:
    """With prices there is money; latencies stand by model; notes are shown as text, whatever they hold."""
    rows = [generated(0, seconds=20), generated(1, status="cached", api_calls=0)]
    priced = report_of(rows, totals=totals_of(rows, 0.5), notes=["<b>40 tokens</b> over"])
    made = batch_markdown(priced, [], [], StoreLinks())
    assert "| 4,169 | 4,169 | 2 | 0.50 | 0.50 |" in made
    assert re.search(r"2</td><td>(19\.\d|20\.\d) s</td>", made)
    assert "On average, 1.0 requests were under way." in made
    assert made.index("### Time") > made.index("| generated |")
    assert "<b>40 tokens</b> over" in Page(made).text
    assert "USD" not in batch_markdown(report_of(rows), [], [], StoreLinks())


def test_an_empty_batch() -> None:
    """A batch of nothing has an artifact that says so."""
    page = Page(batch([]))
    assert "0 images for 0 requests" in page.text
    assert page.sources == []


def test_a_delivery_tells_where_its_images_came_from() -> None:
    """A delivery's artifact has the whole chain: prompt, model, hash, who answered, runs, objects, sha256."""
    row = generated(0, "a lighthouse", count=2)
    text = Page(delivery(row, StoreLinks())).text
    facts = [
        *("a lighthouse", "gpt-image-2", "size 1024x1024", row.request_hash, "2026-05-20 12:00:00 UTC"),
        *("https://api.ttapi.io", "req-1", "4,169", row.flow_run_id),
        *(copy.uri for copy in row.delivered),
        *(image.sha256 for image in row.images),
    ]
    assert [fact for fact in facts if fact not in text] == []


def test_the_table() -> None:
    """The table has a row for each image, the same columns in each, and only what JSON can hold."""
    rows = [generated(0, count=2), failed(1), generated(2, "a *b*", status="cached")]
    table = image_table(rows, "file:///m.jsonl")
    assert [(line["row"], line["status"], line["prompt"]) for line in table] == [
        (0, "generated", "a lighthouse"),
        (0, "generated", "a lighthouse"),
        (2, "cached", "`a *b*`"),
    ]
    assert {tuple(line) for line in table} == {tuple(table[0])}
    assert table[0]["image"] == rows[0].images[0].sha256[:12]
    assert table[0]["delivered"] == rows[0].delivered[0].uri
    assert json.loads(json.dumps(table)) == table


def test_the_table_ends_at_the_manifest() -> None:
    """1,000 images fill the table; of 1,001 the last row names the manifest instead."""
    rows = [generated(n) for n in range(1_001)]
    assert len(image_table(rows[:1_000], "file:///m.jsonl")) == 1_000
    table = image_table(rows, "file:///m.jsonl")
    assert len(table) == 1_001
    assert table[-1]["delivered"] == "file:///m.jsonl"
    assert table[-1]["image"] == ""
    assert table[-1].keys() == table[0].keys()


@given(PROMPTS)
def test_no_cell_is_markup(prompt: str) -> None:
    """A cell's prompt is short and either without markup or a code span."""
    (line,) = image_table([generated(0, prompt)], "file:///m.jsonl")
    shown = str(line["prompt"])
    assert len(shown) <= 82
    assert re.fullmatch("`[^`]*`", shown) or not re.search(r"[<>*`|\[\]\\&]", shown)


class Signed(StoreLinks):
    """Links as a store gives them that signs, until a moment of 2031."""

    def __init__(self) -> None:
        super().__init__()
        self.end = datetime(2031, 5, 20, 12, 30, tzinfo=UTC)

    def to(self, uri: str) -> str:
        return uri.replace("file:///out", "https://s3.example.com") + "?X-Amz-Signature=0f&X-Amz-Expires=60"


def test_signed_links_say_when_they_end() -> None:
    """Where links are signed, pictures and places lead to the signed addresses, and their end is told."""
    row = generated()
    report = report_of([row], manifest_uri="file:///out/manifest.jsonl")
    made = batch_markdown(report, [], pictures([row]), Signed())
    assert "end on 2031-05-20 12:30 UTC at the latest" in made
    assert Page(made).links == [
        "https://s3.example.com/site/lighthouse-0-0.png?X-Amz-Signature=0f&X-Amz-Expires=60",
        "https://s3.example.com/manifest.jsonl?X-Amz-Signature=0f&X-Amz-Expires=60",
    ]
    assert "X-Amz" not in Page(made).text
    assert " end on " not in batch([row])
    assert "end on 2031-05-20 12:30 UTC at the latest" in delivery(row, Signed())


def test_a_table_that_is_cut_leads_to_the_manifest() -> None:
    """The last line of a table with too many images is a link to the manifest, where a browser can open that."""
    rows = [generated(n) for n in range(3)]
    public, private = (
        image_table(rows, uri, limit=2)[-1]["delivered"]
        for uri in ("https://cdn.example.com/m n.jsonl", "s3://bucket/m.jsonl")
    )
    assert (public, private) == ("https://cdn.example.com/m%20n.jsonl", "s3://bucket/m.jsonl")


@pytest.mark.parametrize(
    ("gallery", "told"),
    [
        ("https://cdn.example.com/out/batches/3f2a/index.html", None),
        ("file:///srv/my%20out/batches/3f2a/2/index.html", "prefect-ttapi open '/srv/my out' 3f2a/2"),
        ("s3://bucket/out/batches/3f2a/index.html", "prefect-ttapi open s3://bucket/out 3f2a"),
    ],
)
def test_the_gallery_comes_first(gallery: str, told: str | None) -> None:
    """Before anything else stands a link that a browser opens from Prefect's page, else the command that does."""
    report = report_of([generated()], gallery_uri=gallery)
    made = batch_markdown(report, [], pictures([generated()]), StoreLinks())
    before = Page(made[: made.index("| generated |")])
    assert before.links == ([] if told else [gallery])
    assert (told or "Open the gallery") in before.text
