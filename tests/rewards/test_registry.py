"""Names become functions: registry, dotted path, file; and every wrong name is one clear error."""

import subprocess
import sys

import pytest

from r1fast.rewards.registry import REWARDS, locate, resolve, reward


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
