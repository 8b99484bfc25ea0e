"""Shards: how text is cut, who takes which, and sums that do not depend on it."""

import weakref
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tools.statistics.moments import Waiting
from tools.statistics.shards import (
    SHARDS,
    Aside,
    Span,
    Sums,
    count_held,
    cut_shards,
    join_nodes,
    list_nodes,
    share_out,
    sum_node,
)


@given(st.integers(1, 200))
def test_every_window_is_in_one_shard_and_shards_are_even(windows: int) -> None:
    shards = cut_shards(windows)
    assert len(shards) == min(SHARDS, windows)
    assert sorted(window for shard in shards for window in shard) == list(range(windows))
    assert {len(shard) - windows // len(shards) for shard in shards} <= {0, 1}
    assert all(shard == sorted(shard) for shard in shards)


def test_two_or_four_workers_have_as_many_of_the_first_windows_each() -> None:
    shards = cut_shards(16)
    assert shards == [[0, 8], [4, 12], [2, 10], [6, 14], [1, 9], [5, 13], [3, 11], [7, 15]]
    for workers in (2, 4):
        first = [[w for s in range(*span) for w in shards[s] if w < 4] for span in share_out(8, workers)]
        assert {len(windows) for windows in first} == {4 // workers}


def test_who_takes_what() -> None:
    assert share_out(8, 3) == [(0, 2), (2, 5), (5, 8)]
    assert share_out(2, 5) == [(0, 1), (1, 2)]
    assert share_out(0, 2) == []


@given(st.integers(1, 12), st.integers(1, 12))
def test_the_sum_is_the_same_bits_however_many_share_it(shards: int, workers: int) -> None:
    values = (
        torch.randn(shards, 3, generator=torch.Generator().manual_seed(shards)) * 10.0 ** torch.arange(shards)[:, None]
    )

    def leaf(shard: int) -> Sums:
        return (
            {"x": values[shard].clone(), f"only {shard}": torch.ones(())} if shard % 3 else {"x": values[shard].clone()}
        )

    def nodes() -> Iterator[tuple[Span, Sums]]:
        for span in share_out(shards, workers):
            for node in list_nodes((0, shards), span):
                yield node, sum_node(node, leaf)

    alone, shared = sum_node((0, shards), leaf), join_nodes((0, shards), dict(nodes()))
    with TemporaryDirectory() as scratch, patch("tools.statistics.moments.has_room", side_effect=cycle([True, False])):
        aside = [sum_node((0, shards), leaf, partial(Waiting, scratch=Path(scratch))) for _ in range(2)]
        assert list(Path(scratch).iterdir()) == []
    for found in (shared, *aside):
        assert list(alone) == list(found)
        assert all(torch.equal(alone[name], found[name]) for name in alone)


def test_a_missing_part_is_no_sum() -> None:
    with pytest.raises(KeyError):
        join_nodes((0, 2), {(0, 1): {"x": torch.ones(1)}})


def test_few_nodes_make_up_a_span() -> None:
    assert list(list_nodes((0, 8), (0, 4))) == [(0, 4)]
    assert list(list_nodes((0, 8), (2, 5))) == [(2, 4), (4, 5)]
    assert list(list_nodes((0, 8), (0, 8))) == [(0, 8)]


@given(st.integers(1, SHARDS), st.integers(1, 12))
def test_how_many_sums_are_held_at_once(shards: int, workers: int) -> None:
    check_held(shards, workers, None)
    with TemporaryDirectory() as scratch, patch("tools.statistics.moments.has_room", return_value=False):
        check_held(shards, workers, partial(Waiting, scratch=Path(scratch)))


def check_held(shards: int, workers: int, aside: Callable[[Sums], Aside] | None) -> None:
    tree, live, peak = (0, shards), [0], [0]

    def let_go() -> None:
        live[0] -= 1

    def leaf(shard: int) -> Sums:
        value = torch.ones(1)
        weakref.finalize(value, let_go)
        live[0] += 1
        peak[0] = max(peak[0], live[0])
        return {"x": value}

    for span in share_out(shards, workers):
        live[0] = peak[0] = 0
        nodes = [sum_node(node, leaf, aside) for node in list_nodes(tree, span)]
        assert peak[0] == count_held(tree, span, aside=aside is not None) and live[0] == len(nodes)
        del nodes


def test_of_eight_shards() -> None:
    spans = ((0, 8), (0, 4), (2, 5), (5, 8), (7, 8))
    assert [count_held((0, 8), span) for span in spans] == [4, 3, 2, 3, 1]
    assert [count_held((0, 8), span, aside=True) for span in spans] == [2, 2, 2, 3, 1]
