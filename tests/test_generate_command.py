"""python -m r1fast.generate: what it asks and writes, how it goes on, several processes, and what it refuses."""

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from r1fast import RolloutEngine, SamplingParams, generate, load_model
from r1fast.batch_file import BatchFile
from tests.forks import Forks
from tests.tiny_checkpoint import write_jsonl
from tests.zoo import fields, write_checkpoint

SYSTEM = {"role": "system", "content": "be brief"}
ROWS: list[dict[str, Any]] = [
    {"prompt": "What is 1 + 2 ?", "answer": 3, "id": "a"},
    {"messages": [SYSTEM, {"role": "user", "content": "red ?"}], "id": "b"},
    {"problem": "the dog ?", "solution": "lazy", "difficulty": 0.5, "id": "c"},
    *({"prompt": f"What is {i} * {i} ?", "id": str(i)} for i in range(7)),
]
QUICK = ("-n", "2", "--max-tokens", "6", "--seed", "3")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generate") / "model"
    return write_checkpoint(folder, **fields("llama", initializer_range=0.02, max_position_embeddings=128))


@pytest.fixture
def command(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "rows.jsonl", ROWS)

    def run(*argv: object) -> int:
        return generate.main(["--model", str(model), "--input", "rows.jsonl", *map(str, argv)])

    return run


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def messages_of(row: dict, system: dict) -> list[dict]:
    turns = row.get("messages") or [{"role": "user", "content": row.get("prompt") or row["problem"]}]
    return turns if turns[0]["role"] == "system" else [system, *turns]


def test_rows_are_asked_as_a_chat_and_kept(command: Any, model: Path, tmp_path: Path) -> None:
    options = ("--system", "count", "--temperature", "0.8", "--stop", "e", "--stop", "zz", "--token-ids")
    assert command("--output", "out.jsonl", *QUICK, *options) == 0
    found = rows_of(tmp_path / "out.jsonl")
    engine = RolloutEngine(*load_model(model))
    params = SamplingParams(n=2, max_tokens=6, seed=3, temperature=0.8, stop=["e", "zz"])
    system = {"role": "system", "content": "count"}
    for row, output, group in zip(
        ROWS, found, engine.chat([messages_of(row, system) for row in ROWS], params), strict=True
    ):
        assert {name: output.pop(name) for name in row} == row
        assert output == {
            "completions": [x.text for x in group], "finish_reasons": [x.finish_reason for x in group],
            "num_tokens": [len(x.token_ids) for x in group], "completion_ids": [x.token_ids for x in group],
            "cumulative_logprobs": [pytest.approx(sum(x.logprobs), abs=1e-4) for x in group],
        }  # fmt: skip
    reasons = [reason for output in found for reason in output["finish_reasons"]]
    assert set(reasons) == {"stop", "length"}
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("out")] == ["out.jsonl"]


