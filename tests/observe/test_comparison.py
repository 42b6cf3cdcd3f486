"""Several runs on one page."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from r1fast.observe.comparison import COLOURS, compared_scores, different_settings, overlaid
from r1fast.observe.run_files import load_run
from r1fast.report import main
from tests.observe.conftest import make_run
from tests.observe.test_page import Page, change


def other(summary: dict[str, Any]) -> None:
    """Another seed and learning rate, a stage less, a better zero, and a stage measured otherwise."""
    summary["seed"] = 1
    del summary["stages"][-1]
    summary["stages"][1]["settings"]["learning_rate"] = 1e-3
    summary["stages"][1]["eval_after"] |= {"pass@1": 0.891, "mine": 3.5}
    summary["stages"][3]["eval_after"]["temperature"] = 0.6


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folders = [tmp_path_factory.mktemp("runs") / name for name in ("first", "second")]
    for folder in folders:
        folder.mkdir()
        make_run(folder)
    return folders[0], change(folders[1], other)


def test_the_page(two: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "both.html"
    assert main([*map(str, two), "--output", str(path)]) == 0
    assert capsys.readouterr().out == f"{path}\n"
    page = Page(path)
    for expected in ("2 runs first second", "zero.learning_rate 5e-4 0.001", "seed 0 1", "second − first",
                     "zero pass@1 % 79.1 ± 4.0 89.1 ± 4.0 +10.0 ± 5.6", "temperature 0.6"):  # fmt: skip
        assert expected in page.text
    assert {link.removeprefix("#") for link in page.links} <= set(page.ids)
    reward = page.data["stages"][1]["curves"]["reward"]
    assert [line["label"] for line in reward] == ["first", "second"] and reward[0]["colour"] != reward[1]["colour"]


def test_scores_are_compared_where_they_were_measured_alike(two: tuple[Path, Path]) -> None:
    runs = {folder.name: load_run(folder) for folder in two}
    same, cooler = compared_scores(runs, dict(zip(runs, COLOURS)))
    rows = {(model, metric): (values, differences) for model, metric, values, differences in same.rows}
    assert rows["zero", "pass@1 %"][1] == [("+10.0 ± 5.6", "up")]
    assert rows["base", "pass@1 %"][1] == [("+0.0 ± 3.8", "")]
    assert rows["zero", "mine"] == (["–", "3.5"], [("", "")])
    assert rows["student", "pass@1 %"][0] == ["50.6 ± 4.9", "–"]
    assert [row[0] for row in cooler.rows] == ["dev1"] * len(cooler.rows)


def test_settings_and_curves(two: tuple[Path, Path]) -> None:
    runs = {folder.name: load_run(folder) for folder in two}
    settings = dict(different_settings(runs))
    assert settings["seed"] == ["0", "1"] and settings["zero.learning_rate"] == ["5e-4", "0.001"]
    assert settings["student.max_steps"] == ["120", "–"] and "base.learning_rate" not in settings
    stages = {stage["name"]: stage["curves"] for stage in overlaid(runs, dict(zip(runs, COLOURS)))}
    assert len(stages["zero"]["loss"]) == 2 and len(stages["student"]["loss"]) == 1


def test_what_is_no_comparison(
    two: tuple[Path, Path], tmp_path: Path, write_run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    first = str(two[0])
    empty, nine = str(tmp_path / "empty"), [str(tmp_path / f"run{i}") for i in range(9)]
    Path(empty).mkdir()
    for arguments, problem in (
        ([first, first], "is given twice"),
        ([first, empty], "no summary.json and no <stage>/metrics.jsonl in it"),
        ([first, str(tmp_path / "none")], "which is no directory"),
        (nine, "got 9 runs, at most 8"),
    ):
        assert main([*arguments, "--output", str(tmp_path / "page.html")]) == 2
        assert problem in capsys.readouterr().err and not (tmp_path / "page.html").exists()
    with pytest.raises(SystemExit):
        main([first, "--output", "page.html"])
    assert "--output is of a page of several runs" in capsys.readouterr().err
    for output in ("summary.json", "page", "nowhere/page.html"):
        with pytest.raises(SystemExit):
            main([*map(str, two), "--output", str(tmp_path / output)])
        assert "expected a file that ends with .html, in a folder that is there" in capsys.readouterr().err


def test_runs_of_one_name_go_by_their_paths(tmp_path: Path) -> None:
    folders = [tmp_path / name / "run" for name in ("a", "b")]
    for folder in folders:
        folder.mkdir(parents=True)
        make_run(folder)
    assert main([*map(str, folders), "--output", str(tmp_path / "page.html")]) == 0
    assert [line["label"] for line in Page(tmp_path / "page.html").data["stages"][0]["curves"]["loss"]] == [
        str(folder.resolve()) for folder in folders
    ]
    summary = json.loads((folders[0] / "summary.json").read_text())
    assert summary["recipe"] == "tiny"
