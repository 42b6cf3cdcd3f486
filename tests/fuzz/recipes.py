"""Recipes as nobody means them: valid ones, changed by structure and by text. A case is a function of its number."""

import random
from collections.abc import Callable
from functools import cache
from typing import Any

import yaml

from r1fast.config import RECIPES
from r1fast.models.families import FAMILIES
from r1fast.schema import KINDS
from tests.tiny_checkpoint import DEEPSEEK_V3, GRPO, QWEN2

LLAMA = {**QWEN2, "model_type": "llama", "max_position_embeddings": 1024}
QWEN3_MOE = {
    **LLAMA,
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
SHORT = {"prompt_template": "chat", "max_prompt_length": 40, "max_completion_length": 8}
EVAL = {"eval_files": ["train.jsonl"], "eval_num_samples": 2, "eval_limit": 5}
PRETRAIN = {"name": "base", "kind": "pretrain", "train_files": ["sft.jsonl"], "max_steps": 3, "max_length": 128}
STAGES: dict[str, dict[str, Any]] = {
    "grpo": {**GRPO, **EVAL, "rewards": {"accuracy": 1.0, "format": {"weight": 0.5, "domains": ["math"]}}},
    "dapo": {
        **GRPO, "loss_type": "dapo", "epsilon_high": 0.28, "beta": 0.0, "dynamic_sampling_refills": 1,
        "overlong_buffer_length": 4, "overlong_penalty": 0.5, "skip_zero_variance_groups": True,
    },
    "pretrain": {**PRETRAIN, "architecture": LLAMA, "warmup_steps": 1},
    "pretrain-v3": {**PRETRAIN, "architecture": DEEPSEEK_V3, "router_bias_update_rate": 0.001, "optimizer": "muon"},
    "pretrain-moe": {**PRETRAIN, "architecture": QWEN3_MOE, "tokenizer": "checkpoint", "lr_scheduler_type": "wsd"},
    "sft": {"name": "tuned", "kind": "sft", "train_files": ["sft.jsonl"], "batch_size": 2, "warmup_steps": 2},
    "collect": {
        "name": "cold", "kind": "collect", "train_files": ["train.jsonl"], "num_prompts": 4, **SHORT,
        "few_shot": {"examples_files": ["examples.jsonl"], "num_examples": 1}, "filters": {"min_language": 0.5},
    },
    "reject": {"name": "kept", "kind": "reject", "train_files": ["train.jsonl"], "max_per_prompt": 2, **SHORT},
    "reward_model": {"name": "rm", "kind": "reward_model", "train_files": ["pairs.jsonl"], "loss": "pairwise"},
    "distill": {
        "name": "student", "kind": "distill", "teacher": "checkpoint", "train_files": ["train.jsonl"], **SHORT,
        "max_length": 100,
    },
    "evaluate": {"name": "test", "kind": "evaluate", **EVAL, **SHORT, "eval_rewards": {"accuracy": {}}},
}  # fmt: skip


class Mapping(list):
    """[key, value] pairs: a mapping that may hold a key twice."""


class Raw(str):
    """YAML that is written as it stands."""


@cache
def bases() -> list[dict[str, Any]]:
    """One recipe for each stage, a chain of them, and those that are shipped; not to be changed."""
    alone = [{"model": {"path": "checkpoint"}, "stages": [stage]} for stage in STAGES.values()]
    names = ("pretrain", "sft", "reward_model", "grpo", "reject", "evaluate")
    chain: dict[str, Any] = {"seed": 7, "model": {"path": "@base"}, "stages": [dict(STAGES[name]) for name in names]}
    chain["stages"][3] |= {"model": "@tuned", "reward_models": {"helpful": {"model": "@rm"}}}
    shipped = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted(RECIPES.glob("*.yaml"))]
    return [*alone * 3, chain, chain, *shipped]


