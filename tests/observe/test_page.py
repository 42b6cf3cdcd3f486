"""The page: self-contained, escaped, and made from whatever a run left behind."""

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from r1fast.observe.page import build_report, pieces
from r1fast.report import main


class Page(HTMLParser):
    """A page as a reader has it: every tag closed in order, its text, its links, the JSON of its charts."""

    def __init__(self, run_dir: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.words: list[str] = []
        self.data: Any = None
        path = build_report(run_dir)
        assert path == run_dir / "report.html"
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        assert self.open == [], "unclosed tags"
        assert "url(http" not in self.source and "@import" not in self.source
        assert len(self.ids) == len(set(self.ids))
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag != "meta":
            self.open.append(tag)
        attributes = {name: value or "" for name, value in attrs}
        assert not attributes.keys() & {"src", "srcset", "onload"}
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.links += [attributes["href"]] if "href" in attributes else []

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.words.append(data)
        elif self.open[-1:] == ["script"] and self.data is None:
            self.data = json.loads(data)


def change(run_dir: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    path = run_dir / "summary.json"
    summary = json.loads(path.read_text())
    edit(summary)
    path.write_text(json.dumps(summary))
    return run_dir


def test_whole_chain(tmp_path: Path, write_run: Callable[..., Path]) -> None:
    page = Page(write_run(tmp_path))
    assert "This run is not complete" not in page.text
    for expected in (
        "pass@1 of r1 77.6 % 8.1% in base", "11 of 11 stages done",
        "pass@1 8.1 ± 2.7 79.1 ± 4.0 +71.0", "from base with cold", "400 prompts, 4 samples each",
        "rewards/accuracy/mean", "mixed language 1,311 · 23%", "generate 24%",
        "Load of experts, by layer step 1 step 60",
        "reward 2.", "finish length", "rewards.accuracy 1", "The resolved recipe",
    ):  # fmt: skip
        assert expected in page.text


def test_charts_have_the_runs_numbers(tmp_path: Path, write_run: Callable[..., Path]) -> None:
    data = Page(write_run(tmp_path)).data
    stages = {stage["name"]: stage for stage in data["stages"]}
    assert stages["r1"]["sources"] == ["dev3", "helpful_rm"] and stages["dev1"]["sources"] == ["base", "cold"]
    assert stages["student"]["sources"] == ["Qwen/Qwen2.5-0.5B", "reject"] and stages["reject"]["rows"] == [1637]
    scores = stages["zero"]["scores"]
    assert (scores["pass@1"], scores["language"]) == (0.791, 0.55)
    assert scores["interval"] == pytest.approx([0.751, 0.831], abs=1e-3)
    assert [name for name, _ in data["scores"]][-2:] == ["Qwen/Qwen2.5-0.5B", "student"]
    steps = [[step for step, _ in stages[name]["curves"]["loss"]] for name in ("zero", "base")]
    assert steps[0] == list(range(1, 61))
    assert len(steps[1]) == 160 and steps[1][0] == 1 and steps[1][-1] == 600  # thinned
    assert [(len(table), len(table[0])) for table in stages["zero"]["load"]] == [(2, 8), (2, 8)]


def test_a_student_alone_stands_against_the_model_from_outside(tmp_path: Path, write_run: Callable[..., Path]) -> None:
    """As in recipe distill; of two students of one model the first may have left out what it starts from."""

    def edit(summary: dict[str, Any]) -> None:
        student = summary["stages"][-1]
        summary["stages"] = [student | {"name": "unmeasured", "eval_before": {}, "eval_after": {}}, student]

    page = Page(change(write_run(tmp_path), edit))
    assert "pass@1 of student 50.6 % 4.9% in Qwen2.5-0.5B" in page.text
    assert [name for name, _ in page.data["scores"]] == ["Qwen/Qwen2.5-0.5B", "student"]


def test_text_of_the_run_is_escaped(tmp_path: Path, write_run: Callable[..., Path]) -> None:
    hostile = "</script><script>alert(1)</script><svg onload=x>\udce9"

    def edit(summary: dict[str, Any]) -> None:
        summary["recipe"] = summary["stages"][1]["model"] = hostile
        summary["stages"][1]["numbers"] = {hostile: hostile}
        summary["stages"][0]["status"] = hostile

    run = change(write_run(tmp_path), edit)
    with (run / "zero" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 61, hostile: 1.0}) + "\n")
    page = Page(run)
    assert "alert(1)" in page.text and "<script>alert" not in page.source and "<svg onload" not in page.source
    assert page.data["stages"][1]["sources"][0] == hostile and hostile in page.data["stages"][1]["curves"]
    assert "&lt;b&gt;so&lt;/b&gt;" in page.source  # from a completion


def test_stopped_run_says_where(tmp_path: Path, write_run: Callable[..., Path]) -> None:
    page = Page(write_run(tmp_path, stop_in="dev2"))
    assert "4 of 11 stages are done. Stage dev2 was running at step 20 when this page was made." in page.text
    assert "stage-dev2" in page.ids and "stage-dev3" not in page.ids
    assert {link.removeprefix("#") for link in page.links} <= set(page.ids)
    assert page.data["stages"][-1]["status"] == "pending" and not page.data["stages"][-1]["begun"]


