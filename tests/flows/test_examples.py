"""The example flows work, as they are and as they stand in a project: they import public names only."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from flows.catalogue import catalogue
from flows.compare_models import compare_models
from prefect_ttapi.cli.flows import review
from prefect_ttapi.sandbox import Sandbox

ROOT = Path(__file__).parent.parent.parent
PRODUCTS = str(ROOT / "flows/products.csv")
TWICE = "sku,title,material\n1,a lamp,brass\n1,another lamp,steel\n"

pytestmark = pytest.mark.usefixtures("sandbox_in_the_environment")


@pytest.mark.parametrize("path", sorted((ROOT / "flows").glob("*.py")), ids=lambda path: path.stem)
def test_a_flow_can_be_copied(path: Path) -> None:
    """It imports nothing of the package but public names, and nothing of the other examples."""
    imports = [
        node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.ImportFrom)
    ]
    ours = {node.module for node in imports if (node.module or "").startswith(("prefect_ttapi", "flows"))}
    assert ours <= {"prefect_ttapi"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "title"),
        ("title,material\na lamp,brass\n", "sku"),
        ("sku,name\n1,a lamp\n", "title"),
        (TWICE, "also that of another"),
    ],
)
def test_bad_products(content: str, message: str, sandbox: Sandbox, tmp_path: Path) -> None:
    """An empty file, a missing column and two products of one number are known before anything is asked for."""
    products = tmp_path / "products.csv"
    products.write_text(content)
    with pytest.raises(ValueError, match=message):
        catalogue.fn(str(products), str(tmp_path / "out"), str(tmp_path / "shop"))
    assert sandbox.calls == 0


@pytest.mark.usefixtures("prefect_server")
def test_catalogue_gives_products_their_pictures(sandbox: Sandbox, tmp_path: Path) -> None:
    """The composing flow ends with each product's picture under its number."""
    shop = tmp_path / "shop"
    products = catalogue(PRODUCTS, str(tmp_path / "out"), str(shop))
    assert {Path(str(product["image"])).name for product in products} == {p.name for p in shop.glob("*.png")}
    assert products[0]["sku"] == "LMP-014"
    assert str(products[0]["image"]).endswith("/LMP-014.png")
    assert sandbox.paid == len(products) == 6


@pytest.mark.usefixtures("prefect_server")
def test_models_are_compared_and_what_lacks_is_reviewed(sandbox: Sandbox, tmp_path: Path) -> None:
    """Two prompts by all models, a refused one among them, in one gallery; the review names the refused ones."""
    report = compare_models(["a fox", "[[sandbox:moderation]] a secret"], str(tmp_path / "out"))
    assert report.gallery_uri
    assert [row.status for row in report.rows] == ["generated"] * 4 + ["failed"] * 4
    state = review(report.manifest_uri, return_state=True)
    assert state.is_failed()
    assert "8 requests, of which these lack images:\nrequest 4: ModerationError: " in (state.message or "")
