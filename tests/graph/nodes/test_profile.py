"""What pruning will take is foreseen for planners that ask, and a run goes on where that cannot be."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from graph.config import RunConfig
from graph.nodes.profile import foresee_seconds, measure_dense, refuse_streamed_polish
from graph.state import State
from tools.base.errors import UserError
from tools.base.progress import ignore_progress
from tools.estimate import foreseen
from tools.plans.paces import Paces
from tools.results.losses import Evaluation

BENCH: Any = SimpleNamespace(layers=[], device=torch.device("cpu"), paces={"measuring a token": 0.5})
SESSION: Any = SimpleNamespace(progress=ignore_progress)


def foresee(**config: Any) -> Paces:
    return foresee_seconds(BENCH, {}, RunConfig(**config), SESSION)


def test_it_is_foreseen_for_planners_that_may_call_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreseen, "foresee_paces", lambda *_: {"pruning by refit": 1.0})
    assert foresee(planner="openai:x") == {"pruning by refit": 1.0}
    monkeypatch.setattr(foreseen, "foresee_paces", lambda *_: {"measuring curves of refit": 3.0})
    walked = 4 * 2 * 64 * 0.5
    asked: list[str] = []
    few = foresee(planner="openai:x", gradient_windows=2, window=64)
    assert few == {"measuring curves of refit": 3.0 + walked}, "the text passes forward three times, and once backward"
    monkeypatch.setattr(foreseen, "foresee_paces", lambda *given: asked.extend(x.label for x in given[3]) or {})
    foresee(planner="openai:x")
    assert asked == ["two-sided:kappa", "two-sided+refit:kappa", "sparsegpt~dense:kappa", "refit:kappa"]
    assert foresee() == foresee(planner="openai:x", planner_calls=0) == foresee(planner="openai:x", workers="2") == {}


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")])
def test_a_run_goes_on_where_there_is_no_memory_for_it(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Paces:
        raise error

    monkeypatch.setattr(foreseen, "foresee_paces", fail)
    assert foresee(planner="openai:x") == {}


def test_a_model_that_auto_streams_is_not_polished_and_no_round_is_spent_on_it() -> None:
    held, streamed = (SimpleNamespace(layers=[SimpleNamespace(is_streamed=streamed)]) for streamed in (False, True))
    polished, plain = RunConfig(polish_tokens=4096), RunConfig()
    for bench, config in ((held, polished), (held, plain), (streamed, plain)):
        refuse_streamed_polish(bench, config)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"^polish_tokens: a polish .* cannot be streamed; leave it out, or give "):
        refuse_streamed_polish(streamed, polished)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("config", "sparsity"), [({}, 0.45), ({"target_size": 0.8}, 0.0), ({"target_speed": 1.2}, 0.0)]
)
def test_zeros_of_the_model_are_no_part_that_is_gone(config: dict[str, float], sparsity: float) -> None:
    """A cut of a pruned model could go nowhere else: its plans take fewer weights away than are zero."""
    dense = Evaluation(nll=[1.0, 2.0], kl=[0.0, 0.0])
    bench: Any = SimpleNamespace(read_profile=lambda _: SimpleNamespace(dense=dense), count_zeros=lambda: (45, 100))
    session: Any = SimpleNamespace(progress=ignore_progress, elapsed=1.0)
    trial = measure_dense(bench, State(config=RunConfig(**config)), "profile", session)
    assert (trial.sparsity, trial.kl, trial.verdict) == (sparsity, 0.0, "accept")
