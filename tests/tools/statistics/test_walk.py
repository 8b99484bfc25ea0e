"""Walks through several texts, as plain data."""

import torch

from tools.statistics.passage import Walk, mark_text, split_texts


def test_one_text_counts_whole_and_has_no_mark() -> None:
    walk = Walk(0, "run")
    assert [(walk.find_share(window, 6), walk.mark(window, 6)) for window in (0, 5)] == [(1.0, "")] * 2
    assert [walk.flows(window, 6, 2) for window in range(6)] == [True, True, False, False, False, False]
    sums = {"plain/layer": torch.ones(1)}
    assert split_texts(sums, walk) == [sums]


def test_several_texts_stand_one_after_another() -> None:
    walk = Walk(0, "run", shares=(0.7, 0.0, 0.3))
    assert [walk.find_share(window, 6) for window in range(6)] == [0.7, 0.7, 0.0, 0.0, 0.3, 0.3]
    assert [walk.flows(window, 6, 1) for window in range(6)] == [True, False] * 3
    assert [walk.mark(window, 6) for window in (1, 2, 5)] == [mark_text(0), mark_text(1), mark_text(2)]


def test_sums_of_texts_are_told_apart_by_their_marks() -> None:
    values = [torch.tensor(float(number)) for number in range(3)]
    sums = {
        f"plain/{mark_text(0)}a.b": values[0],
        f"n/{mark_text(1)}a.b": values[1],
        f"plain/{mark_text(1)}c": values[2],
    }
    assert split_texts(sums, Walk(0, "run", shares=(0.5, 0.5))) == [
        {"plain/a.b": values[0]},
        {"n/a.b": values[1], "plain/c": values[2]},
    ]
