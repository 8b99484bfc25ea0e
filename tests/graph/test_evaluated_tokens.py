"""The budget of tokens put through pruned models."""

import pytest

from graph.config import RunConfig
from graph.planning.toolbox import Evaluated
from graph.planning.verdict import decide_stop
from graph.state import State

CONFIG = RunConfig(window=64, validation_windows=3, max_evaluated_tokens=600)


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


@pytest.mark.parametrize(
    ("tokens", "stop"), [(384, ""), (409, "409 of at most 600 tokens were evaluated, and another trial takes more")]
)
def test_the_run_ends_when_no_trial_fits(tokens: int, stop: str) -> None:
    assert decide_stop(State(config=CONFIG, iteration=2, evaluated_tokens=tokens)) == stop
