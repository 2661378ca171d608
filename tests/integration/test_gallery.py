"""The gallery in a real browser: pictures load, keys work, prompts are text, nobody else is asked."""

from __future__ import annotations

import functools
import http.server
import io
import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import pytest

from prefect_ttapi.images.renditions import GALLERY_BOX, thumbnail
from prefect_ttapi.lineage.gallery import Gallery, ThumbnailFile
from prefect_ttapi.lineage.manifest import Row
from prefect_ttapi.results import DeliveredImage
from tests.support.browser import Tab, browser
from tests.support.rows import failed, generated, picture, stored, totals_of

pytestmark = pytest.mark.integration

PROMPTS = [
    "a lighthouse at dusk",
    "</script><script>alert(1)</script><img src=x onerror=alert(1)>",
    "a | b `code` **bold** [x](javascript:alert(1))",
    "\u202e\u05de\u05d2\u05d3\u05dc\u05d5\u05e8 right to left",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 family\nat sea",
    "long " * 6_000,
]
SHAPES = [(300, 200), (200, 300), (256, 256)]


@pytest.fixture(scope="module")
def tab() -> Iterator[Tab]:
    with browser() as tab:
        yield tab


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store in a folder with two batches: one of images and failures, one of nothing."""
    root = tmp_path / "store"
    (root / "images").mkdir(parents=True)
    rows = [_delivered(root, n, prompt) for n, prompt in enumerate(PROMPTS)]
    rows.append(
        failed(len(rows), "a forbidden thing", error="refused: <b>no</b>", error_type="ModerationError")
    )
    rows.append(Row(row=len(rows), status="skipped", error_type="BudgetExceeded"))
    _write(root, "campaign", rows)
    _write(root, "empty", [])
    return root


def _delivered(root: Path, number: int, prompt: str) -> Row:
    width, height = SHAPES[number % len(SHAPES)]
    path = root / "images" / f"{number:064x}.png"
    path.write_bytes(picture(width, height, "RGBA"))
    facts = {"uri": path.as_uri(), "width": width, "height": height}
    image = stored(number, **facts).model_copy(update={"index": 0})
    copy = DeliveredImage(uri=f"{root.as_uri()}/site/{number}.png", sha256=image.sha256, source_uri=image.uri)
    return generated(number, prompt, images=(image,), delivered=(copy,))


def _write(root: Path, name: str, rows: list[Row]) -> None:
    folder = root / "batches" / name
    folder.mkdir(parents=True)

    with closing(ThumbnailFile()) as thumbnails:
        for image in (image for row in rows for image in row.images):
            file = io.BytesIO((root / "images" / f"{image.sha256}.png").read_bytes())
            thumbnails.add(image.sha256, thumbnail(file, GALLERY_BOX))
        gallery = Gallery(
            title=f"{name} <b>2026</b>",
            totals=totals_of(rows),
            thumbnails=thumbnails,
            made=datetime(2026, 5, 20, tzinfo=UTC),
            run_id="5f0c1c1e",
            run_url=None,
            folder_uri=folder.as_uri(),
            store_uri=root.as_uri(),
        )
        for page, pieces in gallery.pages(rows):
            (folder / page).write_text("".join(pieces), encoding="utf-8")


def opened(tab: Tab, root: Path, batch: str = "campaign") -> str:
    """Open a batch's page on a plain screen, as if for the first time; its address."""
    tab.screen(1200, 900)
    url = (root / "batches" / batch / "index.html").as_uri()
    tab.open(url)
    return url


def shown(tab: Tab) -> list[str]:
    prompts: list[str] = tab.run(
        "[...document.querySelectorAll('#grid .prompt')].map(node => node.textContent)"
    )
    return prompts


def until_focused(tab: Tab, index: int) -> None:
    """Wait until the card at `index` has the focus; a closed dialog gives it back a moment later."""
    tab.until(f"[...document.querySelectorAll('.card')].indexOf(document.activeElement) === {index}")


