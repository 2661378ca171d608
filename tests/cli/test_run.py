"""`prefect-ttapi run`: a file of prompts becomes images, each paid for once, and mistakes are told in time."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from prefect.logging.handlers import PrefectConsoleHandler
from prefect.settings import PREFECT_API_URL
from prefect.utilities.callables import parameter_schema

from prefect_ttapi.cli.main import main
from prefect_ttapi.cli.reporting import Loudness, loudness
from prefect_ttapi.cli.run import campaign
from prefect_ttapi.cli.running import quiet_logs
from prefect_ttapi.credentials import ContentCredentialsSigner, TTAPICredentials
from prefect_ttapi.images.labels import Labels, read_labels
from prefect_ttapi.images.signing import read_signature
from prefect_ttapi.lineage.manifest import Row
from prefect_ttapi.requests import ImageRequest
from prefect_ttapi.sandbox import Sandbox
from prefect_ttapi.storage.store import ImageStore
from tests.cli.test_batches import batch
from tests.support.s3 import S3Server

ROOT = Path(__file__).parent.parent.parent


pytestmark = pytest.mark.usefixtures("sandbox_in_the_environment")


def run(arguments: list[str]) -> int:
    return main(["run", *arguments])


def prompts_file(tmp_path: Path, content: str | bytes, name: str = "prompts.csv") -> str:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


THREE = "name,prompt,model\nfirst,a red boat,gpt-image-1\nsecond,a blue boat,dall-e-3\nthird,a red boat,gpt-image-1\n"


class TestRun:
    @pytest.mark.usefixtures("prefect_server")
    def test_twice_into_a_folder(self, sandbox: Sandbox, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
        """Rows become files under each name; duplicates are paid once; the second run pays for nothing and says so."""
        prompts = prompts_file(tmp_path, THREE)
        arguments = [
            prompts,
            "--store",
            str(tmp_path / "out"),
            "--deliver",
            str(tmp_path / "shop"),
            "--key",
            "{name}.{ext}",
        ]
        assert run(arguments) == 0
        assert sorted(path.name for path in (tmp_path / "shop").glob("*.png")) == [
            "first.png",
            "second.png",
            "third.png",
        ]
        assert sandbox.calls == 2
        assert "Paid for 2 images in 2 calls" in capsys.readouterr().out
        assert run(arguments) == 0
        assert sandbox.calls == 2
        told = capsys.readouterr().out
        assert "Nothing was paid for" in told
        gallery = next(line.split()[-1] for line in told.splitlines() if line.startswith("Gallery"))
        assert "a red boat" in Path(gallery).read_text(encoding="utf-8")

        arguments[2] = str(tmp_path / "another")
        assert run([*arguments, "--dry-run"]) == 0
        told = capsys.readouterr().out
        assert "0 to send for 0 images, 3 not to be sent, as their keys are taken" in told
        assert run([*arguments, "--overwrite", "--mark"]) == 0
        assert sandbox.calls == 4
        for path in (tmp_path / "shop").glob("*.png"):
            with path.open("rb") as file:
                assert "xmp" in (read_labels(file) or Labels()).marks

        ContentCredentialsSigner.for_testing("Acme shop").save("shop", overwrite=True)
        arguments[2] = str(tmp_path / "signed")
        assert run([*arguments, "--overwrite", "--sign", "shop", "--sandbox", "--content-credentials"]) == 0
        assert "2 without" not in capsys.readouterr().out
        for path in (tmp_path / "shop").glob("*.png"):
            with path.open("rb") as file:
                signature = read_signature(file, "image/png")
            assert signature is not None
            assert (signature.problem, signature.signed_by) == (None, "Acme shop, for testing only")
        assert b"c2pa.opened" in (tmp_path / "shop" / "first.png").read_bytes()

    @pytest.mark.usefixtures("prefect_server")
    def test_twice_into_s3(
        self,
        sandbox: Sandbox,
        s3_server: S3Server,
        new_bucket,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ):
        """The same into a bucket, its settings from the usual AWS variables: types are right, nothing is paid twice."""
        monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.url)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3_server.access_key_id)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3_server.secret_access_key)
        monkeypatch.setenv("AWS_REGION", "us-east-1")
        bucket = new_bucket()
        arguments = [
            prompts_file(tmp_path, THREE),
            "--store",
            f"s3://{bucket}/art",
            "--deliver",
            f"s3://{bucket}/shop",
        ]
        assert run([*arguments, "--key", "{name}.{ext}"]) == 0
        assert run([*arguments, "--key", "{name}.{ext}"]) == 0
        assert sandbox.calls == 2
        client = s3_server.client()
        delivered = client.head_object(Bucket=bucket, Key="shop/first.png")
        client.close()
        assert delivered["ContentType"] == "image/png"
        assert delivered["Metadata"]["model"] == "gpt-image-1"

    @pytest.mark.usefixtures("prefect_server")
    def test_a_limit_in_usd(
        self, sandbox: Sandbox, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog
    ):
        """What does not fit is skipped, and the next run goes on from there; the money is in the summary.

        The file is read once, so that its warnings come once.
        """
        rows = "".join(f"boat {number},high\n" for number in range(8))
        prompts = prompts_file(tmp_path, f"prompt,qualiti\n{rows}")
        limited = [prompts, "--store", str(tmp_path / "out"), "--max-usd", "0.30", "--price", "dall-e-2=0.1"]
        assert run([*limited, "--price", "gpt-image-2=5/40"]) == 1
        assert caplog.text.count("did you mean quality?") == 1
        said = capsys.readouterr()
        assert "0.30 USD" in said.out
        assert "would pass the limit of 0.3000 USD" in said.err
        assert sandbox.images == 3
        assert [run(limited), sandbox.images] == [1, 6]

    @pytest.mark.usefixtures("prefect_server")
    def test_failed_rows_are_told_without_a_traceback(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ):
        """A refused prompt ends as one line, with its line and name, and exit status 1; the other image is there."""
        prompts = prompts_file(tmp_path, 'prompt,name\n"a\nboat",boat\n[[sandbox:moderation]] bad,worse\n')
        store, shop = tmp_path / "out", tmp_path / "shop"
        assert run([prompts, "--store", str(store), "--deliver", str(shop), "--key", "{name}.{ext}"]) == 1
        said = capsys.readouterr()
        assert "line 4 (worse) failed: " in said.err
        assert f"Delivered  {shop} (1 file)" in said.out
        assert "Paid for 1 image in 2 calls." in said.out
        assert f"prefect-ttapi open {store}" in said.out
        assert "Traceback" not in said.err + said.out
        assert len(list((tmp_path / "out" / "images").iterdir())) == 1

    @pytest.mark.usefixtures("prefect_server")
    def test_a_wrong_key_stops_at_once(self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch):
        """A key that the API refuses fails one row and skips the rest."""
        prompts = prompts_file(tmp_path, "prompt\n" + "".join(f"boat {number}\n" for number in range(30)))
        with Sandbox(api_key="right") as strict:
            monkeypatch.setenv("TTAPI_BASE_URL", strict.base_url)
            assert run([prompts, "--store", str(tmp_path / "out"), "--max-in-flight", "2"]) == 1
            assert strict.calls <= 3
        said = capsys.readouterr()
        assert "skipped" in said.err
        assert "Traceback" not in said.err + said.out

    def test_a_dry_run_counts_and_calls_nothing(
        self, sandbox: Sandbox, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ):
        """--dry-run says what would be sent, duplicates apart."""
        assert run([prompts_file(tmp_path, THREE), "--store", str(tmp_path / "out"), "--dry-run"]) == 0
        assert (
            "3 requests: 0 already paid for, 1 duplicate, 2 to send for 2 images" in capsys.readouterr().out
        )
        assert sandbox.calls == 0

    @pytest.mark.parametrize(
        ("options", "told"),
        [
            ((), "2 images, in money unknown: give each model's --price"),
            (("--price", "dall-e-3=0.08"), "in money unknown"),
            (("--price", "dall-e-3=0.08", "--price", "gpt-image-1=0.04"), "2 images, 0.12 USD"),
            (("--price", "dall-e-3=0.08", "--price", "gpt-image-1=5/40"), "only the answers tell the tokens"),
            (("--max-images", "1"), "--max-images 1 leaves 1 image at least to the next run"),
        ],
    )
    def test_a_dry_run_estimates_the_money(self, options: tuple[str, ...], told: str, tmp_path: Path, capsys):
        """As far as it can be known: by the price of an image, for every model that is asked."""
        words = [prompts_file(tmp_path, THREE), "--store", str(tmp_path / "out"), "--dry-run", *options]
        assert run(words) == 0
        assert told in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("content", "options", "told"),
        [
            (
                "Title,Size,Model,px\nshirt,M,AX-200,512x512\n,L,AX-201,\n",
                ("--prompt-column", "Title", "--columns", "size=px,model=", "--skip-blank"),
                ["rows without a prompt, passed over: 1", "1 request: 0 already paid for"],
            ),
            ("n,prompt\n1,x\n2,y\n3,z\n", ("--columns", "n=n"), ["3 to send for 6 images"]),
            ("n,prompt\n1,x\n2,y\n3,z\n", ("--columns", "n="), ["3 to send for 3 images"]),
            (
                "prompt\nf\u00fcr\n".encode("cp1252"),
                ("--encoding", "windows-1252"),
                ["1 to send for 1 image"],
            ),
            (
                "Image path,prompt\nassets/img/hero.jpg,a factory\n",
                ("--deliver", "shop", "--key", "{Image path.stem:path}.{ext}"),
                ["1 to send for 1 image"],
            ),
        ],
    )
    def test_files_as_people_have_them(
        self,
        content: str | bytes,
        options: tuple[str, ...],
        told: list[str],
        tmp_path: Path,
        capsys,
        monkeypatch,
    ):
        """Each option of `run` for a shop's export leads to requests; what was passed over is said."""
        monkeypatch.chdir(tmp_path)
        prompts = prompts_file(tmp_path, content)
        assert run([prompts, "--store", str(tmp_path / "out"), "--dry-run", *options]) == 0
        out = capsys.readouterr().out
        assert [line for line in told if line not in out] == []

    def test_a_key_without_a_place_to_deliver_to_is_an_error(self, tmp_path: Path, capsys):
        """Nothing is paid for that would then not be delivered."""
        prompts = prompts_file(tmp_path, "prompt\nx\n")
        assert run([prompts, "--store", str(tmp_path / "out"), "--key", "{slug}.{ext}"]) == 2
        assert "say --deliver, or leave out --key" in capsys.readouterr().err

    def test_columns_are_written_as_pairs(self, tmp_path: Path, capsys):
        """What is no FIELD=NAME is told with an example."""
        assert run([prompts_file(tmp_path, "prompt\nx\n"), "--store", "out", "--columns", "size"]) == 2
        assert "size=image_size,model=" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("content", "options", "message"),
        [
            ("", (), "empty"),
            ("prompt\nx\n", ("--content-credentials",), "it goes with --sandbox"),
            ("prompt\n", (), "no rows"),
            ("title\nx\n", (), "--prompt-column"),
            ("prompt,size,model\nx,99x99,dall-e-2\n", (), "size is '99x99' for dall-e-2"),
            (f"prompt,model\n{'x' * 5000},dall-e-3\n", (), "5,000 characters long for dall-e-3"),
            ('prompt,size\n"",512x512\n', (), "prompt"),
            ("prompt\nx\n", ("--key", "{nope}.{ext}"), "unknown name {nope}"),
            ("prompt\nx\ny\n", ("--key", "same.{ext}"), "also that of another image"),
            ("prompt\nx\n", ("--key", "../{slug}.{ext}"), "'..'"),
            ("prompt\nx\n", ("--key", "/etc/{slug}.{ext}"), "absolute"),
            ("prompt\nx\n", ("--key", "a\x07{slug}.{ext}"), "holds '\\x07'"),
            ("prompt\nx\n", ("--model", "gpt-image-9"), "gpt-image-9"),
            ("prompt\nx\n", ("--limit", "0"), "limit"),
            ("prompt\nx\n", ("--max-in-flight", "0"), "max_in_flight"),
            ("prompt\nx\n", ("--max-usd", "1"), "--max-usd needs a price for each model, as --price"),
            (
                "prompt\nx\n",
                ("--max-usd", "nan", "--price", "dall-e-2=1"),
                "usd Input should be a finite number",
            ),
            ("prompt\nx\n", ("--max-usd", "1", "--price", "dall-e-3=1"), "needs a price for dall-e-2"),
            ("prompt\nx\n", ("--deliver", "/proc/nowhere"), "/proc/nowhere"),
            ("prompt\nx\n", ("--deliver", "gs://bucket/x"), "s3://"),
            ("prompt\nx\n", ("--key", "a-lighthouse.webp"), "end the key template in .{ext}"),
            ("prompt,file\nx,x.jpg\n", ("--key", "{file}"), "end the key template in {file.stem}.{ext}"),
            (
                "prompt,Sku\nx,\n",
                ("--key", "{Sku}.{ext}"),
                "line 2: sku is blank, and the key template needs it",
            ),
            ("prompt,p\nx,../y\n", ("--key", "{p:path}"), "a relative path is needed"),
            ("n,prompt\n1,x\n2,y\n3,z\n", (), "--columns n= makes it a value"),
            ('prompt\nx\n""\n', (), "--skip-blank"),
            ("prompt,Model\nx,AX-200\n", (), "--columns model= makes it a value"),
            ("prompt\nx\n", ("--columns", "size=image_size"), "no column is named 'image_size'"),
            ("prompt\nx\n", ("--columns", "sise=x"), "did you mean size?"),
            ("prompt\nf\u00fcr\n".encode("cp1252"), (), "--encoding windows-1252"),
        ],
    )
    def test_bad_input_is_one_clear_message(
        self,
        content: str | bytes,
        options: tuple[str, ...],
        message: str,
        sandbox: Sandbox,
        tmp_path: Path,
        capsys,
    ):
        """What is wrong with file, template, store or arguments is said before the flow starts: status 2."""
        prompts = prompts_file(tmp_path, content)
        deliver = () if "--deliver" in options else ("--deliver", str(tmp_path / "shop"))
        assert run([prompts, "--store", str(tmp_path / "out"), *deliver, *options]) == 2
        said = capsys.readouterr()
        assert said.err.startswith("error: ")
        assert message in said.err
        assert "Traceback" not in said.err
        assert sandbox.calls == 0

    @pytest.mark.parametrize(
        "price", ["0.04", "dall-e-9=1", "dall-e-2", "dall-e-2=nan", "dall-e-2=-1", "dall-e-2=1/2/3"]
    )
    def test_a_price_that_is_none(self, price: str, tmp_path: Path, capsys):
        """The line says how one is written."""
        assert run([prompts_file(tmp_path, THREE), "--store", str(tmp_path / "out"), "--price", price]) == 2
        assert (
            f"{price!r} is no price: write gpt-image-2=0.04, or gpt-image-2=5/40" in capsys.readouterr().err
        )

    def test_a_missing_file_and_a_missing_bucket(
        self, s3_server: S3Server, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
    ):
        """A file or a bucket that does not exist is named."""
        assert run([str(tmp_path / "none.csv"), "--store", str(tmp_path / "out")]) == 2
        assert "none.csv" in capsys.readouterr().err
        monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.url)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3_server.access_key_id)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3_server.secret_access_key)
        assert run([prompts_file(tmp_path, "prompt\nx\n"), "--store", "s3://no-such-bucket/x"]) == 2
        assert "no-such-bucket" in capsys.readouterr().err

    def test_all_errors_of_a_file_are_told_together(self, tmp_path: Path, capsys):
        """Three bad rows are three lines, each with its line number."""
        rows = "prompt,model,size\nok,dall-e-2,512x512\nx,dall-e-2,1x1\n,dall-e-2,\ny,dall-e-9,\n"
        assert run([prompts_file(tmp_path, rows), "--store", str(tmp_path / "out")]) == 2
        said = capsys.readouterr().err
        assert [f"line {number}" in said for number in (2, 3, 4, 5)] == [False, True, True, True]

    @pytest.mark.usefixtures("prefect_server")
    def test_awkward_files_work(self, sandbox: Sandbox, tmp_path: Path):
        """A byte-order mark, CRLF, quotes, commas, tabs and line breaks in cells change nothing."""
        content = b'\xef\xbb\xbfprompt,name\r\n"a ""big"" boat,\ttwo\r\nlines",one\r\n'
        assert run([prompts_file(tmp_path, content), "--store", str(tmp_path / "out")]) == 0
        assert sandbox.requests[0]["prompt"] == 'a "big" boat,\ttwo\r\nlines'

    def test_without_a_key_it_says_what_to_set(self, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
        """Nothing falls back to the sandbox: without a key and --sandbox there is an error."""
        monkeypatch.delenv("TTAPI_API_KEY")
        assert run([prompts_file(tmp_path, THREE), "--store", str(tmp_path / "out")]) == 2
        assert "TTAPI_API_KEY is not set" in capsys.readouterr().err


@pytest.mark.integration
@pytest.mark.usefixtures("prefect_server")
def test_an_interrupted_campaign_goes_on_from_there(tmp_path: Path):
    """Ctrl-C finishes what is under way, writes the manifest and exits 130; the next run pays for the rest only."""
    prompts = prompts_file(tmp_path, "prompt\n" + "".join(f"boat {number}\n" for number in range(12)))
    with Sandbox(tiny=True, latency=0.5) as slow:
        environment = os.environ | {
            "TTAPI_BASE_URL": slow.base_url,
            "TTAPI_API_KEY": "sandbox-key",
            "PREFECT_HOME": str(tmp_path / "prefect"),
            "PREFECT_API_URL": PREFECT_API_URL.value(),
        }
        command = [
            sys.executable,
            "-m",
            "prefect_ttapi",
            "run",
            prompts,
            "--store",
            str(tmp_path / "out"),
            "--max-in-flight",
            "2",
        ]
        first = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 120
        while slow.paid < 3 and time.monotonic() < deadline and first.poll() is None:
            time.sleep(0.05)
        first.send_signal(signal.SIGINT)
        _, errors = first.communicate(timeout=120)
        assert first.returncode == 130, errors
        assert "the next run goes on from there" in errors
        manifests = list((tmp_path / "out" / "batches").glob("*/manifest.jsonl"))
        rows = [json.loads(line) for line in manifests[0].read_text().splitlines()]
        assert len(rows) == 12
        assert {row["status"] for row in rows} == {"generated", "skipped"}
        paid = slow.paid
        assert sum(row["status"] == "generated" for row in rows) == paid
        second = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180, check=False
        )
        assert second.returncode == 0, second.stderr
        assert slow.calls == 12


