"""The report: JSON with a schema, and a page that needs nothing else."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from shardkit.shards import hash_manifest
from shardkit.verification.evidence import describe_layout, describe_split, list_versions
from shardkit.verification.report import Check, Report
from shardkit.verification.report_page import render_report_page
from tests.helpers.command_line import run
from tests.helpers.model_samples import make
from tests.helpers.runtime_helpers import cut

VOID = {"meta", "br", "line", "rect"}


class Strict(HTMLParser):
    """Every tag closed in order, and no script or address in any."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        assert tag not in ("script", "link", "img", "iframe")
        assert not {name for name, _ in attrs} & {"src", "href", "onload", "onclick"}
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in VOID

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def read_page(page: str) -> Strict:
    parser = Strict()
    parser.feed(page)
    parser.close()
    assert not parser.open
    return parser


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("split")
    cut(make("mixtral", folder / "source", "bfloat16"), folder / "shards", 2)
    return folder


def test_a_page_has_verdicts_blocks_layout_digests_and_json(
    split: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(split)
    page = split / "report.html"
    arguments = ["verify", "shards", "--against", "source", "--ranks", "turns", "--json"]
    monkeypatch.setattr("sys.argv", ["shardkit", *arguments])
    done = run(*arguments, "--report", "report.html")
    assert done.exit_code == 0, done.output
    report, text = json.loads(done.stdout), page.read_text()
    parser = read_page(text)
    assert json.loads(parser.text[parser.text.index('{\n  "schema"') :].strip()) == report
    assert report["schema"] == 1
    assert set(report) == {
        "schema", "folder", "passed", "checks", "split", "versions", "command",
    }  # fmt: skip
    assert "--ranks turns" in report["command"]
    numerics = report["checks"][-1]["numbers"]
    assert [each["block"] for each in numerics["by_block"]["float32"]][-1] == "output"
    for block in numerics["by_block"]["bfloat16"]:
        assert set(block) == {"block", "error", "allowed", "excess", "tp_rank"}
        assert f"{block['block']}: {block['error']:.3g}, allowed" in text
    assert text.count("<svg") == 2 + len(report["split"]["layout"])
    for rank in report["split"]["ranks"]:
        assert rank["sha256"] in text
    assert re.search(r"torch</td><td><code>\d", text)
    assert run(*arguments, "--report", "report.html").exit_code == 2  # it exists


def test_the_layout_adds_up_to_what_the_ranks_store(split: Path) -> None:
    from shardkit.shards import read_manifest

    manifest = read_manifest(split / "shards")
    kinds = describe_layout(manifest.plan)
    for at in range(2):
        stored = sum(p.shard_spec(manifest.mesh.rank(at)).nbytes for p in manifest.plan.placements)  # type: ignore[union-attr,misc]
        assert sum(kind["bytes_by_rank"][at] for kind in kinds) == stored  # type: ignore[index]
    assert sum(kind["count"] for kind in kinds) == len(manifest.plan.placements)  # type: ignore[misc]
    assert describe_split(manifest)["manifest_sha256"] == hash_manifest(manifest)
    assert {"shardkit", "torch", "transformers"} <= set(list_versions())


def test_names_from_outside_are_text_in_the_page() -> None:
    fault = "<script>alert(1)</script> & more"
    block = {"block": fault, "error": float("inf"), "allowed": 0.0, "excess": float("inf"),
             "tp_rank": 0}  # fmt: skip
    numbers = {"by_block": {"float32": [block]}}
    check = Check("numerics", "failed", fault, (fault,), numbers)
    report = Report("<b>", (check,), command=fault)
    page = render_report_page(report)
    parser = read_page(page)
    assert fault in parser.text
    assert report.to_json()["checks"][0]["numbers"]["by_block"]["float32"][0]["error"] is None  # type: ignore[index]
    assert 'class="beyond"' in page
