"""KL on calibration text beside KL on validation text: as measured by hand, priced, and the same bits afterwards."""

import math
from collections.abc import Callable
from typing import Any

import pytest

from graph.config import RunConfig
from graph.planning.budget import TokenBudget
from tests.benches import same, snapshot
from tests.situations import ignore
from tools.base.errors import ImpossiblePlan
from tools.instruments.fit import measure_fit
from tools.instruments.functions import Draft, Round
from tools.plans.costs import count_fit
from tools.plans.recipe import parse_recipe

WANDA = Draft(sparsity=0.4, recipe=parse_recipe("wanda:uniform"))


def test_both_texts_are_measured_and_told_apart(make_round: Callable[..., Round]) -> None:
    budget = TokenBudget(RunConfig(), 0, 64)
    admitted: list[int] = []
    more: dict[str, Any] = {"spend": budget.spend, "count_new": budget.count_new}
    round_ = make_round(WANDA, admit=lambda *given: admitted.append(given[2]), **more)
    bench, before = round_.bench, snapshot(round_.bench)
    figures = measure_fit(round_)
    assert same(snapshot(bench), before) and bench.restore(round_.present) == []
    assert [budget.tokens] == admitted == [count_fit(bench.settings)] == [256], "two windows, dense and pruned"
    fitted, judged = figures["calibration"], figures["validation"]
    (by_hand,) = bench.measure_kl_each([round_.present], [0, 2])
    assert (fitted["tokens"], fitted["kl"]) == (128, pytest.approx(by_hand, rel=1e-3))
    kept = bench.evaluate(round_.present, "validation", round_.profile, ignore)
    assert (judged["tokens"], judged["kl"]) == (192, pytest.approx(kept.mean_kl, rel=1e-3))
    gap, error = figures["validation_minus_calibration"]
    assert gap == pytest.approx(judged["kl"] - fitted["kl"], abs=1e-3)
    assert error == pytest.approx(math.hypot(judged["kl_error"], fitted["kl_error"]), rel=1e-2)
    assert measure_fit(round_) == figures and (budget.tokens, admitted) == (256, [256, 0]), "read back at no cost"
    bench.evaluator.forget([round_.present])
    assert bench.evaluator.read_fit(round_.present) is None


def test_a_round_is_named_by_its_number(make_round: Callable[..., Round]) -> None:
    round_ = make_round()
    bench = round_.bench
    made = bench.prune(round_.profile, round_.resolve(WANDA), ignore)
    bench.restore(round_.present)
    with pytest.raises(ImpossiblePlan, match=r"^nothing is pruned yet"):
        measure_fit(round_)
    with pytest.raises(ImpossiblePlan, match=r"^the layers of round 3 are not at hand; rounds that are: none$"):
        measure_fit(round_, 3)
    known = Round(
        bench, round_.profile, round_.resolve, ignore, list_at_hand=lambda: {2: made, 1: "x"}, admit=round_.admit
    )
    with pytest.raises(ImpossiblePlan, match=r"^the layers of round 3 are not at hand; rounds that are: 1, 2$"):
        measure_fit(known, 3)
    before = snapshot(bench)
    assert measure_fit(known, 2)["calibration"]["tokens"] == 128
    assert same(snapshot(bench), before)


def test_what_there_are_not_the_tokens_for_is_refused_before_it_begins(make_round: Callable[..., Round]) -> None:
    def refuse(*given: object) -> None:
        raise ValueError("not begun")

    round_ = make_round(WANDA, admit=refuse)
    with pytest.raises(ValueError, match="not begun"):
        measure_fit(round_)
    assert round_.bench.evaluator.read_fit(round_.present) is None
