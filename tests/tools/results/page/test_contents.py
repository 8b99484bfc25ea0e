"""What is worked out of a record."""

from pathlib import Path

import pytest

from tests.made_runs import CUT, add_round, begin_run, make_layers, write_run
from tools.results.page.contents import describe_run, find_costs, find_limits, list_facts, list_tiles
from tools.results.page.record import read_run


def test_the_maps_are_of_the_weights_that_were_kept(tmp_path: Path) -> None:
    record = read_run(write_run(tmp_path / "demo"))
    assert record.layers is not None and record.layers.checkpoint == f"{1:064x}"
    assert record.layers.sparsity == [0.35, 0.25, 0.35, 0.25]
    costs = find_costs(record)
    assert [cell.block for cell in costs] == [0, 0, 1, 1]
    # log KL is linear between the levels of the curve: a third of the way from 0.3 to 0.45, two thirds from 0.15 to 0.3
    first, second = 1e-3 * 4 ** (1 / 3), 2 * 1e-4 * 10 ** (2 / 3)
    assert [cell.value for cell in costs] == pytest.approx([first, second, 2 * first, 1.5 * second])
    assert find_limits([record]) == pytest.approx((second, 2 * first))


def test_texts_are_those_that_were_read(tmp_path: Path) -> None:
    layers = make_layers()
    named = {"text": {"prose": "pydoc", "code": "file:a.py"}, "text_weights": {"prose": 9, "code": 1}}
    told = []
    for name, more in (("mixed", {"questions": "file:q.jsonl", "calibration_mix": 0.5}), ("named", named)):
        facts = dict(list_facts(read_run(begin_run(tmp_path / name, layers, **more))))
        told += [facts["Calibration text"], facts["Validation text"]]
    assert told == [
        "16 windows of 512 tokens of pydoc, 50% of them questions with their answers",
        "8 windows of 512 tokens of pydoc",
        "16 windows of 512 tokens of each of prose (pydoc, weight 9), code (file:a.py, weight 1)",
        "8 windows of 512 tokens of each of prose (pydoc, weight 9), code (file:a.py, weight 1)",
    ]


def test_of_a_cut_is_said_what_is_gone_and_what_that_made_of_the_model(tmp_path: Path) -> None:
    layers = make_layers()
    run = begin_run(tmp_path / "cut", layers, target_size=0.8)
    add_round(run, 1, "accept", layers, sparsity=0.25)
    unfinished = read_run(run)
    assert describe_run(unfinished)[1].startswith("So far 25.00% of the prunable weights are gone, at a validation")
    assert list_tiles(unfinished)[0] == ("Weights gone so far", "25.00%", "")
    summary = read_run(write_run(tmp_path / "demo")).summary
    assert summary is not None
    finished = unfinished.model_copy(update={"summary": summary.model_copy(update={"cut": CUT})})
    assert list_tiles(finished)[:3] == [
        ("Weights gone", "45.00%", "target 45.00%"),
        ("Bytes", "81.00%", "asked for 0.8"),
        ("Tokens/s decoded", "1.25 ×", "dense 20.0"),
    ]
