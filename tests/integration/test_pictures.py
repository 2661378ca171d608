"""The README's pictures can be made anew; those that this makes are for people to look at."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from tests.support.browser import browser
from tests.support.prefect_server import Server
from tools.pictures import HEIGHT, WIDTH, take

pytestmark = pytest.mark.integration


def test_gallery_and_run(prefect_ui: Server, screenshots: Path) -> None:
    """Both pictures come, as large as they are asked for."""
    with browser() as tab:
        take(prefect_ui, tab, screenshots)
    for name in ("gallery", "run"):
        with Image.open(screenshots / f"{name}.webp") as picture:
            assert picture.size == (WIDTH, HEIGHT)