NUMBERS: list[Any] = [
    0, 1, 2, 3, 7, 8, 64, 100, -1, 2**31 - 1, 2**31, 2**53 + 1, 2**63, 2**64, 10**12, 10**40, 0.0, -0.0, 0.5, 1.0, 4.57,
    1e-6, 1e-30, 1e30, 1e308, -1e-3,
]  # fmt: skip
TEXTS: list[Any] = [
    "", " ", "x", "@", "@base", "@zero", "@tuned", "@nobody", "train.jsonl", "sft.jsonl", "pairs.jsonl", "labels.jsonl",
    "checkpoint", "no/such/file.jsonl", "task:arithmetic/train", "task:", "accuracy", "format", "json.dumps", "chat",
    "few_shot", "tokenizer", "cosine", "adamw", "10", "1e-6", "true", "null", "..", "a/b", "config.yaml", "latest",
    "zero", "ZERO", "é", "推理", "x" * 300, "x" * 5000, "a.b.c", "\x00", "\ud83d", "a\nb", "/dev/zero", "~", "{}",
    "1:30",
]  # fmt: skip
RAW = [
    "!!int x", "!!python/name:os.system", "!!binary x", "!!set {a, b}", "!!timestamp 2024-13-45", "2024-13-45",
    "&a [*a]", "&a {<<: *a}", "*a", "*undefined", "1:30", "0777", "0o17", "0x1F", "1_000", "1e-6", "1e5", "1.", ".5",
    ".inf", "-.INF", ".nan", "1e999", "1e-999", "9" * 5000, "yes", "on", "True", "~", "null", "[", "{", "]", "}", "- a",
    "? [a]", ": x", "|", ">", "'", '"', "%", "@x", "`", "\t", "#", "[" * 60 + "]" * 60, "[" * 3000, '"\\0"',
    '"\\ud83d"', '"\\UFFFFFFFF"', "[a, b", "{a: 1, a: 2}", "{1: x}", "{null: x}", "{[a]: b}", "{<<: 3}",
    "{<<: [{a: 1}, {a: 2}]}", "&x {a: 1}", "[&y a, *y, *y]", "!x y", "--- a", "... b", "\n", "=", "<<",
]  # fmt: skip
BOMB = "x-0: &b0 [a, a]\n" + "".join(f"x-{i}: &b{i} [{', '.join([f'*b{i - 1}'] * 10)}]\n" for i in range(1, 9))
LINES = [
    "seed: 1", "stages: []", "model: {path: x}", "defaults: tiny", "defaults: [mine.yaml]", "1: x", "- a", "? b",
    "null:",
    "x-a: &a {max_steps: 2}", "<<: *a", "<<: {seed: 3}", "a: b: c", "\tseed: 1", "  seed: 1", "%YAML 1.1", "---", "...",
    "!!map {}", "name: 2024-01-15", "name: no", "seed: 1_000", BOMB, "x: *b8", "\ufeffseed: 1", "seed: 1\rseed: 2",
]  # fmt: skip


def junk(rng: random.Random, depth: int = 0) -> Any:
    """A value of any type."""
    kind = rng.randrange(9 if depth < 3 else 6)
    if kind < 2:
        return rng.choice(NUMBERS)
    if kind == 2:
        return rng.choice(TEXTS)
    if kind == 3:
        return Raw(rng.choice(RAW))
    if kind < 6:
        return rng.choice([None, True, False, [], Mapping()])
    if kind == 6:
        return [junk(rng, depth + 1) for _ in range(rng.randrange(4))]
    return Mapping([rng.choice(["a", "weight", "max_steps", "name", "kind"]), junk(rng, depth + 1)] for _ in range(2))


def option(rng: random.Random, kind: str | None = None) -> tuple[str, Any]:
    """An option that a kind of stage has, with a value that may suit it."""
    model = KINDS[kind if kind in KINDS else rng.choice(sorted(KINDS))]
    name = rng.choice(sorted(model.model_fields))
    default = model.model_fields[name].get_default(call_default_factory=True)
    if isinstance(default, bool):
        return name, rng.choice([True, False])
    if isinstance(default, int):
        return name, rng.choice([1, 2, 3, 4, 8, 16, 300, default, default + 1])
    if isinstance(default, float):
        return name, rng.choice([0.0, 0.1, 0.5, 1.0, 2.0, default, default * 2])
    if isinstance(default, (str, type(None))):
        near = [text for text in TEXTS if text in str(model.model_fields[name].annotation)]
        return name, rng.choice([*near, 1, 2, 4, 0.5, "checkpoint", "@base", "auto", None])
    return name, rng.choice([[], ["train.jsonl"], {}, {"accuracy": 1.0}, {"math": 1}, {"accuracy": {}}, default])


def as_pairs(node: Any) -> Any:
    if isinstance(node, dict):
        return Mapping([key, as_pairs(value)] for key, value in node.items())
    return [as_pairs(value) for value in node] if isinstance(node, list) else node


def holders(node: Any) -> list[list[Any]]:
    """Every list and pair below, whose items can be replaced; of a pair the value is item 1."""
    found = [node] if isinstance(node, list) and node else []
    for child in node if isinstance(node, list) else ():
        found += holders(child)
    return found


def mappings(node: Any) -> list[Mapping]:
    return [found for found in [node, *holders(node)] if isinstance(found, Mapping)]


def _drop(root: Mapping, rng: random.Random) -> None:
    chosen = rng.choice(mappings(root))
    if chosen:
        chosen.pop(rng.randrange(len(chosen)))


def _repeat(root: Mapping, rng: random.Random) -> None:
    chosen = rng.choice(mappings(root))
    if chosen:
        chosen.append([rng.choice(chosen)[0], junk(rng)])


def _rename(root: Mapping, rng: random.Random) -> None:
    chosen = rng.choice(mappings(root))
    if chosen:
        pair = rng.choice(chosen)
        pair[0] = rng.choice(
            [str(pair[0])[:-1], f"{pair[0]}s", option(rng)[0], rng.choice(TEXTS), Raw(rng.choice(RAW))]
        )


def _replace(root: Mapping, rng: random.Random) -> None:
    chosen = rng.choice([holder for holder in holders(root) if not isinstance(holder, Mapping)])
    chosen[-1 if len(chosen) == 2 else rng.randrange(len(chosen))] = junk(rng)


