"""Compare what was predicted with what was measured, and say in figures what that teaches.

The rule (`draw_lesson`) always speaks. A chat model may add to it (`reflect_with_chat`, `combine_lessons`): its
lessons weigh by its own confidence, at most `WORD` of a measurement each, and only where the trial's surprise is
beyond the noise; about the layers that the rule speaks of, the measurement stands and the model adds words.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AnyMessage, HumanMessage, SystemMessage

from graph.config import RunConfig, read_prompt
from graph.llm.ask import CallRecord, ask
from graph.llm.quoting import data_block, quote_data
from graph.planning.brief import describe_facts
from graph.planning.rule import group_kl
from graph.reflecting.lessons import WHOLE, find_curves, tidy_selector
from graph.state import MAX_LEARNT, MOST, Learnt, Lesson, Plan, Reflection, Trial, same_sparsity
from tools.plans.layer_profile import LayerProfile, group_layers
from tools.plans.recipe import Recipe
from tools.plans.selectors import select_layers
from tools.results.schema import SIGMAS

WORD = 0.5
"""A model's lesson weighs at most this much of a measurement without noise."""

MAX_GROUPS = 60
MAX_TRIALS = 12
MAX_LESSONS = 20

# The rule


def draw_lesson(
    run: str,
    layers: Sequence[LayerProfile],
    trial: Trial,
    sparsity: dict[str, float],
    before: Trial | None,
    before_sparsity: dict[str, float],
) -> Lesson | None:
    """What one trial teaches; None when it taught nothing (nothing finite, nothing predicted).

    Where weights moved at the same sparsity and recipe, the surprise goes to the group whose predicted KL moved most.
    Otherwise the lesson is about the model as a whole: how many times the predicted KL was measured. `layers` have the
    KL curves that the trial's allocation read. The confidence is 1/(1 + s^2), where s is the standard error of the
    factor: an observation without noise weighs 1, one as uncertain as the factor itself half of that.
    """
    recipe = trial.recipe
    if recipe is None or trial.kl is None or trial.predicted_kl <= 0 or trial.kl <= 0:
        return None
    if before is None or not _is_comparable(before, trial):
        return _lesson_of_whole(run, recipe, trial)
    groups = group_layers(layers)
    moved = {s: group_kl(g, sparsity) - group_kl(g, before_sparsity) for s, g in groups.items()}
    selector = max(moved, key=lambda s: abs(moved[s]))
    before_kl, before_predicted = before.kl or 0.0, group_kl(layers, before_sparsity)
    scale = before_kl / before_predicted if before_predicted > 0 else 1.0
    predicted, measured = scale * (group_kl(layers, sparsity) - before_predicted), trial.kl - before_kl
    holds = scale * group_kl(groups[selector], sparsity)
    if holds <= 0:
        return None
    # Pruning the group more and being hurt more than predicted means precious; pruning it less and gaining less
    # than predicted means the opposite.
    surprise = (measured - predicted) / holds * math.copysign(1.0, moved[selector])
    if trial.change_error is not None and abs(measured - predicted) <= SIGMAS * trial.change_error:
        surprise = 0.0
    factor = min(max(1 + surprise, 1 / MOST), MOST)
    direction = "more" if moved[selector] > 0 else "less"
    advice = f"count it {factor:.2f} times" if surprise else "as predicted, within the noise"
    noise = 1.0 if trial.change_error is None else trial.change_error / holds
    return Lesson(
        run=run,
        iteration=trial.iteration,
        recipe=recipe.mask_label,
        curves=find_curves(recipe),
        selector=selector,
        factor=_round(factor),
        confidence=round(1 / (1 + noise**2), 4),
        predicted=predicted,
        measured=measured,
        text=f"Pruning {selector} {direction} changed KL by {measured:+.4f} where {predicted:+.4f} was predicted: "
        f"{advice}.",
    )


def _is_comparable(before: Trial, trial: Trial) -> bool:
    """Whether the trial moved weights only: the same work inside each layer, the same sparsity."""
    if before.recipe is None or trial.recipe is None or not before.kl:
        return False
    same_work = before.recipe.mask_label == trial.recipe.mask_label
    return same_work and same_sparsity(before.sparsity, trial.sparsity)


