"""Names become functions: registry, dotted path, file; verl's compute_score behind our signature; clear errors."""

import asyncio
import inspect
import subprocess
import sys

import pytest

from r1fast.rewards.registry import REWARDS, adapt_verl, is_adapted, is_verl_function, locate, resolve, reward


def test_builtin_rewards_are_there():
    names = ["accuracy", "completeness", "format", "language", "repetition"]
    assert [resolve(name) for name in names] == [REWARDS[name] for name in names]
    assert locate("accuracy") == "accuracy"


def test_dotted_path_and_file(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(
        "STATE = []\ndef one(completions, **_): return [1.0]\ndef two(**_): return STATE\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert resolve("my_rewards.one")(completions=["a"]) == [1.0]
    assert resolve("my_rewards:one")(completions=["a"]) == [1.0]
    monkeypatch.chdir(tmp_path)
    assert resolve("my_rewards.py:two")() is resolve(f"{tmp_path}/my_rewards.py:two")(), "one module per file"
    assert locate("my_rewards.py:two") == f"{tmp_path}/my_rewards.py:two"
    (tmp_path / "broken.py").write_text("import no_such_module\n")
    (tmp_path / "number.py").write_text("value = 3\n")
    (tmp_path / "script.py").write_text("import sys\ndef one(**_): return [1.0]\nsys.exit(0)\n")
    (tmp_path / "typo.py").write_text("def one(:\n")
    for name, message in [
        ("script.one", "SystemExit: 0"),
        ("script.py:one", "SystemExit: 0"),
        ("typo.one", "SyntaxError"),
        ("my_rewards.on", "cannot be imported"),
        ("my_rewards.py:on", "did you mean 'one'"),
        ("absent.py:one", "no file 'absent.py'"),
        ("broken.py:one", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("broken.one", "No module named 'no_such_module'"),
        ("number.value", "is a int, expected a function"),
        ("nowhere.to.be.found", "No module named 'nowhere'"),
    ]:
        with pytest.raises(ValueError, match=message):
            resolve(name)


def test_unknown_name_gets_the_nearest():
    with pytest.raises(ValueError, match=r"unknown reward 'acuracy'.*did you mean 'accuracy'"):
        resolve("acuracy")


def test_registered_reward_is_located_by_its_module(tmp_path, monkeypatch):
    monkeypatch.setattr("r1fast.rewards.registry.REWARDS", dict(REWARDS))
    (tmp_path / "registers.py").write_text(
        "from r1fast.rewards.registry import reward\n@reward('mine')\ndef mine(completions, **_): return [0.5]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    resolve("registers.mine")
    assert resolve("mine")(completions=["a"]) == [0.5]
    assert locate("mine") == "registers:mine"

    @reward("local")
    def local(**_):
        return []

    with pytest.raises(ValueError, match="a worker process cannot import"):
        locate("local")
    with pytest.raises(ValueError, match="registered twice"):
        reward("mine")(local)


def test_resolving_needs_neither_torch_nor_numpy():
    code = (
        "import sys; from r1fast.rewards.registry import resolve; resolve('accuracy');"
        "assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})


def compute_score(data_source, solution_str, ground_truth, extra_info=None, bonus=0.0):
    assert data_source in ("", "gsm8k") and extra_info in ({}, {"index": 7})
    return {"score": float(solution_str == ground_truth) + bonus, "acc": 1}


def plain_score(solution_str, ground_truth):
    return solution_str == ground_truth


def anything_goes(solution_str, ground_truth, **kwargs):
    return len(kwargs)


def test_rows_are_scored_one_by_one():
    adapted = adapt_verl(compute_score)
    assert adapted(completions=["14", "13"], answer=["14", "14"]) == [1.0, 0.0]
    columns = {"data_source": ["gsm8k"], "extra_info": [{"index": 7}]}
    assert adapted(completions=["14"], answer=["14"], bonus=0.5, **columns) == [1.5]
    assert adapt_verl(plain_score)(completions=["14"], answer=["14"], **columns) == [True]
    assert adapt_verl(anything_goes)(completions=["14"], answer=["14"]) == [2]


def test_rows_without_extra_information_and_results_without_a_score():
    columns = {"data_source": ["gsm8k"] * 2, "extra_info": [None, {"index": 7}]}
    assert adapt_verl(compute_score)(completions=["14", "1"], answer=["14", "14"], **columns) == [1.0, 0.0]
    with pytest.raises(ValueError, match=r"keys \['acc'\], expected 'score'"):
        adapt_verl(lambda solution_str, ground_truth: {"acc": 1.0})(completions=["14"], answer=["14"])


def test_coroutines_run_together():
    met = asyncio.Barrier(2)

    async def compute_later(solution_str, ground_truth):
        await met.wait()  # needs both rows at once
        return {"score": float(solution_str == ground_truth)}

    reward = adapt_verl(compute_later)
    assert is_adapted(reward) and not is_adapted(compute_later)
    assert asyncio.run(reward(completions=["14", "1"], answer=["14", "14"])) == [1.0, 0.0]


def test_signature_shows_the_columns_and_the_options():
    assert set(inspect.signature(adapt_verl(compute_score)).parameters) == {
        "completions",
        "answer",
        "data_source",
        "extra_info",
        "bonus",
    }


def test_verl_functions_are_recognised(tmp_path):
    assert is_verl_function(compute_score) and is_verl_function(plain_score)
    assert not is_verl_function(lambda completions, **_: [])
    file = tmp_path / "verl_reward.py"
    file.write_text("def compute_score(data_source, solution_str, ground_truth, extra_info=None): return 1.0\n")
    assert resolve(f"{file}:compute_score")(completions=["a"], answer=["b"]) == [1.0]
