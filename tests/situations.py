"""Situations, trials and lessons made up for tests of planners and reflectors."""

import math
import random
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from graph.config import RunConfig
from graph.planning.orders import Curves, Orders, describe_plan, hash_request, measure_with, read_curves
from graph.planning.plan import Plan
from graph.planning.refinements import STRONG
from graph.planning.situation import Situation
from graph.reflecting.schema import Lesson
from tests.profiles import make_profile
from tools.plans.layer_profile import LEVELS, LayerProfile
from tools.plans.recipe import Recipe
from tools.plans.work_order import WorkOrder
from tools.results.trial import Trial

if TYPE_CHECKING:
    from tools.workbench.bench import Workbench

KINDS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")


def make_layers(scale: float = 1.0) -> list[LayerProfile]:
    """Six blocks of three layers; the later a block, the dearer."""
    return [
        make_profile(block, kind, 1000, scale * 1e-4 * (block + 1) * np.exp(5 * np.array(LEVELS)))
        for block in range(6)
        for kind in KINDS
    ]


def make_trial(iteration: int, verdict: str, sparsity: float, recipe: Recipe, perplexity: float = 11.0) -> Trial:
    """A trial of a plan without adjustments; `make_situation` names its order."""
    plan = Plan(sparsity=max(sparsity, 0.001), recipe=recipe)
    return Trial.model_validate(
        {
            **{"iteration": iteration, "checkpoint": str(iteration), "sparsity": sparsity, "perplexity": perplexity},
            **{"kl": 0.1, "kl_error": 0.01, "predicted_kl": 0.05, "verdict": verdict, "recipe": recipe},
            **{"plan": describe_plan(plan), "asked": hash_request(plan)},
        }
    )


def make_situation(*trials: Trial, scale: float = 1.0, lessons: tuple[Lesson, ...] = ()) -> Situation:
    """What a planner knows after these trials, of `make_layers`."""
    layers = make_layers(scale)
    accepted = next((t for t in reversed(trials) if t.verdict == "accept"), None)
    plan = Plan(sparsity=accepted.sparsity, recipe=accepted.recipe or STRONG) if accepted else None
    orders = Orders(RunConfig(), (), layers, lambda _: Curves(layers, exact=True))
    trials = tuple(name_order(orders, trial) for trial in trials)
    return Situation(
        config=RunConfig(),
        layers=layers,
        sparsity={layer.name: accepted.sparsity if accepted else 0.0 for layer in layers},
        dense=make_trial(0, "accept", 0.0, STRONG, perplexity=10.0),
        accepted=accepted,
        accepted_plan=plan,
        trials=trials,
        lessons=lessons,
        iteration=len(trials) + 1,
    )


def name_order(orders: Orders, trial: Trial) -> Trial:
    """The trial with the id of its plan's order, where it has none yet."""
    if trial.order or trial.recipe is None or not trial.sparsity:
        return trial
    return trial.model_copy(update={"order": orders.identify(Plan(sparsity=trial.sparsity, recipe=trial.recipe))})


def make_patterned(*trials: Trial) -> Situation:
    """The situation of a run with a pattern."""
    layers = [layer.model_copy(update={"inputs": 20}) for layer in make_layers()]
    config = RunConfig(pattern="2:4")
    orders = Orders(config, (), layers, lambda _: Curves(layers, exact=True))
    return replace(make_situation(*(name_order(orders, t) for t in trials)), config=config, layers=layers)


def try_plan(situation: Situation, plan: Plan, verdict: str) -> Trial:
    """The trial of a plan in this situation."""
    trial = make_trial(situation.iteration, verdict, plan.sparsity, plan.recipe)
    made = {"plan": describe_plan(plan), "order": situation.orders.identify(plan), "asked": hash_request(plan)}
    return trial.model_copy(update=made)


def open_orders(bench: "Workbench", profile: str, config: RunConfig, present: str) -> Callable[[Plan], WorkOrder]:
    """What a plan comes to at an open workbench in which the weights of `present` are, as the nodes have it."""
    layers = bench.profiles.read(profile).layers
    orders = Orders(config, (), layers, lambda recipe: read_curves(bench, profile, recipe, ignore))
    return lambda plan: orders.resolve(plan, measure_with(bench, profile, present, ignore))


def ignore(label: str, done: int, total: int) -> None:
    pass


def make_lesson(
    selector: str, factor: float, recipe: str = "refit", same: bool = False, confidence: float = 1.0
) -> Lesson:
    """A lesson without words."""
    return Lesson(
        run="r", iteration=1, recipe=recipe, selector=selector, factor=factor, predicted=0.1, measured=0.1, text="",
        same_config=same, confidence=confidence,
    )  # fmt: skip


LLAMA_KINDS = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)
DENSE = Trial(iteration=0, checkpoint="dense", sparsity=0, perplexity=20.0, kl=0, predicted_kl=0, verdict="accept")


def draw_layers(blocks: int, kinds: tuple[str, ...] = LLAMA_KINDS, seed: int = 0) -> list[LayerProfile]:
    """Layers whose scores and KL curves are drawn by lot."""
    draw = random.Random(seed)
    layers = []
    for block in range(blocks):
        for kind in kinds:
            scale = math.exp(draw.gauss(-5, 1.5))
            layers.append(
                make_profile(
                    block,
                    kind,
                    331776,
                    [scale * level**3 for level in LEVELS],
                    wanda_z=draw.gauss(0, 1),
                    gradient_z=draw.gauss(0, 1),
                )
            )
    return layers


def make_first_situation(blocks: int = 3, **changes: Any) -> Situation:
    """Nothing is pruned yet, unless the changes say so."""
    return replace(Situation(RunConfig(), draw_layers(blocks), {}, DENSE), **changes)
