"""A batch's artifacts in Prefect's own UIs, the old and the new, looked at with a browser."""

from __future__ import annotations

import functools
import http.server
import io
import json
import os
import pty
import re
import subprocess
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from prefect import Flow
from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

from prefect_ttapi.cli.run import campaign
from prefect_ttapi.lineage.publishing import batch_key
from prefect_ttapi.lineage.shown import CAPTION, CELL, cell, one_line
from tests.cli.test_flows import own
from tests.support.browser import Tab, browser
from tests.support.hostile_batch import NAME, PROMPTS, REFUSED
from tests.support.prefect_server import PREFECT, Server

pytestmark = pytest.mark.integration

PICTURES = "[...document.querySelectorAll('img[src^=\"data:image/webp\"]')]"
INTERFACES = pytest.mark.parametrize("ui", ["", "/v2"], ids=["old", "new"])


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@dataclass(frozen=True)
class Batch:
    """What the batch left: the address of its images, and its artifacts by key."""

    images_url: str
    artifacts: dict[str, str]


@pytest.fixture(scope="module")
def tab() -> Iterator[Tab]:
    with browser() as tab:
        tab.screen(1400, 1200)
        yield tab


@pytest.fixture(scope="module")
def batch(prefect_ui: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Batch]:
    """The batch of hostile prompts, its folder served to browsers."""
    folder = tmp_path_factory.mktemp("images")
    handler = functools.partial(_Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            url = f"http://127.0.0.1:{server.server_port}"
            told = prefect_ui.run("-m", "tests.support.hostile_batch", str(folder), url)
            report = json.loads(told.splitlines()[-1])
            assert report["totals"]["delivered"] == len(PROMPTS)
            run = {"flow_run_id": {"any_": [report["flow_run_id"]]}}
            found = prefect_ui.ask("artifacts/filter", artifacts=run)
            yield Batch(url, {artifact["key"]: artifact["id"] for artifact in found})
        finally:
            server.shutdown()
            thread.join()


def open_artifact(tab: Tab, server: Server, artifact: str, ui: str) -> None:
    tab.open(f"{server.url}{ui}/artifacts/artifact/{artifact}")


def complaints(tab: Tab) -> list[str]:
    """What the page complains of, but for addresses that Prefect's UI itself asks for in vain."""
    told = [
        json.loads(complaint) if complaint.startswith(("{", "[")) else complaint
        for complaint in tab.complaints
    ]
    return [
        str(one)
        for one in told
        if not (isinstance(one, dict) and one.get("entry", {}).get("source") == "network")
    ]


@INTERFACES
def test_the_gallery_artifact(tab: Tab, prefect_ui: Server, batch: Batch, ui: str, screenshots: Path) -> None:
    """As many loaded pictures as were delivered, hostile prompts as text, and a link to the image itself."""
    open_artifact(tab, prefect_ui, batch.artifacts[batch_key(NAME)], ui)
    shown = tab.until(
        f"(loaded => loaded.length === {len(PROMPTS)} && loaded.map(img => ["
        "img.closest('td').innerText, img.closest('a').href"
        f"]))({PICTURES}.filter(img => img.naturalWidth > 0))"
    )
    for prompt, (caption, _) in zip(PROMPTS, shown, strict=True):
        assert one_line(prompt, CAPTION) in " ".join(caption.split())
    for told in (one_line(REFUSED, CAPTION), "Your request was rejected by the safety system"):
        tab.until(f"document.body.innerText.includes({json.dumps(told)})")
    assert tab.run("document.querySelectorAll('img[src=x], [onerror], a[href^=javascript]').length") == 0
    tab.screenshot(screenshots / f"artifact{ui.replace('/', '-')}.png")
    links = [link for _, link in shown]
    assert len(set(links)) == len(PROMPTS)
    assert all(link.startswith(f"{batch.images_url}/shop/") for link in links)
    assert complaints(tab) == []
    tab.open(links[0])
    assert tab.run("document.images[0].naturalWidth") == 64


@INTERFACES
def test_the_table_artifact(tab: Tab, prefect_ui: Server, batch: Batch, ui: str, screenshots: Path) -> None:
    """A line for each image, in which hostile prompts are text."""
    open_artifact(tab, prefect_ui, batch.artifacts[batch_key(NAME, "images")], ui)
    told = [cell(one_line(prompt, CELL)).replace("`", "") for prompt in PROMPTS]
    # the lines are there before what is in them
    tab.until(
        f"document.querySelectorAll('tbody tr').length === {len(PROMPTS)} && "
        f"{json.dumps(told)}.every(text => document.body.innerText.replaceAll('`', '').includes(text))"
    )
    assert tab.run("document.querySelectorAll('img[src=x], [onerror], a[href^=javascript]').length") == 0
    assert complaints(tab) == []
    tab.screenshot(screenshots / f"table{ui.replace('/', '-')}.png")


@INTERFACES
def test_the_gallery_page(tab: Tab, prefect_ui: Server, batch: Batch, ui: str, screenshots: Path) -> None:
    """The artifact's first link leads to the gallery page, which shows every picture."""
    open_artifact(tab, prefect_ui, batch.artifacts[batch_key(NAME)], ui)
    found = "[...document.querySelectorAll('a')].find(a => a.innerText === 'Open the gallery')?.href"
    tab.open(tab.until(found))
    tab.until(
        f"[...document.querySelectorAll('#grid img')].filter(img => img.naturalWidth > 0).length === {len(PROMPTS)}"
    )
    assert complaints(tab) == []
    tab.screenshot(screenshots / f"gallery-page{ui.replace('/', '-')}.png")


@pytest.fixture(scope="module")
def forms(prefect_ui: Server) -> dict[str, str]:
    """The addresses of the forms: of both blocks, and of a run of a deployment."""
    prefect_ui.run(PREFECT, "block", "register", "-m", "prefect_ttapi")
    deployed = prefect_ui.run(
        "-c",
        "from prefect_ttapi.cli.run import campaign;"
        "print(campaign.to_deployment('form', parameters={'prompts': 'p.csv', 'store': 's3://b'}).apply())",
    )
    own = prefect_ui.run(
        "-c",
        "from tests.cli.test_flows import own;"
        "print(own.to_deployment('form', parameters={'request': {'prompt': 'a fox'}}).apply())",
    )
    blocks = {slug: f"/blocks/catalog/{slug}/create" for slug in ("ttapi-credentials", "ttapi-image-store")}
    runs = {"deployment": deployed, "request": own}
    return blocks | {name: f"/deployments/deployment/{told.split()[-1]}/run" for name, told in runs.items()}


@INTERFACES
@pytest.mark.parametrize(
    ("form", "says"),
    [
        ("ttapi-credentials", "The key is in the TTAPI dashboard."),
        ("ttapi-image-store", "How objects are written"),
        ("deployment", "The size of images for rows of the file that name none."),
        ("request", "GPT Image models make files of this type."),
    ],
)
def test_forms(
    tab: Tab, prefect_ui: Server, forms: dict[str, str], form: str, says: str, ui: str, screenshots: Path
) -> None:
    """Each form explains its fields, and shows no code, no class, and no choice between a text and nothing."""
    tab.screen(1400, 2800)
    tab.open(f"{prefect_ui.url}{ui}{forms[form]}")
    tab.until(f"document.body.innerText.includes({json.dumps(says)})")
    text = tab.run("document.body.innerText")
    for unwanted in (
        ">>>",
        "ImageStore",
        "TTAPICredentials",
        "UploadOptions",
        "ConnectionOptions",
        "NoneType",
    ):
        assert unwanted not in text
    if form.startswith("ttapi"):
        assert 'Property is type "None"' not in text
    tab.screenshot(screenshots / f"form-{form}{ui.replace('/', '-')}.png")
    tab.screen(1400, 1200)


@INTERFACES
@pytest.mark.parametrize(
    ("form", "deployed", "given"),
    [
        ("deployment", campaign, lambda parameters: parameters["store"] == "s3://b"),
        ("request", own, lambda parameters: parameters["request"].prompt == "a fox"),
    ],
    ids=["campaign", "request"],
)
def test_a_run_from_the_form(
    tab: Tab, prefect_ui: Server, forms: dict[str, str], form: str, deployed: Flow, given: Callable, ui: str
) -> None:
    """What the untouched form submits is what the flow takes."""
    tab.open(f"{prefect_ui.url}{ui}{forms[form]}")
    deployment = forms[form].split("/")[3]
    mine = {"id": {"any_": [deployment]}}
    before = len(prefect_ui.ask("flow_runs/filter", deployments=mine))
    tab.until("[...document.querySelectorAll('button')].some(b => b.innerText === 'Submit')")
    tab.until(
        "[...document.querySelectorAll('textarea, input')].some(field => /s3:..b|a fox/.test(field.value))"
    )
    tab.run("[...document.querySelectorAll('button')].find(b => b.innerText === 'Submit').click()")
    tab.until("!location.pathname.endsWith('/run')")
    runs = prefect_ui.ask("flow_runs/filter", deployments=mine)
    assert len(runs) == before + 1
    assert given(deployed.validate_parameters(runs[-1]["parameters"]))


#: What a terminal is told: the cursor up, a line cleared, the end of a line; then colours and text.
TOLD = re.compile(r"\x1b\[(\d*)A|(\x1b\[2K)|(\n)|(\x1b\[[0-9;]*m|[^\x1b\r\n]+)|\x1b\[\?\d+[lh]|\r|\x1b")


def on_screen(output: str) -> str:
    """Return what is left on a terminal, with its colours."""
    lines, at = [""], 0
    for up, cleared, ended, text in TOLD.findall(output):
        if ended:
            at += 1
            lines += [""] * (at == len(lines))
        elif cleared:
            lines[at] = ""
        elif text:
            lines[at] += text
        else:
            at = max(0, at - int(up or 1)) if up else at
    return "\n".join(lines)


def test_the_terminal(tab: Tab, prefect_ui: Server, tmp_path: Path, screenshots: Path) -> None:
    """A run leaves one bar, what it paid for and where everything is; no line for each task run."""
    (tmp_path / "prompts.csv").write_text("name,prompt\nfox,a fox\nharbour,a harbour\n")
    command = [
        "run",
        "prompts.csv",
        "--sandbox",
        "--store",
        "images",
        "--deliver",
        "website",
        "--key",
        "{name}.{ext}",
    ]
    here, there = pty.openpty()
    termios.tcsetwinsize(there, (40, 110))
    environment = {**os.environ, "PREFECT_API_URL": f"{prefect_ui.url}/api", "TERM": "xterm-256color"}
    with subprocess.Popen(
        [sys.executable, "-m", "prefect_ttapi", *command],
        cwd=tmp_path,
        env=environment,
        stdin=there,
        stdout=there,
        stderr=there,
    ) as run:
        os.close(there)
        output = b""
        with suppress(OSError):  # how a terminal ends
            while piece := os.read(here, 65536):
                output += piece
        os.close(here)
    shown = on_screen(output.decode())
    console = Console(record=True, width=110, file=io.StringIO(), force_terminal=True)
    console.print(Text.from_ansi(shown))
    page = tmp_path / "terminal.html"
    page.write_text(console.export_html(theme=MONOKAI, inline_styles=True))
    tab.open(page.as_uri())
    tab.screenshot(screenshots / "terminal.png")
    plain = Text.from_ansi(shown).plain
    assert run.returncode == 0
    assert "Paid for 2 images in 2 calls." in plain
    assert "Finished in state Completed" not in plain
    assert sum("images/min" in line for line in plain.splitlines()) == 1