def _lesson_of_whole(run: str, recipe: Recipe, trial: Trial) -> Lesson:
    assert trial.kl is not None
    factor = trial.kl / trial.predicted_kl
    return Lesson(
        run=run,
        iteration=trial.iteration,
        recipe=recipe.mask_label,
        selector=WHOLE,
        factor=_round(factor),
        confidence=round(1 / (1 + ((trial.kl_error or 0.0) / trial.kl) ** 2), 4),
        predicted=trial.predicted_kl,
        measured=trial.kl,
        text=f"At {trial.sparsity:.1%} with {recipe.label} KL was {trial.kl:.4f}, {factor:.2f} times the predicted "
        f"{trial.predicted_kl:.4f}.",
    )


def _round(factor: float) -> float:
    """Four digits, but never to zero: factors are averaged as logs."""
    return float(f"{factor:.4g}")


# A chat model


@dataclass(frozen=True)
class Evidence:
    """All that a reflector may know of a trial."""

    config: RunConfig
    run: str
    layers: Sequence[LayerProfile]
    """In the model's order, with the KL curves that the plan's allocation read."""
    recipe: Recipe
    """The plan's, with the user's pattern."""
    plan: Plan
    trial: Trial
    sparsity: dict[str, float]
    """Of every layer in this trial."""
    dense: Trial
    before: Trial | None
    """The last trial that was kept before this one."""
    before_sparsity: dict[str, float]
    trials: Sequence[Trial]
    """Those before this one."""
    lessons: Sequence[Lesson]
    measured: Lesson | None
    """What the rule makes of the trial."""

    @property
    def is_surprise(self) -> bool:
        """Whether what was measured differs from what was predicted by more than the noise."""
        lesson = self.measured
        if lesson is None or lesson.measured is None:
            return False
        error = self.trial.kl_error if lesson.selector == WHOLE else self.trial.change_error
        return abs(lesson.measured - lesson.predicted) > SIGMAS * (error or 0.0)


def reflect_with_chat(
    evidence: Evidence,
    model: BaseChatModel,
    on_call: Callable[[CallRecord], None] | None = None,
    on_prompt: Callable[[Sequence[AnyMessage]], None] | None = None,
) -> Reflection:
    """Ask a chat model what a trial taught.

    An answer with a selector that means no layer is handed back like one that does not fit the schema, and once one
    with a lesson that contradicts itself. `on_prompt` hears of the first messages, `on_call` of every reply. Raises
    AgentError when no usable answer came.
    """

    def check(reflection: Reflection) -> None:
        for learnt in reflection.lessons:
            select_layers(learnt.selector, evidence.layers)

    def advise(reflection: Reflection) -> str:
        named = {f"lessons.{i}": learnt.contradiction for i, learnt in enumerate(reflection.lessons)}
        return "\n".join(f"{name}: {problem}" for name, problem in named.items() if problem)

    messages = reflector_messages(evidence)
    if on_prompt:
        on_prompt(messages)
    return ask(model, Reflection, messages, check=check, advise=advise, on_call=on_call)


def combine_lessons(evidence: Evidence, reflection: Reflection) -> list[Lesson]:
    """The measured lesson, and what the reflector adds to it."""
    lessons = []
    if evidence.measured is not None:
        selector = tidy_selector(evidence.measured.selector, evidence.layers)
        text = f"{evidence.measured.text}{_recount_facts(evidence)}"
        lessons.append(evidence.measured.model_copy(update={"selector": selector, "text": text}))
    for learnt in reflection.lessons:
        selector = tidy_selector(learnt.selector, evidence.layers)
        said = f"{' '.join(learnt.evidence.split()).rstrip('.')}."
        known = next((i for i, lesson in enumerate(lessons) if lesson.selector == selector), None)
        if known is None:
            lessons.append(_make_lesson(evidence, learnt, selector, said))
        else:
            text = f"{lessons[known].text} The reflector ({learnt.direction}): {said}"
            lessons[known] = lessons[known].model_copy(update={"text": text})
    return lessons