def test_parquet_holds_the_same(command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of one chunk may have columns and types that those of another have not: `answer` is null in most."""
    assert command("--output", "out.jsonl", *QUICK) == 0
    monkeypatch.setattr(generate, "SAMPLES_PER_CHUNK", 4)
    assert command("--output", "out.parquet", *QUICK) == 0
    table = pq.read_table(tmp_path / "out.parquet")
    written = [{name: x for name, x in row.items() if x is not None} for row in table.to_pylist()]
    assert written == rows_of(tmp_path / "out.jsonl")
    assert command("--output", "again.jsonl", "--input", "out.parquet", *QUICK) == 2  # its columns are taken


def test_a_batch_that_was_stopped_goes_on(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("--output", "whole.jsonl", *QUICK) == 0
    monkeypatch.setattr(generate, "SAMPLES_PER_CHUNK", 6)
    asked: list[int] = []
    sample = RolloutEngine.generate

    def stop_at_the_third(engine: RolloutEngine, prompts: Any, *args: Any, **options: Any) -> Any:
        asked.append(len(prompts))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return sample(engine, prompts, *args, **options)

    monkeypatch.setattr(RolloutEngine, "generate", stop_at_the_third)
    assert command("--output", "out.jsonl", *QUICK) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()
    assert command("--output", "out.jsonl", *QUICK, "--temperature", "0.5") == 2
    assert "holds the beginning of a batch with another temperature" in capsys.readouterr().err
    monkeypatch.setattr(generate, "SAMPLES_PER_CHUNK", 2)  # a chunk is what it was at the start
    assert command("--output", "out.jsonl", *QUICK) == 0
    assert "going on after 6 of 10 rows" in capsys.readouterr().err
    assert asked == [3, 3, 3, 3, 1]
    assert (tmp_path / "out.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()


def test_two_processes_share_the_rows(command: Any, model: Path, tmp_path: Path, forks: Forks) -> None:
    assert command("--output", "one.jsonl", *QUICK) == 0
    argv = ["--model", model, "--input", "rows.jsonl", "--output", "two.jsonl", "--device", "cpu", *QUICK]
    forks.begin("r1fast.generate", *argv, log=tmp_path / "log", out=tmp_path / "said", cwd=tmp_path, ranks=2)
    assert forks.end() == [0, 0], (tmp_path / "log").read_text()
    assert rows_of(tmp_path / "two.jsonl") == rows_of(tmp_path / "one.jsonl")
    assert (tmp_path / "said").read_text() == "two.jsonl\n"
    forks.begin("r1fast.generate", *argv, log=tmp_path / "log", cwd=tmp_path, ranks=2)
    assert forks.end() == [2, 2]
    assert (tmp_path / "log").read_text().count("error: --output two.jsonl is there already") == 1


def test_a_rank_that_fails_is_not_waited_for(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Chunks go to whoever comes first, and nobody waits for one that will not come."""
    batch = BatchFile.open(tmp_path / "a.jsonl", {}, 6, 2, overwrite=False)
    other = BatchFile.open(tmp_path / "a.jsonl", {}, 6, 3, overwrite=False)
    assert other == batch and batch.take(0) and not other.take(0) and other.take(1)
    other.fail()
    batch.wait()
    assert not batch.take(2)
    again = BatchFile.open(tmp_path / "a.jsonl", {}, 6, 2, overwrite=False)
    assert again.take(0) and again.missing() == [0, 1, 2]

    def fail(*_: Any, **__: Any) -> None:
        raise FloatingPointError("the model's logits are not finite")

    monkeypatch.setattr(RolloutEngine, "generate", fail)
    assert command("--output", "out.jsonl", *QUICK) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "error: the model's logits are not finite"


def test_the_template_gets_its_variables(command: Any, tmp_path: Path, model: Path) -> None:
    thinking = shutil.copytree(model, tmp_path / "thinking")
    (thinking / "chat_template.jinja").write_text(
        "{{ messages[0].content }}{% if enable_thinking %} <think>{% endif %}"
    )
    write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "red"}])
    options = ("--model", thinking, "--token-ids", *QUICK)
    for output, more in (("no.jsonl", ()), ("yes.jsonl", ("--chat-template-kwargs", '{"enable_thinking": true}'))):
        assert command("--output", output, *options, *more) == 0
    assert rows_of(tmp_path / "no.jsonl") != rows_of(tmp_path / "yes.jsonl")
    assert command("--output", "o.jsonl", *options, "--chat-template-kwargs", '{"thought": true}') == 2
    with pytest.raises(SystemExit):
        command("--output", "o.jsonl", *options, "--chat-template-kwargs", "true")


@pytest.mark.parametrize(
    "option", [option for action in generate._parser()._actions for option in action.option_strings if option != "-h"]
)
def test_torchrun_leaves_every_option_alone(option: str) -> None:
    """Of what follows -m it refuses a word that may be short for several options of its own."""
    from torch.distributed.run import get_args_parser

    words = ["-m", "r1fast.generate", "--model", "m", option, "1"]
    assert get_args_parser().parse_args(words).training_script_args == words[2:]


