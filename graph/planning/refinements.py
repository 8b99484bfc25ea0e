"""What a rule tries at the target: small levers together, then plans that differ from the accepted one in one lever."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from graph.config import RunConfig
from graph.planning.orders import describe_plan, group_kl, hash_request
from graph.planning.plan import Plan
from graph.planning.situation import Situation
from tools.base.errors import ImpossiblePlan
from tools.base.settings import QUESTIONS
from tools.plans.layer_profile import LayerProfile, group_layers
from tools.plans.methods import METHODS
from tools.plans.mix import SHORT, Mix, mix_questions
from tools.plans.recipe import Adjustment, Recipe
from tools.results.trial import Trial

STRONG = Recipe(method="refit", curves="mask")
"""The strong recipe, with the KL curves that the profile has."""

FINE_STEPS = 10
"""Steps of the mask's growth at the target: on SmolLM2's layers 2 % less error than five, in 1.7 times the time."""

DAMPED = 0.3
"""Damping of the fit at the target: on SmolLM2 at 45 % with 4,096 tokens KL on the text's own kind was 2 % less so, and
on three other texts 6 to 13 % (tools/README.md, other text)."""

ROWS = {"method": "wanda", "refit": True}
"""A mask that is compared within each output, its survivors fitted: on Qwen2.5-Coder-1.5B at 45 %, damped and behind
pruned predecessors, a fifth less KL than STRONG, and MMLU as high as Wanda's (README, a second family)."""

HEDGED = STRONG.model_copy(update={**ROWS, "damping": DAMPED, "strength": 0.5})
"""The strong recipe where the KL curves are to be gone by half of the way to every layer alike, and the mask that they
are of not at all: 6 and 11 % less KL on two texts than with every layer alike (graph/ablation/README.md).
Since gamma leans to its mean that mask, so hedged, is better where it was measured: it is what is tried next."""

MASKS = Recipe(method="two-sided", refit=False)
"""The cheap recipe, with the KL curves that the profile has."""

MISLED = 2.0
"""How many times the KL that the curves predict masks alone may measure before these are not gone by: at 40 % on
SmolLM2 1.3 to 1.8 times on three texts, on Qwen2.5-Coder-1.5B 2.2 and 2.5 (gradients of 512 and 2,048 tokens). There
HEDGED had 40 % less KL than STRONG at 60 %, before gamma leant to its mean (`tools.statistics.known.PRIOR`), when
they were 1.6 to 2.3, and 4.5 and 9.6."""

TOGETHER = {"refit_steps": FINE_STEPS, "damping": 0.2, "gamma": "clipped"}
"""Levers each of which gains less than a comparison can tell from luck, pulled at once: what a strong planner ended at
(graph/ablation/README.md)."""

WORTH = {
    "hedged": "Qwen2.5-Coder-1.5B at 60%, where masks cost 9.6 times what curves said: 40% less KL",
    "grown": "Qwen2.5-Coder-1.5B at 60%, damped, half as far as the curves say: 17% less KL than by Wanda's mask",
    "together": "SmolLM2 at 60%, five texts: 7% less KL than with none of them, 4% less than with statistics alone",
    "sequential": "SmolLM2 at 60%, one text: 3% less KL; Qwen2.5-Coder-1.5B at 60%, 8,192 tokens, damped: 0.48 beside "
    "0.35 of a plain refit, a window ruined",
    "steps": "SmolLM2's layers: 2% less error",
    "rows": "Qwen2.5-Coder-1.5B at 45%, damped and behind pruned predecessors: a fifth less KL",
    "damping": "SmolLM2 at 45%, 4,096 tokens: 2% less KL, 6 to 13% on text of other kinds",
    "gamma": "SmolLM2: 1% less KL at 60%, 2% more at 45%; Qwen2.5-Coder-1.5B's masks alone: a window ruined",
    "curves": "SmolLM2: 4% less KL at 45%, none to 3% less at 60%",
}
"""What a change was measured to do where it was measured, told to whoever asks for candidates: no promise elsewhere."""

