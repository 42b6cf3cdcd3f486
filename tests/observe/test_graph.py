"""The chain's layout: columns by need, no two boxes in one place."""

import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

from r1fast.observe.graph import build_nodes, chain_graph
from r1fast.observe.run_data import StageData, load_run


def test_columns_follow_the_longest_path(tmp_path: Path, write_run: Callable[..., Path]) -> None:
    nodes = build_nodes(load_run(write_run(tmp_path)).stages)
    main = ["base", "zero", "cold", "dev1", "dev2", "reject", "dev3", "r1"]
    assert [nodes[name].column for name in main] == list(range(8))
    assert all(nodes[name].row == 0 for name in main)
    assert nodes["student"].column == 6 and nodes["Qwen/Qwen2.5-0.5B"].column == 5
    places = [(node.column, node.row) for node in nodes.values()]
    assert len(set(places)) == len(places)


def test_every_input_is_an_edge_and_data_is_dashed(tmp_path: Path, write_run: Callable[..., Path]) -> None:
    stages = load_run(write_run(tmp_path)).stages
    edges = [path.get("class") for path in ET.fromstring(chain_graph(stages)).iter("path")]
    assert edges.count("edge data") == 3  # cold -> dev1, reject -> dev3, reject -> student
    assert edges.count("edge") == sum(len(node.parents) for node in build_nodes(stages).values()) - 3


def test_one_stage_and_a_cycle_are_drawn() -> None:
    assert "solo" in chain_graph([StageData("solo", model="Qwen/Qwen2.5-1.5B")])
    loop = [StageData("a", inputs=["b"]), StageData("b", inputs=["a"])]
    assert chain_graph(loop).count("<rect") == 2
