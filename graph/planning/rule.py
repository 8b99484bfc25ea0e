"""Plan a round by rule: no key, no model, the same answer every time.

It starts from the KL curves' own allocation with masks alone, part of the way; then goes to the target, by masks alone
where the lessons so far predict these to pass, strengthens the recipe and then halves the step after a rollback, and at
the target tries small levers together and then one lever at a time. A method that broke whenever it was carried out is
not planned again.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import islice

from graph.config import RunConfig
from graph.planning.plan import Plan
from graph.planning.refinements import (
    HEDGED,
    MASKS,
    MISTRUST,
    STRONG,
    change_levers,
    change_recipes,
    is_misled,
    plan_refinements,
    skip_repeats,
)
from graph.planning.situation import Situation
from graph.reflecting.posterior import WHOLE, weigh_evidence
from tools.base.errors import ImpossiblePlan
from tools.plans.budget import SAME_SPARSITY, same_sparsity
from tools.plans.cuts import Cutting
from tools.plans.recipe import Recipe
from tools.results.trial import Trial

FIRST_STEP = 2 / 3
"""Share of the target that the first, cheap round prunes, to learn how far the KL curves are off."""

LOST_ROUNDS = 2
"""Rounds in a row that may bring nothing before the rule plans one in a weak planner's stead."""


MOST_BLOCKS = 2
"""Whole blocks more, or fewer, than in the accepted cut that the rule tries at the target."""


def plan_by_rule(situation: Situation) -> Plan | None:
    """The next plan; None when every lever was tried, broke, or takes more tokens than are left. Raises ImpossiblePlan
    when bounds cannot be met."""
    if situation.parts is not None:
        found = _plan_cut(situation)
    elif situation.at_target:
        found = next(plan_refinements(situation), None)
    else:
        found = next(_plan_pattern(situation), None) if situation.config.pattern else _plan_climb(situation)
    return None if found is None or situation.find_expense(found) else found


def list_candidates(situation: Situation, most: int) -> list[Plan]:
    """So many plans that the rule would make next, likeliest first: below the target its next step, and what it would
    try at the target, which others may go to at once.

    No plan among them asks for another calibration text, for none is profiled just to be named. Raises ImpossiblePlan
    when bounds cannot be met.
    """
    if situation.at_target:
        return list(islice(plan_refinements(situation, texts=False), most))
    if situation.config.pattern:
        return list(islice(_plan_pattern(situation, texts=False), most))
    step, strongest = _plan_climb(situation), _find_strongest(situation)
    if step is None or strongest is None:
        return []
    whole = Plan(sparsity=situation.config.target_sparsity, recipe=strongest, reason="The whole step at once.")
    later = skip_repeats(situation, (step, whole, *change_recipes(situation, whole, texts=False)))
    return list(islice(later, most))


def find_relief(situation: Situation) -> str:
    """Why the rule had better plan this round in the planner's stead; empty where it need not."""
    if situation.at_target and not tried_strongest(situation.trials, situation.config):
        return (
            f"the target is reached, but {name_strongest(situation.trials, situation.config)} has not been tried there"
        )
    if situation.is_last and situation.trials and not situation.at_target:
        return "the target is not reached, and this is the last round"
    if len(_failures(situation)) % (LOST_ROUNDS + 1) == LOST_ROUNDS:
        return f"{LOST_ROUNDS} rounds in a row brought nothing"
    return ""


def tried_strongest(trials: Sequence[Trial], config: RunConfig) -> bool:
    """Whether the strongest method has been tried at the target, or refused by a person; cuts have no method."""
    if config.takes_parts:
        return True
    strongest = HEDGED if is_misled(trials, config) else STRONG
    strong = [x for x in trials if x.recipe and x.recipe.method == strongest.method and x.recipe.refits]
    return any(same_sparsity(trial.sparsity, config.target_sparsity) for trial in strong)


def name_strongest(trials: Sequence[Trial], config: RunConfig) -> str:
    """What `tried_strongest` asks for."""
    return "wanda with a refit" if is_misled(trials, config) else STRONG.method


def _plan_pattern(situation: Situation, *, texts: bool = True) -> Iterator[Plan]:
    """A pattern has one step, and leaves nothing to share out: the strongest recipe, then what may make it stronger."""
    config, strongest = situation.config, _find_strongest(situation)
    if strongest is None:
        return
    reason = f"{config.pattern} in one step, with the strongest recipe{_name_broken(situation)}."
    first = Plan(sparsity=config.target_sparsity, recipe=strongest, reason=reason)
    yield from skip_repeats(situation, (first, *change_levers(situation, first, texts=texts)))