MISTRUST = (
    "Masks alone cost far more than the KL curves said: half of the way from these to every layer alike, by Wanda's "
    f"mask, with a damped fit ({WORTH['hedged']})."
)
"""Why HEDGED is tried."""


STRENGTHS = (0.8, 0.9)
TILTS = (1.5, 0.67)
"""How much more, or less, precious a group is made at the target."""


def is_misled(trials: Sequence[Trial], config: RunConfig) -> bool:
    """Whether masks alone cost so much more than the KL curves said that these had better not be gone by.

    Never of an N:M pattern, which compares within outputs, and leaves nothing to share out.
    """
    if config.pattern:
        return False
    masks = [trial for trial in trials if trial.recipe and trial.recipe.work_label == MASKS.work_label]
    return any(trial.kl is not None and trial.kl > MISLED * trial.predicted_kl for trial in masks[:1])


def plan_refinements(situation: Situation, *, texts: bool = True) -> Iterator[Plan]:
    """Plans at the target as `change_levers` has them for the accepted one, untried ones only, likeliest first.

    Lessons weigh groups in each of them. A lever that was tried stays tried when lessons change; the accepted plan
    itself is tried again when they give it another line, for what they change beyond two digits is worth no round.
    Without `texts`, no plan asks for another mixture of them.
    """
    base = situation.accepted_plan
    assert base is not None, "a trial was accepted, so there is a plan that made it"
    base = base.model_copy(update={"sparsity": situation.config.target_sparsity, "multipliers": {}})
    own = hash_request(base)
    lines = {trial.plan for trial in situation.trials if trial.asked == own}
    tried = {trial.asked for trial in situation.trials} - {own}

    def is_untried(change: Plan) -> bool:
        if hash_request(change) == own:
            return describe_plan(situation.orders.weigh(change)) not in lines
        return hash_request(change) not in tried

    return skip_repeats(situation, filter(is_untried, change_levers(situation, base, texts=texts)))


def skip_repeats(situation: Situation, plans: Iterable[Plan]) -> Iterator[Plan]:
    """The plans, weighed by the lessons, without those that cannot be carried out or make the weights of a trial again.

    Those of methods that broke, and those that there are not the tokens for, are left out, too. Of
    several that make the same weights, the first.
    """
    seen: set[str] = set()
    for plan in map(situation.orders.weigh, plans):
        try:
            made = situation.orders.identify(plan)
            repeated = made in seen or situation.find_trial(plan) is not None or situation.find_broken(plan) is not None
            repeated = repeated or bool(situation.find_expense(plan))
        except ImpossiblePlan:
            continue
        if not repeated and plan.recipe.method not in situation.broken:
            yield plan
        seen |= {made} - {""}


def change_levers(situation: Situation, base: Plan, *, texts: bool = True) -> Iterator[Plan]:
    """Every plan that differs from `base` in one lever, or in all small ones, likeliest first, tried or not."""
    recipe = base.recipe
    yield from change_recipes(situation, base, texts=texts)
    yield _vary(base, recipe, "The accepted plan, with groups weighed as the lessons now say.")
    for strength in STRENGTHS:
        yield _vary(
            base,
            recipe.model_copy(update={"strength": strength}),
            f"Lean {1 - strength:.0%} towards uniform, in case the KL curves exaggerate.",
        )
    for tilt in TILTS:
        for selector, share in rank_groups(situation.layers, situation.sparsity):
            adjustment = Adjustment(selector=selector, action="factor", factor=tilt)
            yield base.model_copy(
                update={
                    "adjustments": [*base.adjustments, adjustment],
                    "reason": f"{selector} holds {share:.0%} of the predicted KL; count it {tilt:g} times.",
                }
            )


def change_recipes(situation: Situation, base: Plan, *, texts: bool = True) -> Iterator[Plan]:
    """Those of the plans that `change_levers` has whose recipe is another."""
    if is_misled(situation.trials, situation.config):
        yield _vary(base, HEDGED, MISTRUST)
    find_mix = partial(_find_mix, situation) if texts else tuple
    for changed, reason in change_recipe(base.recipe, situation.config, find_mix):
        yield _vary(base, changed, reason)