def test_every_picture_is_there(tab: Tab, store: Path, screenshots: Path) -> None:
    """All thumbnails load, hostile prompts show as text, and the page asks for nothing but itself."""
    url = opened(tab, store)
    tab.until(
        f"[...document.querySelectorAll('#grid img')].filter(img => img.naturalWidth > 0).length === {len(PROMPTS)}"
    )
    assert shown(tab)[: len(PROMPTS)] == PROMPTS
    assert tab.run("document.querySelector('h1').textContent") == "campaign <b>2026</b>"
    assert tab.run("document.querySelectorAll('script').length") == 2
    assert tab.requested == [url]
    assert tab.complaints == []
    tab.screenshot(screenshots / "gallery-gallery.png")


def test_failures_show_their_reasons(tab: Tab, store: Path) -> None:
    """A failed row is a card with the error's name and words."""
    opened(tab, store)
    reasons = tab.run("[...document.querySelectorAll('#grid .why')].map(node => node.textContent)")
    assert reasons == ["ModerationErrorrefused: <b>no</b>", "BudgetExceeded"]


def test_the_detail_by_keyboard(tab: Tab, store: Path) -> None:
    """Arrow keys walk over the cards, Enter opens one, arrows go on from there, Escape leads back."""
    opened(tab, store)
    tab.press("ArrowRight", "ArrowRight", "ArrowRight", "ArrowLeft")
    until_focused(tab, 1)
    tab.press("Enter")
    assert tab.run("document.querySelector('dialog').open")
    assert tab.run("document.querySelector('#detail-prompt').textContent") == PROMPTS[1]
    assert f"{1:064x}" in tab.run("document.querySelector('#detail-facts').textContent")
    tab.press("ArrowRight")
    assert tab.run("document.querySelector('#detail-prompt').textContent") == PROMPTS[2]
    tab.press("Escape")
    assert not tab.run("document.querySelector('dialog').open")
    until_focused(tab, 2)
    columns = tab.run(
        "getComputedStyle(document.querySelector('#grid')).gridTemplateColumns.split(' ').length"
    )
    tab.press("ArrowDown")
    until_focused(tab, 2 + columns)
    tab.press("ArrowUp")
    until_focused(tab, 2)
    assert tab.complaints == []


def test_the_detail_shows_the_image_itself(tab: Tab, store: Path, screenshots: Path) -> None:
    """On click the image from beside the page is shown at its own size and linked to, also to its copies."""
    opened(tab, store)
    tab.click("#grid li:nth-child(2) .card")
    tab.until("document.querySelector('#stage img').naturalHeight === 300")
    image = (store / "images" / f"{1:064x}.png").as_uri()
    assert tab.run("document.querySelector('#stage a').href") == image
    links = tab.run("[...document.querySelectorAll('#detail-facts a')].map(link => link.href)")
    assert links == [image, f"{store.as_uri()}/site/1.png"]
    assert tab.complaints == []
    tab.screenshot(screenshots / "gallery-detail.png")


def test_a_page_moves_with_its_folder(tab: Tab, store: Path, tmp_path: Path) -> None:
    """Moved together with the images, the page finds them; without them it shows the thumbnail."""
    moved = tmp_path / "else where"
    shutil.move(store, moved)
    opened(tab, moved)
    tab.click(".card")
    tab.until("document.querySelector('#stage img').naturalWidth === 300")
    shutil.rmtree(moved / "images")
    opened(tab, moved)
    tab.click(".card")
    tab.until("document.querySelector('#stage img.small')?.naturalWidth === 256")


def test_search_and_filters(tab: Tab, store: Path) -> None:
    """Words, status and model narrow the cards; what matches nothing offers a way back."""
    opened(tab, store)
    tab.press("/")
    tab.type("LIGHTHOUSE dusk")
    assert shown(tab) == [PROMPTS[0]]
    assert tab.run("document.querySelector('#count').value") == "1 of 8"
    tab.type(" no such thing")
    assert shown(tab) == []
    tab.click("#empty button")
    assert len(shown(tab)) == 8
    tab.click("[data-status=failed]")
    assert shown(tab) == ["a forbidden thing"]
    tab.click("[data-status=generated]")
    assert len(shown(tab)) == 7
    assert tab.complaints == []