@pytest.mark.usefixtures("prefect_server")
def test_what_failed_is_asked_for_again(sandbox: Sandbox, store: ImageStore, tmp_path: Path, capsys):
    """Failed and skipped rows are one new batch, under the same name and keys; what has its images is left alone."""
    made = ImageRequest(prompt="a red boat")
    asked = {"failed": "a blue boat", "skipped": "a green boat"}
    rows = [Row(row=0, status="cached", request=made)] + [
        Row(row=number, status=status, request=ImageRequest(prompt=prompt), values={"name": prompt[2:5]})
        for number, (status, prompt) in enumerate(asked.items(), 1)
    ]
    batch(store, "first", *rows, name="boats")
    words = ["retry", store.url, "boats", "--deliver", str(tmp_path / "shop"), "--key", "{name}.{ext}"]
    assert main([*words, "--dry-run"]) == 0
    assert sandbox.calls == 0
    assert main(words) == 0
    assert "Paid for 2 images in 2 calls" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "shop").glob("*.png")) == ["blu.png", "gre.png"]
    assert main(["retry", store.url, "boats"]) == 0
    assert "Nothing is to be asked for again" in capsys.readouterr().out
    assert sandbox.calls == 2


@pytest.mark.parametrize(
    ("asked", "shown"),
    [
        (Loudness.QUIET, ["run warning"]),
        (Loudness.NORMAL, ["run info", "run warning"]),
        (Loudness.VERBOSE, ["task info", "task error", "run info", "run warning"]),
    ],
)
def test_task_runs_do_not_fill_the_terminal(asked: Loudness, shown: list[str]):
    """What task runs say, which the run tells again where it matters, is shown with -v only."""
    loudness(asked)
    written = io.StringIO()
    handler = PrefectConsoleHandler(written)
    loggers = {name: logging.getLogger(f"prefect.{name}_runs.test") for name in ("task", "flow")}
    for logger in loggers.values():
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
    quiet_logs()
    loggers["task"].info("task info")
    loggers["task"].error("task error")
    loggers["flow"].info("run info")
    loggers["flow"].warning("run warning")
    for logger in loggers.values():
        logger.removeHandler(handler)
    assert written.getvalue().splitlines() == shown


