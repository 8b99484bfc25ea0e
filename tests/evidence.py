"""A trial that a reflector has to say something about, made up for tests."""

from dataclasses import replace
from typing import Any

from graph.config import RunConfig
from graph.planning.plan import Plan
from graph.reflecting.posterior import find_factors
from graph.reflecting.rule import Evidence, draw_lesson
from tests.situations import make_layers, make_trial
from tools.plans.recipe import Recipe

LAYERS = make_layers()
EVEN = {layer.name: 0.45 for layer in LAYERS}
GROUP = "blocks 4-5 · mlp.down_proj"


def tilt(amount: float) -> dict[str, float]:
    """More sparsity in the last down projections, less everywhere else."""
    chosen = {layer.name for layer in LAYERS if layer.block >= 4 and layer.kind == "mlp.down_proj"}
    return {name: s + amount if name in chosen else s - amount / 8 for name, s in EVEN.items()}


def learnt(selector: str, multiplier: float = 1.5, confidence: float = 0.4, **more: Any) -> dict[str, Any]:
    """What a reflector says of some layers."""
    direction = "dearer" if multiplier >= 1 else "cheaper"
    figures = {"selector": selector, "multiplier": multiplier, "confidence": confidence, "direction": direction}
    return figures | {"evidence": "KL rose more than predicted."} | more


def make_evidence(error: float = 1e-3, **changes: Any) -> Evidence:
    """A second trial at the target, which moved weights into `GROUP` and was hurt more than predicted."""
    before, after = make_trial(1, "accept", 0.45, Recipe()), tilt(0.1)
    trial = make_trial(2, "rollback", 0.45, Recipe()).model_copy(update={"kl": 0.2, "change_error": error})
    evidence = Evidence(
        config=RunConfig(),
        run="run",
        layers=LAYERS,
        recipe=Recipe(),
        plan=Plan(sparsity=0.45, reason="because"),
        trial=trial,
        sparsity=after,
        dense=make_trial(0, "accept", 0.0, Recipe()),
        before=before,
        before_sparsity=EVEN,
        trials=[before],
        lessons=[],
        measured=draw_lesson("run", LAYERS, trial, after, before, EVEN),
    )
    return replace(evidence, **changes)


def find_multipliers(*given: Any) -> dict[str, float]:
    """The factors alone of what `find_factors` makes of lessons."""
    return {selector: found.factor for selector, found in find_factors(*given).items()}