def change_recipe(recipe: Recipe, config: RunConfig, find_mix: Callable[[], Mix]) -> Iterator[tuple[Recipe, str]]:
    """Recipes that differ from `recipe` in one lever, or in all small ones, likeliest first, with the reason for each.

    `find_mix` gives a mixture with questions, if there is one, and is not called before its turn: they may be profiled.
    """

    def change(**levers: Any) -> Recipe:
        return recipe.model_copy(update=levers)

    strong = recipe.method == STRONG.method  # a model's or a person's plan may have been kept
    own = STRONG.model_dump(include={"method", "refit", "curves"})
    if not strong:
        told = f"Grow the two-sided mask in steps and refit the survivors between them ({WORTH['grown']})."
        yield change(**own), told
    if config.polish_tokens and not recipe.polish:
        yield change(polish=True), f"Fit all survivors of all layers together, on {config.polish_tokens:,} tokens."
    if not recipe.mix and (mix := find_mix()):
        share = f"{dict(mix)[QUESTIONS]:.0%}"
        yield change(mix=mix), f"Statistics that are {share} of other questions, so that facts weigh more."
    if strong and _is_plain(recipe):
        every = "a finer growth, a damped fit, a clipped gamma."
        told = f"Small levers together: statistics in order, {every} ({WORTH['together']}.)"
        yield change(**TOGETHER, statistics="sequential"), told
        yield change(**TOGETHER, statistics="dense"), f"Small levers together: {every}"
    if recipe.statistics == "dense":
        told = f"Block by block, each seeing what its pruned predecessors pass on ({WORTH['sequential']})."
        yield change(statistics="sequential"), told
    if strong and recipe.refit_steps < FINE_STEPS:
        finer = f"Grow the mask in {FINE_STEPS} steps, to follow what survivors take over ({WORTH['steps']})."
        yield change(refit_steps=FINE_STEPS), finer
    if strong and not config.pattern:  # which compares within outputs as it is
        rows = change(**ROWS, damping=recipe.damping or DAMPED)
        yield rows, f"Compare weights within each output, in case the mask drops outputs whole ({WORTH['rows']})."
    if recipe.refits and not recipe.damping:
        told = f"Damp the fit: less of what inputs have in common here is in other text ({WORTH['damping']})."
        yield change(damping=DAMPED), told
    if recipe.gamma == "plain" and METHODS[recipe.method].weighs_outputs:
        told = f"Clip gamma, in case a few loud tokens decide which weights go ({WORTH['gamma']})."
        yield change(gamma="clipped"), told
    if recipe.curves == "mask":
        told = f"Share out by what this method really leaves, not by what a mask removes ({WORTH['curves']})."
        yield change(curves="method"), told


def _is_plain(recipe: Recipe) -> bool:
    """Whether no small lever was pulled."""
    return all(getattr(recipe, lever) == getattr(STRONG, lever) for lever in (*TOGETHER, "statistics"))


def list_question_mixes(config: RunConfig) -> list[Mix]:
    """Mixtures with questions, those with the fewest first."""
    return [mix_questions(share) for share in SHORT.values()] if config.mixes_questions else []


def _find_mix(situation: Situation) -> Mix:
    """The first of these; nothing where there are none, or too few questions."""
    if read_layers := situation.read_layers:
        for mix in list_question_mixes(situation.config):
            with suppress(ImpossiblePlan):
                read_layers(Recipe(mix=mix))
                return mix
    return ()


def _vary(base: Plan, recipe: Recipe, reason: str) -> Plan:
    return base.model_copy(update={"recipe": recipe, "reason": reason})


def rank_groups(layers: Sequence[LayerProfile], sparsity: dict[str, float]) -> list[tuple[str, float]]:
    """(selector, share of the predicted KL at these sparsities) of every group, largest first."""
    kl = {selector: group_kl(group, sparsity) for selector, group in group_layers(layers).items()}
    total = sum(kl.values()) or 1.0
    return sorted(((selector, value / total) for selector, value in kl.items()), key=lambda pair: (-pair[1], pair[0]))