def _plan_climb(situation: Situation) -> Plan | None:
    target = situation.config.target_sparsity
    start = (situation.accepted or situation.dense).sparsity
    failed, strongest = _failures(situation), _find_strongest(situation)
    if strongest is None:
        return None
    if failed:
        return _plan_after_rollback(situation, start, failed[-1], strongest)
    if not situation.trials:
        step = round(max(FIRST_STEP * target, (start + target) / 2), 4)  # the model may hold zeros already
        return Plan(
            sparsity=step,
            recipe=MASKS,
            reason=f"A first, cheap round at {step:.1%} (masks alone) shows how far the KL curves are off.",
        )
    limit = _limit(situation)
    perplexity = _predict_perplexity(situation, target, MASKS)
    if perplexity <= limit and MASKS.method not in situation.broken:
        return Plan(
            sparsity=target,
            recipe=MASKS,
            reason=f"Masks alone are predicted to reach perplexity {perplexity:.2f}, within the limit of {limit:.2f}.",
        )
    if strongest == HEDGED:
        return Plan(sparsity=target, recipe=HEDGED, reason=MISTRUST)
    if strongest != STRONG:
        reason = f"The whole step, with the strongest recipe{_name_broken(situation)}."
        return Plan(sparsity=target, recipe=strongest, reason=reason)
    return Plan(
        sparsity=target,
        recipe=STRONG,
        reason=f"Masks alone are predicted to reach perplexity {perplexity:.2f}, above the limit of {limit:.2f}, "
        "so the survivors are refitted.",
    )


def _plan_cut(situation: Situation) -> Plan | None:
    """The next cut, by rule; None when every one that it knows was tried.

    To the target at once; where that was rolled back half the step, and half of that as long as whole units come to
    something else, then on. At the target, cuts that differ from the accepted one by a block or a group of heads.
    Raises ImpossiblePlan where the target cannot be met.
    """
    if situation.at_target:
        return next(skip_repeats(situation, _vary_cut(situation)), None)
    target, accepted = situation.config.target_sparsity, situation.accepted
    start = (accepted or situation.dense).sparsity
    failed = _failures(situation)
    cutting = situation.accepted_plan.cut if situation.accepted_plan and situation.accepted_plan.cut else Cutting()
    shared = "Shared out by the KL curves of the parts"
    if not failed:
        return Plan(sparsity=target, cut=_reach(situation, cutting), reason=f"{shared}, to the target.")
    steps = [Plan(sparsity=step, cut=cutting) for step in _list_halves(start, failed[-1].sparsity)]
    step = next(skip_repeats(situation, steps), None)
    if step is None:
        return None
    part = "half its step" if step.sparsity == steps[0].sparsity else "less of its step, for half is what was tried"
    reason = f"{shared}, round {failed[-1].iteration} was rolled back: {part}."
    return step.model_copy(update={"reason": reason})


def _reach(situation: Situation, cutting: Cutting) -> Cutting:
    """What an accepted plan says of its cut, for the target; of as many blocks and heads none may come to that."""
    try:
        situation.orders.draft(Plan(sparsity=situation.config.target_sparsity, cut=cutting))
    except ImpossiblePlan:
        return Cutting(refit=cutting.refit)
    return cutting


def _list_halves(start: float, end: float) -> Iterator[float]:
    """Half of the way from one sparsity to another, half of that, and so on, as far as they differ from the first."""
    while (step := round(start + (end - start) / 2, 4)) - start > SAME_SPARSITY and step < end:
        yield step
        end = step


def _vary_cut(situation: Situation) -> Iterator[Plan]:
    """Cuts that differ from the accepted one in one number, likeliest first."""
    parts, base = situation.parts, situation.accepted_plan
    assert parts is not None and base is not None, "a cut was accepted"
    cutting = base.cut or Cutting()
    cut = situation.orders.draft(base).cut
    assert cut is not None, "its order is a cut's"
    target, told = situation.config.target_sparsity, parts.shape.heads
    changes: list[tuple[dict[str, int], str]] = [({}, "the accepted cut, at the target")]
    gone = len(cut.dropped)
    for step in _list_steps(situation, gone):
        words = "One whole block" if abs(step) == 1 else f"{abs(step)} whole blocks"
        changes.append(({"blocks": gone + step}, f"{words} {'more' if step > 0 else 'fewer'}."))
    place = told.options.index(cut.heads)
    for other in (place - 1, place + 1):
        if other in range(len(told.options)):
            heads = told.options[other]
            other_heads = {"blocks": gone, "heads": heads}
            changes.append((other_heads, f"{heads} of {told.units} groups of heads in place of {cut.heads}."))
    for change, reason in changes:
        if change.get("blocks", 0) >= 0:
            yield Plan(sparsity=target, cut=cutting.model_copy(update=change), reason=reason)