def _recount_facts(evidence: Evidence) -> str:
    """What the trial did to the facts, as a lesson tells it; nothing where no questions were asked."""
    share, least = evidence.trial.fact_retention, evidence.config.min_fact_retention
    if share is None:
        return ""
    return f" It left {share:.3f} of the facts" + (f", fewer than {least:g}." if share < least else ".")


def _find_idle(evidence: Evidence, learnt: Learnt, selector: str) -> str:
    """Why a reflector's lesson is not to weigh in any allocation; empty where it is to."""
    if selector == WHOLE:
        return "it changes no allocation"
    if not evidence.is_surprise:
        return "the trial held no surprise beyond the noise"
    return "its direction and its multiplier contradict each other" if learnt.contradiction else ""


def _make_lesson(evidence: Evidence, learnt: Learnt, selector: str, said: str) -> Lesson:
    trial, measured = evidence.trial, evidence.measured
    idle = _find_idle(evidence, learnt, selector)
    advice = f"words only, as {idle}" if idle else f"count it {learnt.multiplier:.2f} times"
    return Lesson(
        run=evidence.run,
        iteration=trial.iteration,
        recipe=evidence.recipe.mask_label,
        curves=find_curves(evidence.recipe),
        selector=selector,
        factor=1.0 if idle else _round(learnt.multiplier),
        predicted=measured.predicted if measured else trial.predicted_kl,
        measured=measured.measured if measured else trial.kl,
        text=f"The reflector finds {selector} {learnt.direction}: {said} ({advice})",
        source="reflector",
        confidence=0.0 if idle else round(min(learnt.confidence, WORD), 4),
    )


# What it is shown


def reflector_messages(evidence: Evidence) -> list[AnyMessage]:
    """The two messages a reflector gets: instructions that never change, and the trial."""
    parts = [
        _describe_groups(evidence),
        _describe_plan(evidence.plan, evidence.trial),
        _describe_outcome(evidence),
        _describe_trials(evidence),
        _describe_lessons(evidence.lessons),
        _describe_rest(evidence),
        f"Reflect on round {evidence.trial.iteration}.",
    ]
    return [SystemMessage(_instructions(evidence.config)), HumanMessage("\n\n".join(parts))]


def _instructions(config: RunConfig) -> str:
    schema = json.dumps(Reflection.model_json_schema(), separators=(",", ":"), ensure_ascii=False)
    text = config.reflector_prompt or read_prompt("reflector")
    for name, value in (("{most}", MAX_LEARNT), ("{least}", 1 / MOST), ("{greatest}", MOST)):
        text = text.replace(name, f"{value:g}")
    return text.replace("{schema}", schema)


def _describe_groups(evidence: Evidence) -> str:
    """A line for each group, those with the greatest KL where there are too many."""
    lines = []
    for selector, group in group_layers(evidence.layers).items():
        sizes = [layer.weights for layer in group]
        shares = [
            sum(size * sparsity[layer.name] for size, layer in zip(sizes, group, strict=True)) / sum(sizes)
            for sparsity in (evidence.before_sparsity, evidence.sparsity)
        ]
        kl = [group_kl(group, sparsity) for sparsity in (evidence.before_sparsity, evidence.sparsity)]
        line = f"{quote_data(selector, 120)}: sparsity {shares[0]:.3f} -> {shares[1]:.3f}, predicted KL "
        lines.append((max(kl), f"{line}{_figure(kl[0])} -> {_figure(kl[1])}"))
    least = sorted((kl for kl, _ in lines), reverse=True)[:MAX_GROUPS][-1]
    shown = [line for kl, line in lines if kl >= least][:MAX_GROUPS]
    left_out = f" ({len(lines) - len(shown)} with less KL left out)" if len(lines) > len(shown) else ""
    example = f"layers are named like: {quote_data(evidence.layers[0].name, 120)}"
    return f"The groups of layers, before and in this trial{left_out}:\n" + data_block("groups", [example, *shown])