def test_marks_are_shown_and_filtered_by(tab: Tab, store: Path, screenshots: Path) -> None:
    """A small mark tells what a file says of itself; one of them narrows the cards, on other pages too."""
    kinds = [("credentials", "xmp"), ("xmp",), (), None]
    uri = (store / "images" / f"{0:064x}.png").as_uri()
    marked = [stored(0, uri=uri, width=300, height=200, marks=marks) for marks in kinds]
    rows = [generated(n, f"number {n}", images=(marked[n % 4],), delivered=()) for n in range(604)]
    _write(store, "marked", rows)
    opened(tab, store, "marked")
    badges = "[...document.querySelectorAll('.card')].slice(0, 4).map(card => card.querySelectorAll('.mark').length)"
    assert tab.run(badges) == [2, 1, 0, 0]
    tab.screenshot(screenshots / "gallery-marks.png")
    for mark, here, elsewhere in (("credentials", 125, 26), ("xmp", 250, 52), ("none", 125, 26)):
        tab.run(f"document.querySelector('#mark').value = '{mark}'")
        tab.run("document.querySelector('#mark').dispatchEvent(new Event('input'))")
        assert len(shown(tab)) == here
        tab.until(
            f"document.querySelector('#elsewhere:not([hidden]) h2')?.innerText === '{elsewhere} more on other pages'"
        )
    tab.click(".card")
    assert "none" in tab.run("document.querySelector('#detail-facts').innerText")
    opened(tab, store)
    assert tab.run("document.querySelector('#marked').hidden")
    assert tab.complaints == []


def test_sorted_by_prompt(tab: Tab, store: Path) -> None:
    """Sorting by prompt puts the cards in the order of the alphabet, and back."""
    opened(tab, store)

    def choose(order: str) -> None:
        tab.run(f"document.querySelector('#sort').value = {json.dumps(order)}")
        tab.run("document.querySelector('#sort').dispatchEvent(new Event('input'))")

    choose("prompt")
    made = [prompt for prompt in shown(tab) if prompt.startswith(("a l", "a f", "long"))]
    assert made == ["a forbidden thing", "a lighthouse at dusk", PROMPTS[5]]
    choose("row")
    assert shown(tab)[: len(PROMPTS)] == PROMPTS


def test_on_a_phone(tab: Tab, store: Path, screenshots: Path) -> None:
    """On a narrow screen nothing is wider than the screen, neither the cards nor the detail."""
    opened(tab, store)
    tab.screen(360, 740, phone=True)
    assert tab.run("document.documentElement.scrollWidth") == 360
    tab.click("#grid li:nth-child(6) .card")
    tab.until("document.querySelector('#stage img').naturalWidth > 0")
    assert tab.run("document.querySelector('dialog').scrollWidth") <= 360
    assert tab.run("document.querySelector('dialog').scrollTop") == 0
    tab.screenshot(screenshots / "gallery-phone.png")


def test_light_and_dark(tab: Tab, store: Path, screenshots: Path) -> None:
    """The page follows the system's scheme until somebody chooses the other."""
    opened(tab, store)
    paper = "getComputedStyle(document.body).backgroundColor"
    light = tab.run(paper)
    tab.screen(1200, 900, dark=True)
    dark = tab.run(paper)
    assert light != dark
    tab.screenshot(screenshots / "gallery-dark.png")
    tab.click("#theme")
    assert tab.run(paper) == light
    tab.click("#theme")
    assert tab.run(paper) == dark
    tab.run("localStorage.clear()")


def test_an_empty_batch(tab: Tab, store: Path) -> None:
    """A batch of nothing says so and offers nothing to search."""
    opened(tab, store, "empty")
    assert "Nothing was asked for" in tab.run("document.querySelector('main').innerText")
    assert tab.run("document.querySelector('#bar').hidden")
    assert tab.complaints == []


def test_the_policy_holds(tab: Tab, store: Path) -> None:
    """Even a script and a picture that somebody got onto the page are stopped by its content security policy."""
    opened(tab, store)
    tab.run(
        "document.body.append(Object.assign(document.createElement('script'), {text: 'window.broken = 1'}))"
    )
    tab.run("document.body.append(Object.assign(new Image(), {src: 'http://127.0.0.1:9/spy.png'}))")
    tab.until("document.querySelector('img[src*=spy]').complete")
    assert tab.run("window.broken") is None
    assert sum("Content Security Policy" in complaint for complaint in tab.complaints) == 2


