"""The budget of tokens put through pruned models."""

import pytest

from graph.planning.toolbox import Evaluated


def test_a_probe_leaves_the_tokens_of_the_trial() -> None:
    evaluated = Evaluated(192, 600, 192)
    evaluated.book(128)
    assert evaluated.tokens == 320
    with pytest.raises(ValueError, match=r"^a probe of 128 tokens is too much: 88 are left beside the trial$"):
        evaluated.book(128)
    assert evaluated.tokens == 320


def test_without_a_limit_everything_is_counted() -> None:
    evaluated = Evaluated(0, 0, 192)
    evaluated.book(10**9)
    assert evaluated.tokens == 10**9