def test_the_form_of_a_deployment():
    """It lists models, sizes and qualities, offers the saved blocks, and says each thing in a sentence."""
    form = parameter_schema(campaign)
    fields, choices = form.properties, form.definitions
    for name in ("model", "size", "quality"):
        assert fields[name]["default"] in fields[name]["enum"]
    for name, block in (
        ("store", ImageStore),
        ("deliver", ImageStore),
        ("credentials", TTAPICredentials),
        ("sign", ContentCredentialsSigner),
    ):
        slugs = [
            choices[kind["$ref"].rpartition("/")[2]]["block_type_slug"] for kind in fields[name]["anyOf"][:1]
        ]
        assert slugs == [block._block_type_slug]
    assert all(re.match(r"[A-Z].*\.$", field["description"], re.DOTALL) for field in fields.values())
    assert not {"ImageStore", "TTAPICredentials"} & {choice.get("title") for choice in choices.values()}


@pytest.mark.usefixtures("prefect_server")
def test_a_deployment_with_blocks(sandbox: Sandbox, tmp_path: Path):
    """What its form submits makes a campaign: blocks in place of names, empty texts for what is not given."""
    prompts = tmp_path / "prompts.csv"
    prompts.write_text("prompt\na red boat\n")
    shop = ImageStore(url=str(tmp_path / "shop"))
    report = campaign(
        str(prompts),
        ImageStore(url=str(tmp_path / "store")),
        deliver=shop,
        credentials=TTAPICredentials(api_key="k", base_url=sandbox.base_url),
        model="gpt-image-1",
        quality="low",
        **dict.fromkeys(("key", "prompt_column", "encoding"), ""),
        **dict.fromkeys(("max_images", "max_usd", "limit", "rate_limit")),
        return_state=True,
    ).result()
    (row,) = report.rows
    assert (row.request.model, row.request.quality, row.request.size) == ("gpt-image-1", "low", "auto")
    assert len(list(shop.list(""))) == 1


def test_the_sandbox_is_used_whatever_credentials_are_named(store: ImageStore, tmp_path: Path, capsys):
    """With --sandbox nothing is paid for: not even where a saved block with a real key is named, too."""
    prompts = prompts_file(tmp_path, "prompt\nx\n")
    words = [prompts, "--store", store.url, "--sandbox", "--credentials", "real", "--dry-run"]
    assert run(words) == 0
    assert "1 to send for 1 image" in capsys.readouterr().out
