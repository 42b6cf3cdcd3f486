"""The scalars of a recipe, and YAML that a library would fail on, read as something else, or never finish."""

import pytest
import yaml

from r1fast.config import RECIPES
from r1fast.recipe_yaml import dump_yaml, load_yaml

SCALARS = [
    ("1e-6", 1e-6), ("1E5", 1e5), ("1.", 1.0), (".5", 0.5), ("-0.0", -0.0), ("10", 10), ("-3", -3), ("+3", 3),
    ("0x1F", 31), ("0o17", 15), ("true", True), ("False", False), ("~", None), ("null", None), ("", None),
    ("yes", "yes"), ("on", "on"), ("off", "off"), ("1:30", "1:30"), ("0777", "0777"), ("1_000", "1_000"),
    ("2024-01-15", "2024-01-15"), ("2024-13-45", "2024-13-45"), ("0b1", "0b1"), ("'10'", "10"), ("=", "="),
    ("'<<'", "<<"), ('"a\\tb"', "a\tb"), (str(2**63), 2**63),
]  # fmt: skip


@pytest.mark.parametrize(("text", "value"), SCALARS, ids=[text or "empty" for text, _ in SCALARS])
def test_scalars_are_those_of_yaml_1_2(text: str, value: object) -> None:
    got = load_yaml(f"key: {text}")["key"]
    assert (got, type(got)) == (value, type(value))
    assert repr(load_yaml(dump_yaml({"key": value}))["key"]) == repr(value)


def test_text_is_written_so_that_every_reader_reads_it_back() -> None:
    texts = [text for text, _ in SCALARS if "\\" not in text] + [
        "@a",
        "- a",
        "a: b",
        "a #b",
        " a ",
        "a\nb",
        "推理",
        "x" * 300,
    ]
    for text in texts:
        for data in ({"key": text}, {text: 1}, [text]):
            assert load_yaml(dump_yaml(data)) == data == yaml.safe_load(dump_yaml(data))


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_shipped_recipes_read_as_yaml_1_1_too(name: str) -> None:
    text = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8")
    assert repr(load_yaml(text)) == repr(yaml.safe_load(text))


BOMB = "x0: &x0 [a, a]\n" + "".join(f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 10)}]\n" for i in range(1, 9))
WRONG_YAML = {
    "tag": ("seed: !!int x", ["line 1, column 7", "the tag !!int"]),
    "python-tag": ("seed: !!python/name:os.system", ["the tag !!python/name:os.system"]),
    "binary": ("name: !!binary aGk=", ["the tag !!binary"]),
    "timestamp": ("name: !!timestamp 2024-13-45", ["the tag !!timestamp"]),
    "own-tag": ("!recipe {seed: 1}", ["the tag !recipe"]),
    "anchor-in-itself": ("a: &a [*a]", ["contains itself"]),
    "merge-of-itself": ("a: &a {<<: *a}", ["contains itself"]),
    "no-anchor": ("a: *b", ["undefined alias 'b'"]),
    "bomb": (BOMB, ["more than 20000 values"]),
    "brackets": ("a: " + "[" * 3000, ["nested deeper than 50"]),
    "dashes": ("- " * 3000, ["nested deeper than 50"]),
    "aliases-of-aliases": ("".join(f"a{i}: &a{i} [{f'*a{i - 1}' if i else 1}]\n" for i in range(99)), ["nested"]),
    "many": (f"a: [{'a,' * 21_000}]", ["more than 20000 values"]),
    "duplicate": ("seed: 1\nname: a\nseed: 2", ["line 3", "'seed' is given twice, first in line 1"]),
    "duplicate-below": ("model:\n  path: a\n  path: b", ["line 3", "'path' is given twice"]),
    "integer-key": ("1: x", ["got '1' as a key", "quotes"]),
    "null-key": ("null: x", ["got 'null' as a key"]),
    "list-key": ("[a]: b", ["got a sequence as a key"]),
    "merge-of-a-number": ("<<: 3", ["<< expects an alias of a mapping"]),
    "nul": ("name: \0", ["line 1", "U+0000"]),
    "escaped-nul": ('name: "\\0"', ["U+0000"]),
    "surrogate": ('name: "\\ud83d"', ["U+D83D"]),
    "beyond-unicode": ('name: "\\UFFFFFFFF"', ["cannot be read"]),
    "tab": ("name: x\n\tseed: 1", ["line 2", "\\t"]),
    "two-documents": ("seed: 1\n---\nseed: 2", ["another document"]),
    "digits": ("seed: " + "9" * 5000, ["more than 64 bits"]),
    "version": ("%YAML 1." + "1" * 5000 + "\n---\nseed: 1", ["cannot be read"]),
    "too-large-a-number": ("seed: 1e999", ["does not fit into 64 bits"]),
    "too-small-a-number": ("seed: 1e-999", ["does not fit into 64 bits"]),
}


@pytest.mark.parametrize("case", WRONG_YAML)
def test_wrong_yaml_is_one_line(case: str) -> None:
    text, parts = WRONG_YAML[case]
    with pytest.raises(ValueError, match=r"line|cannot be read") as error:
        load_yaml(text)
    message = str(error.value)
    for part in parts:
        assert part in message
    assert "\n" not in message and len(message) < 500