def _set_option(root: Mapping, rng: random.Random) -> None:
    """In a stage, where it may even be right."""
    stages = next((value for key, value in root if key == "stages"), None)
    stages = [stage for stage in stages if isinstance(stage, Mapping)] if isinstance(stages, list) else []
    target = rng.choice(stages) if stages else root
    kind = next((value for key, value in target if key == "kind" and isinstance(value, str)), None)
    name, value = option(rng, kind if rng.random() < 0.9 else None)
    kept = [pair for pair in target if pair[0] != name]
    target[:] = [*kept, [name, as_pairs(value)]]


def _set_field(root: Mapping, rng: random.Random) -> None:
    """Of an architecture."""
    found = [pair[1] for holder in mappings(root) for pair in holder if pair[0] == "architecture"]
    found = [target for target in found if isinstance(target, Mapping)]
    if found:
        target = rng.choice(found)
        name = rng.choice(
            [*(name for family in FAMILIES.values() for name in family.fields), "rope_theta", "num_experts"]
        )
        value = rng.choice([0, 1, 2, 3, 4, 6, 8, 16, 32, 33, 64, -1, True, 0.5, None, rng.choice(NUMBERS), junk(rng)])
        target[:] = [*(pair for pair in target if pair[0] != name), [name, value]]


def _swap(root: Mapping, rng: random.Random) -> None:
    one, two = (rng.choice([found for found in holders(root) if not isinstance(found, Mapping)]) for _ in range(2))
    one[-1], two[-1] = two[-1], one[-1]


Mutation = Callable[[Mapping, random.Random], None]
GENTLE: list[Mutation] = [_set_option, _set_option, _set_option, _set_field, _drop]  # half of them are accepted
ROUGH: list[Mutation] = [_drop, _repeat, _rename, _replace, _replace, _set_option, _set_field, _swap]


def emit(node: Any, depth: int = 0) -> str:
    """YAML in flow style, below stages; a swap may have made a cycle, which is cut."""
    if depth > 70:
        return "x"
    if isinstance(node, Raw):
        return str(node)
    if isinstance(node, Mapping):
        pairs = [pair for pair in node if isinstance(pair, list) and len(pair) == 2]
        return "{" + ", ".join(f"{emit(key, depth + 1)}: {emit(value, depth + 1)}" for key, value in pairs) + "}"
    if isinstance(node, list):
        return "[" + ", ".join(emit(item, depth + 1) for item in node) + "]"
    if isinstance(node, str):
        plain = node.isascii() and node.replace("_", "a").replace("-", "a").isalnum()
        return node if plain else '"' + "".join(_escaped(character) for character in node) + '"'
    return "null" if node is None else str(node).lower() if isinstance(node, bool) else repr(node)


def _escaped(character: str) -> str:
    return character if character.isprintable() and character not in '"\\' else f"\\U{ord(character):08X}"


def structural(rng: random.Random, base: dict[str, Any]) -> bytes:
    root, mutations = as_pairs(base), rng.choice([GENTLE, ROUGH])
    for _ in range(rng.choice([1, 1, 1, 2])):
        rng.choice(mutations)(root, rng)
        if not holders(root) or not isinstance(root, Mapping):
            break
    lines = [f"{emit(pair[0])}: {emit(pair[1])}" for pair in root if isinstance(pair, list) and len(pair) == 2]
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def textual(rng: random.Random, base: dict[str, Any]) -> bytes:
    text = yaml.safe_dump(base, sort_keys=False)
    for _ in range(rng.choice([1, 1, 2, 4])):
        place, lines = rng.randrange(len(text) + 1), text.split("\n")
        row = rng.randrange(len(lines))
        kind = rng.randrange(7)
        if kind == 0:
            text = text[:place] + rng.choice(RAW) + text[place:]
        elif kind == 1:
            lines.insert(row, rng.choice(LINES))
        elif kind == 2:
            lines[row] = rng.choice(["", " " + lines[row], lines[row].strip(), lines[row].replace(":", "", 1)])
        elif kind == 3:
            lines.insert(rng.randrange(len(lines)), lines[row])
        elif kind == 4:
            text = text[:place]
        elif kind == 5:
            text = text[:place] + text[place + rng.randrange(1, 20) :]
        else:
            text = text[:place] + rng.choice("\t\x00\x07\ufeff\u2028:#&*!|>'\"%@`{}[],-?\n ") + text[place:]
        text = "\n".join(lines) if kind in (1, 2, 3) else text
    content = bytearray(text.encode())
    for _ in range(rng.choice([0, 0, 0, 1, 3])):
        if content:
            content[rng.randrange(len(content))] = rng.randrange(256)
    return bytes(content)


def recipe(number: int) -> bytes:
    """The recipe file of case `number`."""
    rng = random.Random(f"recipes,{number}")
    base = rng.choice(bases())
    return structural(rng, base) if rng.random() < 0.65 else textual(rng, base)