@pytest.mark.parametrize("missing", ["summary.json", "config.yaml", "zero/metrics.jsonl", "zero/samples"])
def test_missing_parts(missing: str, tmp_path: Path, write_run: Callable[..., Path]) -> None:
    run = write_run(tmp_path)
    path = run / missing
    for file in path.iterdir() if path.is_dir() else [path]:
        file.unlink()
    assert {"stage-zero", "stage-dev1"} <= set(Page(run).ids)


def test_files_cut_short_by_a_kill(tmp_path: Path, write_run: Callable[..., Path]) -> None:
    run = write_run(tmp_path)
    (run / "summary.json").write_text('{"stages": [{"na')
    (run / "zero" / "stage.json").write_text('{"entry"')
    (run / "config.yaml").write_text("stages: [")
    sample = run / "zero" / "samples" / "step_00060.parquet"
    sample.write_bytes(sample.read_bytes()[:100])
    with (run / "zero" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 61, "rew')
    page = Page(run)
    assert "Stage zero stopped at step 60." in page.text and "Step 30" in page.text and "79.1" not in page.text
    assert "r1: " not in page.text and "77.6 ± 4.1" in page.text  # of r1, from its stage.json


@pytest.mark.parametrize(("name", "content"), [
    ("config.yaml", "[" * 3000), ("summary.json", ""), ("summary.json", "[]"), ("summary.json", '{"stages": 3}'),
    ("summary.json", "[" * 100_000), ("summary.json", '{"stages": [{"name": "zero", "eval_after": [1]}]}'),
    ("summary.json", '{"stages": [{"name": "zero", "numbers": {"a": NaN, "kept": 1e999, "b": [{}]}, "seconds": NaN}]}'),
    ("summary.json", '{"stages": [{"name": "zero", "inputs": ["dev1"]}, {"name": "dev1", "inputs": ["zero"]}]}'),
    ("zero/metrics.jsonl", '{"step": 1, "moe/load": 3}'), ("zero/metrics.jsonl", '{"step": 1, "moe/load": [[]]}'),
    ("zero/metrics.jsonl", '{"step": 1, "moe/load": [[1, null], ["x"]]}'), ("zero/metrics.jsonl", "[" * 100_000),
    ("zero/metrics.jsonl", '{"step": 2, "loss": 1e308}\n{"step": 3, "loss": -1e299}\n{"step": 1, "loss": NaN}'),
    ("zero/metrics.jsonl", '{"step": 1, "loss": 1' + "0" * 400 + "}"),
])  # fmt: skip
def test_damaged_files_make_a_page(name: str, content: str, tmp_path: Path, write_run: Callable[..., Path]) -> None:
    run = write_run(tmp_path)
    (run / name).write_text(content)
    assert main([str(run)]) == 0
    assert Page(run).data["stages"]


def test_a_directory_without_a_run_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="give the --output-dir of a run that has started"):
        build_report(tmp_path)
    with pytest.raises(ValueError, match="which is no directory"):
        build_report(tmp_path / "none")
    assert main([str(tmp_path)]) == 2
    assert "no summary.json" in capsys.readouterr().err


def test_command_prints_scores_and_path(
    tmp_path: Path, write_run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(write_run(tmp_path))]) == 0
    printed = capsys.readouterr().out
    assert "scores in %" in printed and "dev2_no_language" in printed and printed.rstrip().endswith("report.html")


def test_completions_have_marked_tags_and_answers() -> None:
    assert [piece for piece in pieces("<think>a < b</think><answer>4</answer>") if piece[1]] == [
        ("mark", "<think>"), ("", "a < b"), ("mark", "</think>"),
        ("mark", "<answer>"), ("answer", "4"), ("mark", "</answer>"),
    ]  # fmt: skip
    assert list(pieces("|special_token|why|special_token|4"))[-1] == ("answer", "4")
    long = "".join(text for _, text in pieces("<think>" + "x" * 10_000 + "</think>"))
    assert "6,500 characters" in long and len(long) < 4_000


def test_every_reward_and_the_failures_stand_with_the_scores(tmp_path: Path, write_run: Callable[..., Path]) -> None:
    more = {"mine": 0.25, "failures": 3, "unscorable": 2}
    page = Page(change(write_run(tmp_path), lambda run: run["stages"][1]["eval_after"].update(more)))
    assert "language 53.0 55.0 +2.0 mine – 25.0 length" in page.text
    assert "zero: 3 samples with a failed reward (scored 0), 2 prompts without a readable gold." in page.text
    assert "failures – 3" in page.text and "unscorable – 2" in page.text


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs a browser")
def test_a_browser_draws_every_chart(tmp_path: Path, write_run: Callable[..., Path]) -> None:
    page = Page(write_run(tmp_path))
    command = ["chromium", "--headless", "--no-sandbox", "--dump-dom", (tmp_path / "report.html").as_uri()]
    drawn = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    curves = sum(len(stage["curves"]) + len(stage["load"]) for stage in page.data["stages"])
    assert drawn.count("<svg") == 2 + curves and "NaN" not in drawn[drawn.index("</script>") - 10 :]
    edges = sum(len(stage["sources"]) for stage in page.data["stages"])
    assert drawn.count('class="edge rows"') == 3 and drawn.count('class="edge"') == edges - 3
