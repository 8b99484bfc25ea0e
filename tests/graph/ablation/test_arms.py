"""An arm carries plans out within its budget, and tells what failed."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from graph.ablation import arms
from graph.ablation.arms import Arm, plan_list, plan_recipes, price_recipe
from graph.ablation.settings import FIXED, POLISHED, AblateSettings
from graph.planning.plan import Plan
from tests.situations import ignore
from tests.tiny import tiny_settings
from tools.base.errors import BrokenPlan, UserError
from tools.plans.costs import count_polish
from tools.plans.recipe import Adjustment, Recipe, parse_recipe
from tools.workbench.bench import Workbench
from tools.workbench.open import use_workbench

TRIAL = 3 * 64
WALK = 4 * 2 * 64
SEQUENTIAL = 2 * 4 * 64
POLISH = 128


def make_settings(model: Path | str, **changes: Any) -> AblateSettings:
    return AblateSettings.model_validate(tiny_settings(model).model_dump() | {"evaluated_tokens": 1000} | changes)


@pytest.fixture
def bench(tiny_llama: Path, tmp_path: Path, workbench_closed: None) -> Iterator[Workbench]:
    with use_workbench(tiny_settings(tiny_llama), tmp_path, ignore, ignore) as opened:
        yield opened


def plan(label: str, *adjustments: Adjustment) -> Plan:
    return Plan(sparsity=0.45, recipe=parse_recipe(label), adjustments=list(adjustments))


def test_an_arm_counts_all_it_puts_through_the_model_and_what_failed(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = bench.profile(ignore)
    prune = bench.pruner.prune

    def break_wanda(profile: str, order: Any, progress: Any) -> str:
        if next(iter(order.layers.values())).recipe.method == "wanda":
            raise BrokenPlan("no memory")
        return prune(profile, order, progress)

    monkeypatch.setattr(bench.pruner, "prune", break_wanda)
    settings = make_settings(bench.settings.model, evaluated_tokens=4 * TRIAL + SEQUENTIAL)
    arm = Arm(bench, profile, settings, ignore, time.monotonic())
    impossible = plan("two-sided:uniform", Adjustment(selector="*", action="protect"))
    tried = [
        *(impossible, plan("wanda~sequential:uniform"), plan("refit:kappa")),  # fails, breaks, and takes too much
        *(plan("two-sided:uniform"), plan("two-sided:uniform"), plan("two-sided:kappa-mask")),  # one of them again
    ]
    chosen = arm.keep_best(iter(tried))
    assert (chosen.trials, chosen.failed, chosen.dear) == (2, 2, 1)
    assert chosen.tokens == SEQUENTIAL + 3 * TRIAL, "what broke is paid for with its trial"
    made = [bench.pruner.prune(profile, resolve(arm, x), ignore) for x in tried[3::2]]
    kls = [bench.evaluator.evaluate(checkpoint, "validation", profile, ignore).mean_kl or 0.0 for checkpoint in made]
    best = kls.index(min(kls))
    assert chosen.plan == ("45.0% two-sided:uniform", "45.0% two-sided:kappa-mask")[best]
    with pytest.raises(UserError, match=r"^no plan of it comes to 45\.00% within .* \(1 failed, 0 took more than were"):
        Arm(bench, profile, settings, ignore, time.monotonic()).keep_best(iter([impossible]))


def resolve(arm: Arm, plan: Plan) -> Any:
    return arms.resolve(plan, arm.bench.profiles.read(arm.profile).layers, arm.config)


def test_an_arm_out_of_time_makes_its_first_trial_and_no_other(bench: Workbench) -> None:
    profile = bench.profile(ignore)
    settings = make_settings(bench.settings.model, seconds=5)
    arm = Arm(bench, profile, settings, ignore, time.monotonic() - 6)
    assert arm.keep_best(iter([plan("two-sided:uniform"), plan("two-sided:kappa-mask")])).trials == 1


def test_the_grid_is_the_rules_list_from_the_strong_recipe(bench: Workbench) -> None:
    arm = Arm(bench, bench.profile(ignore), make_settings(bench.settings.model), ignore, 0.0)
    plans = list(plan_list(arm))
    assert [x.recipe.label for x in plans[:9]] == [
        *("refit:kappa-mask", "refit10~clipped~damped0.2~sequential:kappa-mask"),
        *("refit10~clipped~damped0.2:kappa-mask", "refit~sequential:kappa-mask", "refit10:kappa-mask"),
        *("wanda+refit~damped0.3~dense:kappa-mask", "refit~damped0.3:kappa-mask"),
        *("refit~clipped:kappa-mask", "refit:kappa"),
    ]
    assert {x.sparsity for x in plans} == {0.45} and sum(bool(x.adjustments) for x in plans) > 4


def test_kappa_goes_on_with_the_fixed_recipes_and_their_prices_are_known() -> None:
    settings = make_settings("no-model")
    arm = Arm(None, "", settings, ignore, 0.0)  # type: ignore[arg-type]
    assert [x.recipe.label for x in plan_recipes(arm)] == [Recipe().label, *FIXED[1:-1]]
    assert FIXED[-1] == Recipe().label
    assert {label: price_recipe(label, settings) for label in FIXED[1:]} == {
        "refit10~clipped~damped0.2~sequential:kappa-mask": SEQUENTIAL + TRIAL,
        "refit10~sequential:kappa-mask": SEQUENTIAL + TRIAL,
        "refit~sequential:kappa-mask": SEQUENTIAL + TRIAL,
        "refit10:kappa-mask": TRIAL,
        "refit:kappa-mask": TRIAL,
        "refit:kappa": WALK + TRIAL,
    }
    polishing = settings.model_copy(update={"polish_tokens": POLISH})
    arm = Arm(None, "", polishing, ignore, 0.0)  # type: ignore[arg-type]
    assert [x.recipe.label for x in plan_recipes(arm)] == [Recipe().label, *FIXED[:-1]]
    assert arm.config.polish_tokens == POLISH
    assert price_recipe(POLISHED, polishing) == count_polish(polishing, POLISH) + TRIAL
