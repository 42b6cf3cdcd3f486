"""Rows under canonical names from every kind of source, and one clear error for each way to be wrong."""

import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from r1fast.data.sources import load_hub, load_rows


def written(path: Path, rows: list[dict[str, Any]]) -> str:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_files_of_every_kind_give_the_same_rows(tmp_path: Path, suffix: str) -> None:
    rows = [{"prompt": "2+2?", "answer": "4", "level": 1}, {"prompt": "3+3?", "answer": "6", "level": 2}]
    assert load_rows([written(tmp_path / f"rows{suffix}", rows)], "prompts") == rows


def test_sources_follow_each_other(tmp_path: Path) -> None:
    first = written(tmp_path / "a.jsonl", [{"text": "a"}, {"text": "b"}])
    second = written(tmp_path / "b.parquet", [{"text": "c"}, {"text": "d"}])
    assert [row["text"] for row in load_rows([first, second], "sft")] == ["a", "b", "c", "d"]
    assert [row["text"] for row in load_rows([str(tmp_path)], "sft")] == ["a", "b", "c", "d"]  # a folder of files


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n\n{"text": oops}\n', r"rows.jsonl:3: wrong JSON at column 10: Expecting value"),
        ('{"text": "a"}\n[1]\n', r"rows.jsonl:2: got a JSON list, expected an object"),
        ('{"text": "a"}\n{"text": 3}\n', r"rows.jsonl:2: column 'text' is int 3, expected a string"),
        ("", r"rows.jsonl has no rows"),
    ],
)
def test_wrong_rows_are_named_by_file_and_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        load_rows([str(path)], "sft")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ('"\\ud83d"', r"\\ud83d is half of a surrogate pair"),
        ('{"a": 1, "a": 2}', r"the key 'a' is there twice"),
        ("7" * 5000, r"a number of 5000 digits; write it as a string"),
        ("1e400", r"the number 1e400 is more than a float can be"),
        ("-1e-400", r"the number -1e-400 is less than a float can be"),
        ("[" * 150 + "]" * 150, r"nested more than 100 levels deep"),
        ("[" * 100_000 + "]" * 100_000, r"nested too deep"),
    ],
    ids=["surrogate", "twice", "digits", "float", "tiny", "deep", "deeper"],
)
def test_json_that_python_reads_and_nobody_means(tmp_path: Path, value: str, message: str) -> None:
    row = f'{{"text": "t", "x": {value}}}'
    (tmp_path / "rows.jsonl").write_text(f'{{"text": "t"}}\n{row}\n')
    (tmp_path / "rows.json").write_text(f'[{{"text": "t"}}, {row}]')
    for where in (r"rows\.jsonl:2", r"rows\.json: row 1"):
        with pytest.raises(ValueError, match=f"{where}: {message}"):
            load_rows([str(tmp_path / where.partition(":")[0].replace("\\", ""))], "sft")