def test_defaults_are_the_models_and_fit(command: Any, model: Path, tmp_path: Path) -> None:
    """No --max-tokens: what the longest prompt leaves, and not an error of positions."""
    write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "red " * 90}, {"prompt": "red"}])
    assert command("--output", "out.jsonl", "--limit", "2") == 0
    longest = [row["num_tokens"][0] for row in rows_of(tmp_path / "out.jsonl") if row["finish_reasons"] == ["length"]]
    assert max(longest, default=0) <= 128 - 90


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--output", "out.csv"], "--output out.csv: expected a file that ends with .jsonl or .parquet"),
        (["--output", "rows.jsonl"], "rows.jsonl is there already; choose another file, or replace it"),
        (["--output", "rows.jsonl", "--overwrite"], "--output rows.jsonl is the input; choose another file"),
        (["--output", "no/out.jsonl"], "there is no folder no"),
        (["--output", "o.parquet", "--input", "big.jsonl"], "do not fit into Parquet (OverflowError: "),
        (["--output", "o.jsonl", "--input", "none.jsonl"], "none.jsonl: there is no such file"),
        (["--output", "o.jsonl", "--input", "bad.jsonl"], "bad.jsonl:2: no column 'prompt'"),
        (["--output", "o.jsonl", "--input", "long.jsonl"], "long.jsonl:1: the prompt has "),
        (["--output", "o.jsonl", "--input", "long.jsonl", "--max-tokens", "90"], "with --max-tokens 90"),
        (["--output", "o.jsonl", "--input", "taken.jsonl"], "a column 'completions', which is that of the output"),
        (["--output", "o.parquet", "--input", "mixed.jsonl"], "do not fit into Parquet"),
        (["--output", "o.jsonl", "--n", "0"], "-n is 0; expected at least 1"),
        (["--output", "o.jsonl", "--temperature", "-1"], "temperature is -1.0; expected"),
        (["--output", "o.jsonl", "--model", "nowhere/at/all"], "nowhere/at/all: no such folder"),
        (["--output", "o.jsonl", "--device", "cuda:77"], "--device cuda:77: torch sees "),
        (["--output", "o.jsonl", "--device", "gpu"], "--device gpu: expected cpu, cuda or cuda:N"),
    ],
    ids=lambda value: "-".join(value[2:]) or value[1] if isinstance(value, list) else "",
)  # fmt: skip
def test_what_is_wrong_is_one_line(
    command: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    write_jsonl(tmp_path / "bad.jsonl", [{"prompt": "a"}, {"question_text": "b"}])
    write_jsonl(tmp_path / "long.jsonl", [{"prompt": "red " * (140 if "90" not in argv else 60)}])
    write_jsonl(tmp_path / "taken.jsonl", [{"prompt": "a", "completions": "b"}])
    write_jsonl(tmp_path / "big.jsonl", [{"prompt": "a", "id": 2**70}])
    write_jsonl(tmp_path / "mixed.jsonl", [{"prompt": "a", "id": 1}, {"prompt": "a", "id": "x"}])
    before = sorted(tmp_path.rglob("*"))
    assert command(*argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and err.startswith("error: ") and message in err
    assert sorted(tmp_path.rglob("*")) == before


def test_overwrite_replaces(command: Any, tmp_path: Path) -> None:
    (tmp_path / "out.jsonl").write_text("precious")
    assert command("--output", "out.jsonl", *QUICK) == 2
    assert (tmp_path / "out.jsonl").read_text() == "precious"
    assert command("--output", "out.jsonl", *QUICK, "--overwrite") == 0
    assert len(rows_of(tmp_path / "out.jsonl")) == len(ROWS)


def test_a_model_without_a_chat_template_says_how(
    command: Any, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = write_checkpoint(tmp_path / "bare", **fields("llama", max_position_embeddings=512))
    (bare / "chat_template.jinja").unlink()
    assert command("--output", "o.jsonl", *QUICK, "--limit", "1", "--model", bare) == 2
    assert (
        "rows.jsonl:1: the model has no chat template; say how to ask it: --prompt-template" in capsys.readouterr().err
    )
    assert command("--output", "o.jsonl", *QUICK, "--limit", "1", "--model", bare, "--prompt-template", "r1_zero") == 0