def test_a_big_batch_has_pages(tab: Tab, store: Path) -> None:
    """501 images stand on two pages that lead to each other."""
    image = stored(0, uri=(store / "images" / f"{0:064x}.png").as_uri(), width=300, height=200)
    _write(store, "big", [generated(n, f"number {n}", images=(image,), delivered=()) for n in range(501)])
    opened(tab, store, "big")
    assert len(shown(tab)) == 500
    tab.open(tab.run("document.querySelector('.pages a').href"))
    assert shown(tab) == ["number 500"]
    assert tab.run("document.querySelector('.pages a').href").endswith("/index.html")
    assert tab.complaints == []


def test_the_search_covers_all_pages(tab: Tab, store: Path, screenshots: Path) -> None:
    """Words, status and model are looked for on the other pages too, and what is found leads there."""
    image = stored(0, uri=(store / "images" / f"{0:064x}.png").as_uri(), width=300, height=200)
    values = {"name": "</script><b>the last</b>"}
    rows = [generated(n, f"number n{n}", images=(image,), delivered=(), values=values) for n in range(1_001)]
    _write(store, "big", rows)
    opened(tab, store, "big")
    tab.press("/")
    tab.type("number n9")
    told = "100 more on other pages"  # in its own time: the other pages' index is a frame
    tab.until(f"document.querySelector('#elsewhere:not([hidden]) h2')?.innerText === '{told}'")
    tab.until(f"document.querySelector('#count').value === '11 of 500 on this page, {told}'")
    assert len(shown(tab)) == 11
    tab.screenshot(screenshots / "gallery-search.png")
    tab.open(tab.run("[...document.querySelectorAll('#elsewhere a')].at(-1).href"))
    tab.until("document.querySelector('dialog').open")
    assert tab.complaints == []


def test_what_is_chosen_is_saved(tab: Tab, store: Path) -> None:
    """Chosen cards are counted; from a disk, a list of their files is what can be saved."""
    opened(tab, store)
    tab.run("document.querySelectorAll('.choose').forEach((box, at) => { if (at < 2) box.click(); })")
    assert tab.run("document.querySelector('#chosen').innerText").startswith("2 chosen")
    assert tab.run("document.querySelector('#download').innerText") == "Save list of files"
    tab.run(
        "window.saved = null;"
        "URL.createObjectURL = blob => { blob.text().then(text => window.saved = text); return '#'; }"
    )
    tab.click("#download")
    assert tab.until("window.saved").splitlines() == [str(store / "site" / f"{n}.png") for n in range(2)]
    tab.click("#unchoose")
    assert tab.run("document.querySelector('#chosen').hidden")
    assert tab.run("document.querySelectorAll('.choose:checked').length") == 0
    assert tab.complaints == []


def test_variants_side_by_side(tab: Tab, store: Path, screenshots: Path) -> None:
    """Prompts with several images have a line each, with these in it; what has one image only is left out."""
    image = stored(0, uri=(store / "images" / f"{0:064x}.png").as_uri(), width=300, height=200)
    prompts = ["a fox", "the sea", "a fox", "alone", "the sea", "a fox"]
    _write(store, "kinds", [generated(n, text, images=(image,)) for n, text in enumerate(prompts)])
    opened(tab, store, "kinds")
    tab.run("document.querySelector('#sort').value = 'variants'")
    tab.run("document.querySelector('#sort').dispatchEvent(new Event('input'))")
    found = "[...document.querySelectorAll('#grid li')]"
    lines = f"{found}.map(li => li.className || li.querySelector('.prompt').textContent)"
    assert tab.run(lines) == ["line", "a fox", "a fox", "a fox", "line", "the sea", "the sea"]
    tab.screenshot(screenshots / "gallery-variants.png")
    tab.press("/")
    tab.type("alone")
    tab.click("#empty button")
    assert len(shown(tab)) == len(prompts)
    opened(tab, store)
    assert not tab.run("document.querySelector('[value=variants]')")
    assert tab.complaints == []


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


def test_served_over_http(tab: Tab, store: Path) -> None:
    """From a web server too, the page asks for itself and for the images beside it, nothing else."""
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(_Quiet, directory=str(store))
    ) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            base = f"http://127.0.0.1:{server.server_port}"
            tab.open(f"{base}/batches/campaign/index.html")
            tab.click(".card")
            tab.until("document.querySelector('#stage img').naturalWidth === 300")
            assert tab.requested == [f"{base}/batches/campaign/index.html", f"{base}/images/{0:064x}.png"]
            assert tab.complaints == []
        finally:
            server.shutdown()
            thread.join()