def test_wrong_json_past_the_rows_is_in_none_of_them(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text('{"data": [{"text": "t"}], "data": []}')
    with pytest.raises(ValueError, match=r"rows\.json: the key 'data' is there twice"):
        load_rows([str(tmp_path / "rows.json")], "sft")


def test_json_that_is_read_as_it_is_meant(tmp_path: Path) -> None:
    """A byte order mark, Windows' line ends, NaN, and a whole surrogate pair."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a", "x": NaN}\r\n\r\n{"text": "\\ud83e\\udd8a", "x": [-Infinity]}\r\n')
    assert load_rows([str(path)], "sft") == [{"text": "a", "x": None}, {"text": "🦊", "x": [None]}]
    (tmp_path / "rows.json").write_bytes(b'\xef\xbb\xbf{"data": [{"text": "a"}]}')
    assert load_rows([str(tmp_path / "rows.json")], "sft") == [{"text": "a"}]


def test_parquet_that_python_cannot_hold(tmp_path: Path) -> None:
    def refused(name: str, column: pa.Array, message: str) -> None:
        pq.write_table(
            pa.Table.from_arrays([pa.array(["a", "b"]), column], names=["text", name]), tmp_path / "x.parquet"
        )
        with pytest.raises(ValueError, match=message):
            load_rows([str(tmp_path / "x.parquet")], "sft")

    refused("x", pa.array([0, 2**50], pa.timestamp("s")), r"x.parquet: row 1: cannot be read: \w+")
    refused("x", pa.array([None, b"x"], pa.binary()), r"x.parquet: row 1: column 'x' holds bytes b'x'")
    refused("text", pa.array(["a", "b"]), r"x.parquet: two columns are named 'text'")
    pq.write_table(pa.table({"text": ["a"], "x": [float("nan")]}), tmp_path / "x.parquet")
    assert load_rows([str(tmp_path / "x.parquet")], "sft") == [{"text": "a", "x": None}]


def test_numbers_of_32_bits_are_what_was_written(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    numbers = pa.array([0.1, 3.14, None, float("nan"), 16777217.0], pa.float32())
    table = pa.table({"prompt": list("abcde"), "answer": numbers})
    pq.write_table(table, tmp_path / "x.parquet")
    datasets.Dataset(table).save_to_disk(str(tmp_path / "saved"))
    for source in ("x.parquet", "saved"):
        read = [row["answer"] for row in load_rows([str(tmp_path / source)], "prompts")]
        assert read == [0.1, 3.14, None, None, 16777216.0]


def test_numbers_within_lists_and_objects_and_of_16_bits(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    single, both = pa.list_(pa.float32()), pa.struct({"a": pa.float32(), "b": pa.float64()})
    columns = {
        "prompt": ["p"],
        "answer": pa.array([[0.1, None]], single),
        "half": pa.array([0.1], pa.float16()),
        "object": pa.array([{"a": [0.1]}], pa.struct({"a": single})),
        "both": pa.array([{"a": 0.5, "b": 0.1}], both),
    }
    table = pa.table(columns)
    pq.write_table(table, tmp_path / "x.parquet")
    datasets.Dataset(table).save_to_disk(str(tmp_path / "saved"))
    for source in ("x.parquet", "saved"):
        (row,) = load_rows([str(tmp_path / source)], "prompts")
        assert row == {
            "prompt": "p",
            "answer": [0.1, None],
            "half": 0.1,
            "object": {"a": [0.1]},
            "both": {"a": 0.5, "b": 0.1},
        }


def test_sources_that_are_no_names(tmp_path: Path) -> None:
    for source in ("", "a\0b.jsonl"):
        with pytest.raises(ValueError, match="names nothing"):
            load_rows([source], "sft")
    with pytest.raises(ValueError, match="cannot be read: File name too long"):
        load_rows(["x" * 5000 + ".jsonl"], "sft")
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(ValueError, match="neither a folder of"):
        load_rows([str(tmp_path)], "sft")


def test_files_that_are_not_what_they_say(tmp_path: Path) -> None:
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "\xe9"}\n')
    (tmp_path / "lines.json").write_text('{"text": "a"}\n{"text": "b"}\n')
    (tmp_path / "number.json").write_text("3")
    (tmp_path / "text.parquet").write_text("hello")
    (tmp_path / "rows.xlsx").write_text("text")
    for name, message in [
        ("latin.jsonl", r"latin.jsonl:1: not UTF-8"),
        ("lines.json", r"lines.json:2: wrong JSON.*\.jsonl file"),
        ("number.json", r"number.json: got a JSON int, expected a list of rows"),
        ("text.parquet", r"text.parquet: not a readable parquet file"),
        ("rows.xlsx", r"unknown kind of file '\.xlsx'; expected \.jsonl, \.json, \.parquet, \.csv, \.tsv"),
        ("txt.parquet", r"there is no such file; did you mean 'text\.parquet'\?"),
        ("absent/rows.jsonl", r"there is no such file, nor the folder"),
        ("absent", r"there is no such file or folder"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_rows([str(tmp_path / name)], "sft")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="neither a folder of"):
        load_rows([str(tmp_path / "empty")], "sft")


def test_a_row_of_a_parquet_file_is_named_by_its_number(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.parquet", [{"prompt": "a"}, {"prompt": None}])
    with pytest.raises(ValueError, match=r"rows.parquet: row 1: no column 'prompt'"):
        load_rows([path], "prompts")


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="unknown kind of rows 'prompt'"):
        load_rows(["a.jsonl"], "prompt")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected a list of at least one"):
        load_rows("a.jsonl", "sft")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected task:NAME/SPLIT"):
        load_rows(["task:arithmetic"], "prompts")


def test_embedded_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = types.ModuleType("r1fast.data.tasks")
    tasks.load = lambda name, split: [{"prompt": f"{name} of {split}", "answer": "1"}]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "r1fast.data.tasks", tasks)
    assert load_rows(["task:sums/train"], "prompts") == [{"prompt": "sums of train", "answer": "1"}]


def test_folders_of_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list([{"prompt": "p", "answer": "a"}])
    data.save_to_disk(str(tmp_path / "one"))
    assert load_rows([str(tmp_path / "one")], "prompts") == [{"prompt": "p", "answer": "a"}]
    datasets.DatasetDict({"train": data}).save_to_disk(str(tmp_path / "dict"))
    assert load_rows([str(tmp_path / "dict")], "prompts") == [{"prompt": "p", "answer": "a"}]
    datasets.DatasetDict({"train": data, "test": data}).save_to_disk(str(tmp_path / "many"))
    with pytest.raises(ValueError, match=r"many holds the splits train, test; name one of .*many:train, .*many:test"):
        load_rows([str(tmp_path / "many")], "prompts")
    for source in ("many:test", "many/test"):
        assert load_rows([str(tmp_path / source)], "prompts") == [{"prompt": "p", "answer": "a"}]


def test_hub_data_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(path: str, split: str, **how: Any) -> list[dict[str, str]]:
        asked.append((path, split, how))
        return [{"text": "t"}]

    def load_dataset_builder(path: str, **_: Any) -> Any:
        if path == "org/absent":
            raise FileNotFoundError("404")
        return types.SimpleNamespace(config=types.SimpleNamespace(data_files={"train": ["a.parquet"]}))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets, "load_dataset_builder", load_dataset_builder)
    assert load_rows(["org/name", "org/name:test", "org/name:main:test"], "sft") == [{"text": "t"}] * 3
    assert asked == [("org/name", "train", {}), ("org/name", "test", {}), ("org/name", "test", {"name": "main"})]
    with pytest.raises(ValueError, match="org/absent: no such file or folder here, and as a Hub data set it failed"):
        load_rows(["org/absent"], "sft")


def test_values_of_a_csv_file_of_the_hub_are_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What pandas would infer of them: a number, no value."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.csv").write_text("prompt,answer\na,007\nb,None\nc,1e5\nd,\n")
    rows = load_hub(str(tmp_path / "data"), None, "train")
    assert [row["answer"] for row in rows] == ["007", "None", "1e5", None]


@pytest.mark.parametrize("separator", [",", "\t"])
def test_values_of_tables_are_text(tmp_path: Path, separator: str) -> None:
    """With a byte order mark, Windows' line ends, pandas' unnamed index, quotes, a line break, an empty line."""
    golds = ["007", "1e5", "null", "true", "2024-01-31", '"1, 2"', '"a ""b""\t\r\nc"', ""]
    lines = ["\ufeff,prompt,answer", *(f"{i},p{i},{gold}" for i, gold in enumerate(golds)), ""]
    text = "\r\n".join(lines).replace(",", separator).replace("1\t 2", "1, 2")
    path = tmp_path / f"rows.{'csv' if separator == ',' else 'tsv'}"
    path.write_bytes(text.encode())
    read = [row["answer"] for row in load_rows([str(path)], "prompts")]
    assert read == ["007", "1e5", "null", "true", "2024-01-31", "1, 2", 'a "b"\t\r\nc', None]
    assert load_rows([str(path)], "prompts")[7] == {"": "7", "prompt": "p7", "answer": None}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"text\na\n\nb,c\n", r"rows.csv:4: 2 fields, expected one for each of the 1 columns"),
        (b"text,text\na,b\n", r"rows.csv:1: two columns are named 'text'"),
        (b'text\na\n"b\nc\n', r"rows.csv:3: wrong CSV: unexpected end of data; a field with quotes"),
        (b'text\n"a" b\n', r"rows.csv:2: wrong CSV: ',' expected after '\"'"),
        (b"text\n\xe9\n", r"rows.csv: not UTF-8"),
        (b"text\n", r"rows.csv has no rows"),
        (b"", r"rows.csv has no rows"),
        (b"txt;id\na;b\n", r"rows.csv:2: no column .*columns present: txt;id"),
    ],
    ids=["fields", "twice", "open", "quote", "latin", "header", "empty", "semicolons"],
)
def test_wrong_tables_are_named_by_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "rows.csv").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_rows([str(tmp_path / "rows.csv")], "sft")


def test_blanks_around_the_names_of_columns(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text('prompt, answer\np,"1, 2"\n')
    assert load_rows([str(tmp_path / "rows.csv")], "prompts") == [{"prompt": "p", "answer": "1, 2"}]


def test_a_long_field(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("text\n" + "x" * 200_000 + "\n")
    assert len(load_rows([str(tmp_path / "rows.csv")], "sft")[0]["text"]) == 200_000


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"], {"": [0, 1], ":train": [0, 1]}),
        (
            ["data/train-00000-of-00001.jsonl", "data/test-00000-of-00001.jsonl", "more.jsonl", "dataset_infos.json"],
            {":train": [0], ":test": [1], "": r"holds the splits test, train; name one of .*:test, .*:train"},
        ),
        (
            ["train.jsonl", "test.csv"],
            {":train": [0], ":test": [1], "": "holds the splits", ":dev": "no split 'dev': it"},
        ),
        (["gsm8k_train.jsonl", "gsm8k_valid.jsonl"], {":train": [0], ":validation": [1]}),
        (["math/train/algebra.jsonl", "math/test/algebra.jsonl"], {":train": [0], ":test": [1]}),
        (["a.jsonl", "trainer.jsonl", "sub/b.jsonl", ".hidden.jsonl"], {"": [0, 1], ":train": "holds no splits; name"}),
        (["a.jsonl", "train.jsonl"], {"": [0, 1], ":train": [1]}),
        (
            ["main/train-00000-of-00001.jsonl", "socratic/train-00000-of-00001.jsonl", "socratic/test.jsonl"],
            {"/main": [0], "/socratic:test": [2], ":train": r"holds several data sets, .*set/main, .*set/socratic"},
        ),
        (["train/en/a.jsonl", "train/fr/b.jsonl", "test/en/c.jsonl"], {":train": [0, 1], ":test": [2]}),
    ],
    ids=["shards", "splits", "files", "names", "folders", "none", "one", "configurations", "languages"],
)
def test_folders_of_the_hub(tmp_path: Path, files: list[str], expected: dict[str, Any]) -> None:
    for number, name in enumerate(files):
        path = tmp_path / "set" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"text\n{number}\n" if path.suffix == ".csv" else json.dumps({"text": str(number)}) + "\n")
    for split, found in expected.items():
        source = f"{tmp_path / 'set'}{split}"
        if isinstance(found, str):
            with pytest.raises(ValueError, match=found):
                load_rows([source], "sft")
        else:
            assert [int(row["text"]) for row in load_rows([source], "sft")] == found


def test_reasoning_gym() -> None:
    pytest.importorskip("reasoning_gym")
    rows = load_rows(["reasoning_gym:basic_arithmetic?size=3&seed=7"], "prompts")
    assert len(rows) == 3 and rows[0]["prompt"] and rows[0]["answer"]
    assert rows == load_rows(["reasoning_gym:basic_arithmetic?size=3&seed=7"], "prompts")
    with pytest.raises(ValueError, match="did you mean 'basic_arithmetic'"):
        load_rows(["reasoning_gym:basic_arithmetics"], "prompts")
    for query, message in (
        ("colour=red", "colour"),
        ("size=many", "row 0: cannot be read: TypeError"),
        ("size", r"expected NAME\?key=value"),
        ("size=2&size=3", "size is given twice"),
        ("size=[2", "size: ValueError"),
    ):
        with pytest.raises(ValueError, match=message):
            load_rows([f"reasoning_gym:basic_arithmetic?{query}"], "prompts")
    only = load_rows(["reasoning_gym:basic_arithmetic?size=9&operators=['-']&allow_parentheses=false"], "prompts")
    assert not any(sign in row["prompt"] for row in only for sign in "+*/(")


def test_sources_import_neither_torch_nor_datasets() -> None:
    code = "import sys, r1fast.data.sources; print([m for m in ('torch', 'datasets', 'pyarrow') if m in sys.modules])"
    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