def _describe_plan(plan: Plan, trial: Trial) -> str:
    lines = [f"plan: {quote_data(trial.plan, 300)}", f"reason: {quote_data(plan.reason, 500) or 'none given'}"]
    for adjustment in plan.adjustments[:MAX_LESSONS]:
        values = {k: v for k, v in adjustment.model_dump().items() if v is not None and k not in ("selector", "reason")}
        figures = ", ".join(f"{key} {value}" for key, value in values.items())
        lines.append(f"adjusted {quote_data(adjustment.selector, 80)}: {figures}; {quote_data(adjustment.reason, 160)}")
    for selector, factor in list(plan.multipliers.items())[:MAX_LESSONS]:
        lines.append(f"earlier lessons counted {quote_data(selector, 80)} {factor:g} times")
    return "The plan:\n" + data_block("plan", lines)


def _describe_outcome(evidence: Evidence) -> str:
    lines = [f"{name}: {_describe_trial(trial)}" for name, trial in _name_trials(evidence)]
    if evidence.measured is not None:
        lesson = evidence.measured
        beyond = "beyond the noise" if evidence.is_surprise else "inside the noise"
        lines.append(f"the rule's lesson, {beyond}: {quote_data(lesson.text, 300)}")
    else:
        lines.append("the rule's lesson: none, for nothing finite was measured")
    return "What came of it, on the validation text:\n" + data_block("outcome", lines)


def _name_trials(evidence: Evidence) -> list[tuple[str, Trial]]:
    before = [("before", evidence.before)] if evidence.before else []
    return [("dense", evidence.dense), *before, ("this trial", evidence.trial)]


def _describe_trials(evidence: Evidence) -> str:
    if not evidence.trials:
        return "Earlier trials: none."
    lines = [f"round {t.iteration}: {quote_data(t.plan, 160)}; {_describe_trial(t)}" for t in evidence.trials]
    return "Earlier trials, oldest first:\n" + data_block("trials", lines[-MAX_TRIALS:])


def _describe_trial(trial: Trial) -> str:
    if trial.verdict == "refuse":
        return f"sparsity {trial.sparsity:.4g}; refused by a person: {quote_data(trial.reason, 160)}"
    change = f"; change from the last kept known to +- {_figure(trial.change_error)}" if trial.change_error else ""
    error = "" if trial.kl_error is None else f" +- {_figure(trial.kl_error)}"
    return (
        f"sparsity {trial.sparsity:.4g}; perplexity {_figure(trial.perplexity)}; "
        f"KL {_figure(trial.kl)}{error}{change}, predicted {_figure(trial.predicted_kl)}{describe_facts(trial)}; "
        f"{trial.verdict}: {quote_data(trial.reason, 160)}"
    )


def _describe_lessons(lessons: Sequence[Lesson]) -> str:
    if not lessons:
        return "Lessons so far: none."
    lines = [
        f"{quote_data(lesson.selector, 80)} with {quote_data(lesson.recipe, 40) or 'any recipe'}: x{lesson.factor:g}, "
        f"observed {lesson.count} times, confidence {lesson.confidence:.2f}. {quote_data(lesson.text, 200)}"
        for lesson in lessons[-MAX_LESSONS:]
    ]
    return "Lessons so far, of this and earlier runs, oldest first:\n" + data_block("lessons", lines)


def _describe_rest(evidence: Evidence) -> str:
    config, trial = evidence.config, evidence.trial
    best = trial if trial.verdict == "accept" else evidence.before
    reached = best is not None and same_sparsity(best.sparsity, config.target_sparsity)
    text = (
        f"Round {trial.iteration} of at most {config.max_iterations}. "
        f"The target sparsity {config.target_sparsity:g} is {'reached' if reached else 'not reached yet'}."
    )
    if best is None or not reached:
        return text
    idle = trial.iteration - best.iteration
    return f"{text} Rounds without an improvement: {idle}; the run ends by itself at {config.patience}."


def _figure(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3g}"
