"""Which trials are compared at the end, and how many tokens are kept back for it."""

from typing import Any

import pytest

from graph.config import RunConfig
from graph.planning.finalists import FINALISTS, list_finalists, reserve_tokens
from graph.planning.verdict import decide_stop
from graph.state import State, Trial
from tests.situations import make_trial
from tools.plans.recipe import Recipe
from tools.results.schema import TextFigures

CONFIG = RunConfig(further_windows=24, window=64, validation_windows=8)
DENSE = make_trial(0, "accept", 0.0, Recipe(), perplexity=10.0)


def trial(iteration: int, verdict: str = "rollback", sparsity: float = 0.45, **changes: Any) -> Trial:
    return make_trial(iteration, verdict, sparsity, Recipe()).model_copy(update=changes)


def state_of(*trials: Trial, config: RunConfig = CONFIG) -> State:
    return State(run="r", config=config, dense=DENSE, trials=list(trials), iteration=len(trials))


def numbers(state: State) -> list[int]:
    return [finalist.iteration for finalist in list_finalists(state)]


REACHED = (trial(1, "accept", 0.3), trial(2, "accept"))


def test_kept_trials_come_first_and_then_the_nearest() -> None:
    near = [trial(3, better=0.3), trial(4, "accept", better=0.8), trial(5, better=0.6), trial(6, better=0.24)]
    assert numbers(state_of(*REACHED, *near)) == [4, 2, 5, 3]
    assert len(list_finalists(state_of(*REACHED, *near, trial(7, "accept", better=0.9)))) == FINALISTS


def test_weights_that_come_twice_are_compared_once() -> None:
    again = [trial(3, "accept", better=0.8), trial(4, "accept", better=0.8, checkpoint="2")]
    assert numbers(state_of(*REACHED, *again)) == [4, 3]


@pytest.mark.parametrize(
    "other",
    [
        {"verdict": "refuse", "better": None},
        {"broken": True, "better": None},
        {"sparsity": 0.44, "better": 0.5},
        {"fact_retention": 0.79, "better": 0.9},
        {"fact_retention": None, "better": 0.9},
    ],
)
def test_what_was_not_measured_is_off_the_target_or_forgets_too_much_is_none(other: dict[str, Any]) -> None:
    config = CONFIG.model_copy(update={"questions": "file:q.jsonl", "min_fact_retention": 0.8})
    assert numbers(state_of(*REACHED, trial(3, **{"better": 0.5, "fact_retention": 0.8}), config=config)) == [2, 3]
    assert numbers(state_of(*REACHED, trial(3, **other), config=config)) == []


def test_what_goes_beyond_the_bound_of_a_text_is_none() -> None:
    def measure(code: float | None) -> list[TextFigures]:
        figures = {"weight": 0.5, "kl": 0.1, "kl_error": 0.01}
        return [TextFigures(name=name, perplexity=of, **figures) for name, of in (("code", code), ("prose", 1e9))]

    texts = {"code": "file:code.txt", "prose": "file:prose.txt"}
    config = CONFIG.model_copy(update={"text": texts, "text_bounds": {"code": 0.2}})
    dense = DENSE.model_copy(update={"texts": measure(10.0)})
    for code, found in ((12.0, [2, 3]), (12.1, []), (None, [])):
        state = state_of(*REACHED, trial(3, better=0.9, texts=measure(code)), config=config)
        assert numbers(state.model_copy(update={"dense": dense})) == found


def test_without_further_windows_or_short_of_the_target_there_are_none() -> None:
    off = CONFIG.model_copy(update={"further_windows": 0})
    assert numbers(state_of(*REACHED, trial(3, "accept"), config=off)) == []
    assert numbers(state_of(trial(1, "accept", 0.3), trial(2, "accept", 0.4))) == []
    assert numbers(state_of()) == numbers(state_of(*REACHED)) == []


def test_tokens_of_a_trial_and_of_the_end_are_kept_back() -> None:
    once, further = 8 * 64, 24 * 64
    assert reserve_tokens(state_of()) == reserve_tokens(state_of(REACHED[0])) == once
    assert reserve_tokens(state_of(*REACHED)) == once + 2 * further + 2 * further
    seen = trial(3, better=0.5, compared_windows=16)  # the accepted one was measured on eight further windows for it
    assert reserve_tokens(state_of(*REACHED, seen)) == once + 2 * further - 8 * 64 + 3 * further
    many = [trial(i, "accept", better=0.8, compared_windows=32) for i in (3, 4, 5, 6)]
    assert reserve_tokens(state_of(*REACHED, *many)) == once + further + 4 * further


def test_the_run_ends_when_no_trial_fits_with_the_end() -> None:
    needed = reserve_tokens(state_of(*REACHED))
    fits = CONFIG.model_copy(update={"max_evaluated_tokens": 1000 + needed})
    state = state_of(*REACHED, config=fits).model_copy(update={"evaluated_tokens": 1000})
    assert decide_stop(state) == ""
    assert "another trial takes more" in decide_stop(state.model_copy(update={"evaluated_tokens": 1001}))
