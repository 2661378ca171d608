"""Make the README's pictures from a campaign against the sandbox: `python tools/pictures.py`.

Needs chromium. Prefect's server and the sandbox are temporary; what is kept are two small files in `docs/images`.
"""

from __future__ import annotations

import io
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

from PIL import Image

ROOT: Final = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.support.browser import Tab, browser  # noqa: E402 - the tests are no package that is installed
from tests.support.prefect_server import Server, prefect_server  # noqa: E402

PICTURES: Final = ROOT / "docs" / "images"
WIDTH: Final = 1200
HEIGHT: Final = 860
#: The tab with a run's artifacts, once it is there.
ARTIFACTS: Final = "[...document.querySelectorAll('*')].filter(one => one.innerText?.trim() === 'Artifacts')"


def take(server: Server, tab: Tab, pictures: Path) -> None:
    """Run the example campaign against the sandbox, and keep what its gallery and its run look like."""
    with tempfile.TemporaryDirectory() as folder:
        server.run("-m", "prefect_ttapi", "run", str(ROOT / "flows" / "prompts.csv"), "--sandbox",
                   "--store", f"{folder}/images", "--deliver", f"{folder}/website",
                   "--key", "{shot}/{name}-{index}.{ext}", "--name", "lighthouse")  # fmt: skip
        tab.screen(WIDTH, HEIGHT)
        (page,) = Path(folder).glob("images/batches/*/index.html")
        tab.open(page.as_uri())
        tab.until(
            "[...document.querySelectorAll('#grid img')].filter(image => image.naturalWidth).length > 4"
        )
        _keep(tab, pictures / "gallery.webp")
    tab.open(f"{server.url}/runs/flow-run/{page.parent.name}")
    tab.until(f"(found => found.length && (found.at(-1).click(), true))({ARTIFACTS})")
    time.sleep(5)  # Prefect's graph draws itself
    _keep(tab, pictures / "run.webp")


def _keep(tab: Tab, path: Path) -> None:
    """Keep what the tab shows as a small WebP."""
    tab.run("document.documentElement.style.scrollbarWidth = 'none'")
    with tempfile.TemporaryDirectory() as folder:
        shot = Path(folder, "shot.png")
        tab.screenshot(shot)
        picture = Image.open(io.BytesIO(shot.read_bytes())).convert("RGB")
    picture.save(path, quality=82, method=6)


def main() -> None:
    """Make both pictures."""
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as home, prefect_server(Path(home)) as server, browser() as tab:
        take(server, tab, PICTURES)


if __name__ == "__main__":
    main()
