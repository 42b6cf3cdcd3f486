"""The pool survives whatever a reward does, and refuses what cannot work before any work."""

import logging
import os
import time

import numpy as np
import pytest

from r1fast.rewards.pool import RewardPool, headline
from r1fast.rewards.process import WorkerProcess, memory_share

REWARDS_PY = """
import asyncio, os, re, subprocess, sys, time

def length(completions, scale=1.0, **columns):
    return [scale * len(c) for c in completions]

def hangs(completions, **_):
    if "hang" in completions:
        while True:
            pass
    return [1.0] * len(completions)

def regex(completions, **_):  # holds the interpreter lock for ever
    if "hang" in completions:
        re.match(r"(a+)+$", "a" * 64 + "b")
    return [1.0] * len(completions)

def spawns(completions, pid_file, **_):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    open(pid_file[0], "w").write(str(child.pid))
    time.sleep(600)

def exits(completions, **_):
    if "exit" in completions:
        os._exit(3)
    if "segfault" in completions:
        import ctypes
        ctypes.string_at(0)
    if "quit" in completions:
        sys.exit(5)
    return [1.0] * len(completions)

def noisy(completions, **_):
    print("noise" * 10_000)
    os.write(1, b"\\x00" * 100_000)
    subprocess.run(["echo", "noise of a child"])
    return [1.0] * len(completions)

def raises(completions, **_):
    raise KeyError("what went wrong")

def speaks_in_lines(completions, **_):
    raise ValueError("first\\n  second\\n" + "x" * 1000)

async def slow(completions, **_):
    await asyncio.sleep(0.01)
    return [None if c == "none" else 2.0 for c in completions]

def short(completions, **_):
    return [1.0] * (len(completions) - 1)

def texts(completions, **_):
    return ["1.0"] * len(completions)

def infinite(completions, **_):
    return [float("inf")] * len(completions)

def scalar(completions, **_):
    return 1.0

def nans(completions, **_):
    return [float("nan")] * len(completions)

def sees(prompts, completions, completion_ids, hint, **_):
    return [float(p == "p" and i == [1, 2] and h == "h") for p, i, h in zip(prompts, completion_ids, hint)]

def process(completions, **_):
    return [os.getpid()] * len(completions)

def expendable(completions, **_):
    return [int(open("/proc/self/oom_score_adj").read())] * len(completions)

def chunk(completions, **_):
    return [len(completions)] * len(completions)

def positional(completions, /):
    return []

def compute_score(data_source, solution_str, ground_truth, extra_info=None, bonus=0.0):
    return {"score": float(solution_str == ground_truth) + bonus}
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    file = tmp_path_factory.mktemp("rewards") / "user_rewards.py"
    file.write_text(REWARDS_PY)
    return str(file)


def score(pool, completions, **columns):
    num_rows = len(completions)
    return pool.score(["p"] * num_rows, completions, [[1, 2]] * num_rows, columns)


def only(result):
    (values,) = result.values.values()
    return values.tolist()


def is_alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def test_builtin_rewards():
    completions = [
        "<think>real thought</think><answer>14</answer>",
        "<think></think><answer>14</answer>",
        "<think>real thought</think><answer>13</answer>",
        "<think>real thought</think><answer>13</answer>",
    ]
    with RewardPool({"accuracy": {}, "format": {}, "language": {}}) as pool:
        result = score(pool, completions, answer=["14", "14", "14", None], language=["en", None, None, None])
    assert result.failures == []
    np.testing.assert_array_equal(result.values["accuracy"], [1, 1, 0, np.nan])
    np.testing.assert_array_equal(result.values["format"], [1, 0, 1, 1])
    np.testing.assert_array_equal(result.values["language"], [1, np.nan, np.nan, np.nan])
    assert result.values["language"].dtype == np.float64


def test_formulas_are_compared_inside_a_worker():
    with RewardPool({"accuracy": {}}) as pool:
        result = score(pool, ["<think>hm</think><answer>$\\frac12 x$</answer>"], answer=["x/2"])
    assert only(result) == [1.0]


@pytest.mark.parametrize("name", ["hangs", "regex"])
def test_a_hanging_reward_is_killed_and_the_next_call_works(path, name, caplog):
    with RewardPool({f"{path}:{name}": {}, "format": {}}, timeout_s=0.5) as pool:
        assert score(pool, ["fine"]).values[f"{path}:{name}"].tolist() == [1.0]
        start = time.monotonic()
        with caplog.at_level(logging.WARNING):
            result = score(pool, ["hang"] + ["fine"] * 64)
        assert time.monotonic() - start < 20.0  # four limits of half a second; the rest is the start of processes
        values = result.values[f"{path}:{name}"]
        assert values.tolist() == [0.0] + [1.0] * 64, "no other row is lost"
        assert len(result.failures) == 1 and "row 0: no result after 0.5 s" in result.failures[0]
        assert result.failures[0] in caplog.text
        assert result.exceeded[f"{path}:{name}"].tolist() == [True] + [False] * 64 and not result.failed.any()
        assert score(pool, ["fine"]).failures == []


def test_what_a_reward_started_dies_with_it(path, tmp_path):
    pid_file = tmp_path / "pid"
    with RewardPool({f"{path}:spawns": {}}, timeout_s=2.0) as pool:
        assert "no result" in score(pool, ["a"], pid_file=[str(pid_file)]).failures[0]
    wait_until(lambda: not is_alive(int(pid_file.read_text())))


def test_a_crash_costs_only_its_rows(path):
    with RewardPool({f"{path}:exits": {}}) as pool:
        assert "the worker died: exit code 3" in score(pool, ["exit"]).failures[0]
        assert "signal 11" in score(pool, ["segfault"]).failures[0]
        assert "SystemExit: 5" in score(pool, ["quit"]).failures[0]
        result = score(pool, ["fine"])
        assert only(result) == [1.0] and result.failures == []


def test_prints_do_not_reach_the_protocol(path):
    with RewardPool({f"{path}:noisy": {}}) as pool:
        result = score(pool, ["a", "b"])
    assert only(result) == [1.0, 1.0] and result.failures == []


def test_an_exception_is_reported_with_its_traceback(path):
    with RewardPool({f"{path}:raises": {}}) as pool:
        result = score(pool, ["a"])
    assert np.isnan(only(result)).all()
    assert "raises" in result.failures[0] and "KeyError: 'what went wrong'" in result.failures[0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("short", "returned 1 values for 2 completions"),
        ("texts", "returned '1.0', expected a finite number or None"),
        ("infinite", "returned inf, expected a finite number or None"),
        ("scalar", "returned float, expected a list of 2 numbers"),
    ],
)
def test_a_wrong_result_names_the_reward(path, name, message):
    with RewardPool({f"{path}:{name}": {}}) as pool:
        failure = score(pool, ["a", "b"]).failures[0]
    assert f"{name}' {message}" in failure


def test_async_none_and_nan(path):
    with RewardPool({f"{path}:slow": {}, f"{path}:nans": {}}) as pool:
        result = score(pool, ["a", "none"])
    assert result.failures == []
    np.testing.assert_array_equal(result.values[f"{path}:slow"], [2.0, np.nan])
    assert np.isnan(result.values[f"{path}:nans"]).all()


def test_columns_options_and_verl(path, monkeypatch):
    monkeypatch.syspath_prepend(os.path.dirname(path))
    rewards = {
        "user_rewards.sees": {},
        "user_rewards.length": {"scale": 0.5},
        f"{path}:compute_score": {"bonus": 0.25},
    }
    with RewardPool(rewards) as pool:
        result = score(pool, ["14", "1"], hint=["h", "x"], answer=["14", "14"])
    assert result.failures == []
    assert [values.tolist() for values in result.values.values()] == [[1.0, 0.0], [1.0, 0.5], [1.25, 0.25]]


def test_rows_are_spread_over_workers_in_chunks_of_at_most_64(path):
    with RewardPool({f"{path}:process": {}, f"{path}:chunk": {}}, num_workers=2) as pool:
        result = score(pool, ["a"] * 200)
        few = score(pool, ["a"] * 2)
    assert result.values[f"{path}:chunk"].tolist() == [64.0] * 192 + [8.0] * 8
    assert few.values[f"{path}:chunk"].tolist() == [1.0, 1.0]
    assert 1 <= len(set(result.values[f"{path}:process"])) <= 2


def test_a_message_larger_than_a_pipe_goes_through(path):
    completions = ["x" * 200_000] * 8
    with RewardPool({f"{path}:length": {}}) as pool:
        assert only(score(pool, completions)) == [200_000.0] * 8


def test_no_rows_and_worker_start(path):
    with RewardPool({"accuracy": {}}) as pool:
        assert score(pool, [], answer=[]).values["accuracy"].shape == (0,)


def test_a_reply_of_the_rewards_own_names_no_other_row(monkeypatch):
    reply = {"values": [1.0, None], "rows": {"1": "why", "2": "x", "-1": "x", "9" * 5000: "x"}}
    monkeypatch.setattr(WorkerProcess, "_request", lambda *_: reply)
    assert WorkerProcess(0).call("mine", {}, 2, 1.0) == ([1.0, None], {1: "why"})


def test_close_kills_the_workers(path):
    pool = RewardPool({f"{path}:process": {}})
    pid = int(only(score(pool, ["a"]))[0])
    assert is_alive(pid)
    pool.close()
    assert not is_alive(pid)
    with pytest.raises(ValueError, match="closed"):
        score(pool, ["a"])


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        ({}, "rewards is empty"),
        ({"acuracy": {}}, "did you mean 'accuracy'"),
        ({"accuracy": {"strickt": False}}, "no keyword 'strickt'.*did you mean 'strict'"),
        ({"accuracy": {"completions": []}}, "no keyword 'completions'"),
        ({"USER:positional": {}}, "takes 'completions' by position only"),
        ({"USER:compute_score": {"bonuss": 1.0}}, "did you mean 'bonus'"),
    ],
)
def test_a_wrong_recipe_fails_before_any_work(path, rewards, message):
    with pytest.raises(ValueError, match=message):
        RewardPool({name.replace("USER", path): setting for name, setting in rewards.items()})


def test_columns_are_checked_against_signatures(path):
    pool = RewardPool({"accuracy": {}, "completeness": {}, f"{path}:sees": {}})
    pool.check(None)
    pool.check({"answer", "hint"})
    with pytest.raises(ValueError, match=r"reward 'accuracy' needs the columns \['answer'\].*did you mean 'answers'"):
        pool.check({"answers", "hint"})
    with pytest.raises(ValueError, match=r"reward 'completeness' needs the columns \['finish_reason'\]"):
        score(pool, ["a"], answer=["1"], hint=["h"])
    with pytest.raises(ValueError, match=r"columns of other lengths: \{'answer': 2\}"):
        score(pool, ["a"], answer=["1", "2"], hint=["h"], finish_reason=["stop"])


@pytest.mark.parametrize("settings", [{"num_workers": 0}, {"timeout_s": 0.0}, {"memory_limit_gb": 0.0}])
def test_bad_limits(settings):
    with pytest.raises(ValueError, match=f"expected .*{next(iter(settings))} >"):
        RewardPool({"format": {}}, **settings)


def test_memory_is_shared_by_the_workers_that_can_be_busy():
    half = memory_share(1)
    assert 0 < half <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    assert memory_share(4) == half // 4


def test_where_memory_runs_out_the_worker_goes_first(path):
    with RewardPool({f"{path}:expendable": {}}) as pool:
        assert only(score(pool, ["a"])) == [1000]


def test_the_traceback_is_logged_once(path, caplog):
    with RewardPool({f"{path}:raises": {}}) as pool, caplog.at_level(logging.WARNING):
        failures = [score(pool, ["a"] * 3).failures for _ in range(3)]
    assert caplog.text.count("Traceback") == 1
    assert all(len(texts) == 1 and "rows 0-2: KeyError: 'what went wrong'\nTraceback" in texts[0] for texts in failures)
    assert headline(failures[0][0]) == f"reward '{path}:raises', rows 0-2: KeyError: 'what went wrong'"
    assert headline("reward 'x', row 0: no result after 1 s") == "reward 'x', row 0: no result after 1 s"
    with RewardPool({f"{path}:speaks_in_lines": {}}) as pool:
        (line,) = map(headline, score(pool, ["a"]).failures)
    assert "row 0: ValueError: first second xxx" in line and len(line) < len(path) + 400


def test_rewards_of_others_have_a_process_of_their_own(path):
    with RewardPool({"format": {}, "completeness": {}, f"{path}:process": {}, f"{path}:exits": {}}) as pool:
        first = score(pool, ["exit", "a"], finish_reason=["stop"] * 2).values[f"{path}:process"]
        second = score(pool, ["a", "a"], finish_reason=["stop"] * 2).values[f"{path}:process"]
        assert len(pool._workers) == 3
    assert first.tolist() == second.tolist(), "the crash of one reward does not cost another its process"


@pytest.mark.slow
def test_one_hostile_answer_costs_no_other_row():
    hostile = "<think>hm</think><answer>$\\boxed{(x+1)^{9999}}$</answer>"
    texts = ["<think>hm</think><answer>$x+1$</answer>"] * 128
    with RewardPool({"accuracy": {}}, timeout_s=10.0) as pool:
        values = score(pool, [*texts[:77], hostile, *texts[78:]], answer=["x+1"] * 128).values["accuracy"]
    assert values.tolist() == [1.0] * 77 + [0.0] + [1.0] * 50
