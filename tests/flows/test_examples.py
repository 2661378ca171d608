"""The example flows work, and tell mistakes in their arguments before they start: one message, no traceback."""

from __future__ import annotations

from pathlib import Path

import pytest

from flows import campaign, catalogue, compare_models
from prefect_ttapi.sandbox import Sandbox
from prefect_ttapi.storage.store import ImageStore

ROOT = Path(__file__).parent.parent.parent
PRODUCTS = str(ROOT / "flows/products.csv")
ROW = "sku,title,material\n1,a lamp,brass\n"


pytestmark = pytest.mark.usefixtures("sandbox_in_the_environment")


def told(capsys: pytest.CaptureFixture[str]) -> str:
    """The one message on standard error."""
    said = capsys.readouterr()
    assert said.err.startswith("error: ")
    assert "Traceback" not in said.out + said.err
    assert "pydantic" not in said.err
    return said.err


@pytest.mark.parametrize("store", ["gs://bucket/x", "", "/proc/nowhere"])
@pytest.mark.parametrize(
    ("flow", "arguments"),
    [
        (campaign, [PRODUCTS, "--prompt-column", "title"]),
        (catalogue, [PRODUCTS, "--shop", "shop"]),
        (compare_models, ["a fox"]),
    ],
)
def test_a_bad_store(flow, arguments: list[str], store: str, capsys, tmp_path: Path, monkeypatch):
    """Each example says in one line that a store is none, or can't be written."""
    monkeypatch.chdir(tmp_path)
    assert flow.main([*arguments, "--store", store]) == 2
    assert len(told(capsys).splitlines()) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "products.csv"),
        ("", "sku"),
        ("sku,title\n1,a lamp\n", "material"),
        (ROW + "1,another lamp,steel\n", "also that of another image"),
    ],
)
def test_bad_products(content: str | None, message: str, sandbox: Sandbox, tmp_path: Path, capsys):
    """A missing or empty file, a missing column, and two products of one number."""
    products = tmp_path / "products.csv"
    if content is not None:
        products.write_text(content)
    arguments = [str(products), "--store", str(tmp_path / "out"), "--shop", str(tmp_path / "shop")]
    assert catalogue.main(arguments) == 2
    assert message in told(capsys)
    assert sandbox.calls == 0


@pytest.mark.parametrize(
    ("arguments", "message"), [([""], "prompt is ''"), (["a fox", "--sizes", "1x1"], "has a size of 1x1")]
)
def test_bad_comparisons(arguments: list[str], message: str, sandbox: Sandbox, tmp_path: Path, capsys):
    """An empty prompt, and a size that no model has."""
    assert compare_models.main([*arguments, "--store", str(tmp_path / "out")]) == 2
    assert message in told(capsys)
    assert sandbox.calls == 0


@pytest.mark.usefixtures("prefect_server")
def test_catalogue_gives_products_their_pictures(
    sandbox: Sandbox, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """The composing flow ends with each product's picture under its number."""
    out, shop = str(tmp_path / "out"), tmp_path / "shop"
    assert catalogue.main([PRODUCTS, "--store", out, "--shop", str(shop)]) == 0
    assert len(list(shop.glob("*.png"))) == 6
    assert "LMP-014 file://" in capsys.readouterr().out


@pytest.mark.usefixtures("prefect_server")
def test_compare_models_makes_a_contact_sheet(
    sandbox: Sandbox, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Two prompts by all models, a refused one among them, on one sheet."""
    store = ImageStore(url=str(tmp_path / "out"))
    prompts = ["a fox", "[[sandbox:moderation]] a secret"]
    assert compare_models.main([*prompts, "--store", store.url]) == 0
    sheet = capsys.readouterr().out.split("Contact sheet: ")[1].strip()
    assert store.read_bytes(sheet).startswith(b"\x89PNG")