def _list_steps(situation: Situation, gone: int) -> list[int]:
    """Whole blocks more than the `gone` ones of the accepted cut, or fewer (below 0), likeliest first.

    Where the accepted cut has more than the one that was kept before it at the target, the longest step on comes first,
    for every step is a round, and a step of one block less is still tried behind it; likewise where it has fewer.
    """
    target = situation.config.target_sparsity
    steps = [way * step for step in range(1, MOST_BLOCKS + 1) for way in (1, -1)]
    kept = [x for x in situation.trials if x.verdict == "accept" and same_sparsity(x.sparsity, target)]
    if len(kept) < 2:
        return steps
    before = situation.orders.draft(Plan(sparsity=kept[-2].sparsity, cut=kept[-2].cut or Cutting())).cut
    assert before is not None, "its order is a cut's"
    grown = gone - len(before.dropped)
    onwards = sorted((step for step in steps if step * grown > 0), key=abs, reverse=True)
    return [*onwards, *(step for step in steps if step not in onwards)]


def _plan_after_rollback(situation: Situation, start: float, last: Trial, strongest: Recipe) -> Plan | None:
    """Strengthen the recipe first; with the strongest recipe, halve the step, until there is none that could be told
    from what was accepted. After one that broke, take another."""
    undone = f"Round {last.iteration} was {'refused' if last.verdict == 'refuse' else 'rolled back'}"
    sparsity = min(last.sparsity, situation.config.target_sparsity)
    if last.broken:
        other = Plan(sparsity=sparsity, recipe=strongest, reason=f"Round {last.iteration} broke: {last.reason}.")
        if situation.find_trial(other) is None:
            return other
        undone = f"Round {last.iteration} broke"
    elif last.recipe and not last.recipe.refits and strongest.refits:
        return Plan(
            sparsity=sparsity,
            recipe=strongest,
            reason=f"{undone}; refitting the survivors repairs most of a mask's damage.",
        )
    step = round(start + (last.sparsity - start) / 2, 4)
    if step - start <= SAME_SPARSITY:
        return None
    return Plan(
        sparsity=step,
        recipe=strongest,
        reason=f"{undone} at {last.sparsity:.1%}; half the step from {start:.1%}.",
    )


def _find_strongest(situation: Situation) -> Recipe | None:
    """The strongest recipe whose method has not broken; None where they all have."""
    recipes = (*([HEDGED] if is_misled(situation.trials, situation.config) else []), STRONG, MASKS)
    return next((recipe for recipe in recipes if recipe.method not in situation.broken), None)


def _name_broken(situation: Situation) -> str:
    """Which methods are out of the question, in a reason's words; empty where none is."""
    return f" that does not break ({', '.join(sorted(situation.broken))} did)" if situation.broken else ""


def _failures(situation: Situation) -> list[Trial]:
    """What was rolled back, or refused by a person, since the last accepted trial."""
    failed: list[Trial] = []
    for trial in situation.trials:
        failed = [] if trial.verdict == "accept" else [*failed, trial]
    return failed


def _limit(situation: Situation) -> float:
    last = situation.accepted or situation.dense
    return situation.config.limit_perplexity(last.perplexity or math.inf)


def _predict_perplexity(situation: Situation, sparsity: float, recipe: Recipe) -> float:
    """Perplexity from the KL curves, corrected by what lessons say of this recipe.

    On the text a model models well, nats of KL are nats of loss, so the dense perplexity grows by exp(KL).
    """
    orders = situation.orders
    kl = orders.draft(orders.weigh(Plan(sparsity=sparsity, recipe=recipe))).predicted_kl
    return (situation.dense.perplexity or math.inf) * math.exp(min(kl * calibration(situation, recipe), 50.0))


def calibration(situation: Situation, recipe: Recipe) -> float:
    """Measured over predicted KL for this method and refit: the mean of what lessons measured, 1 without any.

    On this text and pattern, at whatever sparsity: it is what a step from one sparsity to another goes by.
    """
    text, pattern = situation.config.calibration_text, situation.config.pattern
    known = [
        (math.log(lesson.factor), weigh_evidence(lesson))
        for lesson in situation.lessons
        if lesson.selector == WHOLE and lesson.recipe == recipe.work_label and lesson.knows(text, pattern)
        if not lesson.same_config and not lesson.moved
    ]
    total = sum(weight for _, weight in known)
    return math.exp(sum(log * weight for log, weight in known) / total) if total else 1.0
