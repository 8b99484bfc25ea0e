"""Say in figures what a trial teaches, whoever else has something to say of it.

`draw_lesson` compares what was predicted with what was measured. A chat model may add to it (`combine_lessons`): its
lessons weigh by its own confidence, at most `WORD` of a measurement each, and only where the trial's surprise is
beyond the noise; about the layers that the rule speaks of, the measurement stands and the model adds words, unless it
vetoes the measured lesson, which then weighs nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from graph.config import RunConfig
from graph.planning.orders import drop_lessons, group_kl
from graph.planning.plan import Plan
from graph.reflecting.posterior import WHOLE, find_curves, find_mover, tidy_selector
from graph.reflecting.schema import MOST, Learnt, Lesson, Note, Reflection, Tried
from graph.state import SIGMAS
from tools.base.words import shorten
from tools.instruments.probed import PastProbe
from tools.plans.budget import same_sparsity
from tools.plans.cuts import Parts
from tools.plans.groups import name_work
from tools.plans.layer_profile import LayerProfile, group_layers
from tools.plans.recipe import Recipe
from tools.results.trial import Trial

LEVER_CHARACTERS = 160
"""Characters that name levers."""


def note_tried(run: str, trial: Trial, before: Trial | None, pattern: str) -> Tried | None:
    """What the trial's levers did, beside the last kept one; None where that had another sparsity or nothing paired."""
    if before is None or not before.kl or trial.kl is None or trial.change_error is None:
        return None
    levers = name_levers(trial, before)
    if not levers or not same_sparsity(trial.sparsity, before.sparsity):
        return None
    return Tried(
        run=run,
        iteration=trial.iteration,
        levers=levers,
        sparsity=trial.sparsity,
        pattern=pattern,
        change=trial.kl / before.kl - 1,
        error=trial.change_error / before.kl,
    )


def name_levers(trial: Trial, before: Trial) -> str:
    """Such as `refit: gamma clipped for plain, with *.v_proj x2`: the method, and what is not as it was before.

    Empty where nothing is, or the recipes are not known.
    """
    if trial.recipe is None or before.recipe is None:
        return ""
    ours, theirs = _list_values(trial.recipe), _list_values(before.recipe)
    changed = [f"{name} {value} for {theirs[name]}" for name, value in ours.items() if value != theirs[name]]
    rest, former = _find_rest(trial, trial.recipe), _find_rest(before, before.recipe)
    if rest != former:
        changed += [f"{word} {part}" for word, part in (("with", rest), ("without", former)) if part]
    if not changed and trial.plan != before.plan:
        changed = ["other factors of lessons"]
    return shorten(f"{trial.recipe.method}: {', '.join(changed)}", LEVER_CHARACTERS) if changed else ""


def _list_values(recipe: Recipe) -> dict[str, str]:
    """What each field comes to, in words; the user's pattern is no lever."""
    values: dict[str, Any] = {name: getattr(recipe, name) for name in Recipe.model_fields if name != "pattern"}
    values |= {"refit": recipe.refits, "refit_steps": recipe.steps}
    values |= {"damping": recipe.fit_damping, "mix": dict(recipe.mix)}
    return {name: _show(value) for name, value in values.items()}


def _show(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return " ".join(f"{share:g} {name}" for name, share in value.items()) or "as in the run"
    return f"{value:g}" if isinstance(value, float) else f"{value}"


def _find_rest(trial: Trial, recipe: Recipe) -> str:
    """What a plan's line says behind its recipe, lessons aside: groups of layers, adjustments."""
    return drop_lessons(trial.plan).partition(recipe.label)[2].strip(" ·")


WORD = 0.5
"""A model's lesson weighs at most this much of a measurement without noise."""

MOST_MOVED = 32
"""Groups that a lesson notes the movement of, those that moved most."""


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
    notes: Sequence[Note] = ()
    """Of strategy, of this and earlier runs."""
    probes: Sequence[PastProbe] = ()
    """Of this and earlier rounds, the latest."""
    parts: Parts | None = None
    """What is known of the model's parts, where some are to go: then nothing is known of layers."""
    rounds: int = 0
    """Rounds that there may be in all, this one among them; 0: as many as the config says."""

    @property
    def is_surprise(self) -> bool:
        """Whether what was measured differs from what was predicted by more than the noise."""
        lesson = self.measured
        if lesson is None or lesson.measured is None:
            return False
        error = self.trial.change_error if lesson.moved else self.trial.kl_error
        return abs(lesson.measured - lesson.predicted) > SIGMAS * (error or 0.0)


def draw_lesson(
    run: str,
    layers: Sequence[LayerProfile],
    trial: Trial,
    sparsity: dict[str, float],
    before: Trial | None,
    before_sparsity: dict[str, float],
    profile: Sequence[LayerProfile] | None = None,
) -> Lesson | None:
    """What one trial teaches; None when it taught nothing (nothing finite, nothing predicted, nothing pruned for it).

    Where weights moved at the same sparsity and recipe, the lesson notes how, for `graph.reflecting.posterior`, and
    is about the group that all but moved alone; where there is none, it blames none. Otherwise it is about the model as
    a whole: how many times the KL that the curves of the `profile` say was measured, whichever curves the trial's
    allocation read, so that trials by other curves can be set beside it; without a profile, that the trial predicted.
    `layers` have the KL curves that the allocation read. The confidence is 1/(1 + s^2), where s is the standard error
    of the factor: an observation without noise weighs 1, one as uncertain as the factor itself half of that.
    """
    recipe = trial.recipe
    if recipe is None or trial.kl is None or trial.predicted_kl <= 0 or trial.kl <= 0:
        return None
    if before is None or not _is_comparable(before, trial):
        predicted = group_kl(profile, sparsity) if profile else trial.predicted_kl
        return _lesson_of_whole(run, recipe, trial, predicted) if predicted > 0 else None
    before_kl, before_predicted = before.kl or 0.0, group_kl(layers, before_sparsity)
    scale = before_kl / before_predicted if before_predicted > 0 else 1.0
    moved = {
        selector: scale * (group_kl(group, sparsity) - group_kl(group, before_sparsity))
        for selector, group in group_layers(layers).items()
    }
    return _lesson_of_movement(run, recipe, trial, moved, trial.kl - before_kl) if any(moved.values()) else None


def _lesson_of_movement(run: str, recipe: Recipe, trial: Trial, moved: dict[str, float], measured: float) -> Lesson:
    """Of a trial that was predicted to change the KL of groups by so much, and changed the model's as measured."""
    predicted, error = sum(moved.values()), trial.change_error
    is_noise = error is not None and abs(measured - predicted) <= SIGMAS * error
    mover = find_mover(moved)
    largest = max(map(abs, moved.values()))
    noise = 1.0 if error is None else error / largest
    factor = 1 + (measured - predicted) / moved[mover] if mover and not is_noise else 1.0
    factor = min(max(factor, 1 / MOST), MOST)
    changed = f"changed KL by {measured:+.4f} where {predicted:+.4f} was predicted"
    if mover is None:
        text = f"Moving {sum(map(bool, moved.values()))} groups at once {changed}: none of them is to blame alone."
    else:
        advice = "as predicted, within the noise" if is_noise else f"alone, it would count {factor:.2f} times"
        text = f"Pruning {mover} {'more' if moved[mover] > 0 else 'less'} {changed}: {advice}."
    most = sorted(moved, key=lambda selector: -abs(moved[selector]))[:MOST_MOVED]
    return Lesson(
        run=run,
        iteration=trial.iteration,
        recipe=name_work(recipe, trial.groups),
        curves=find_curves(recipe),
        selector=mover or WHOLE,
        factor=_round(factor),
        confidence=round(1 / (1 + noise**2), 4),
        predicted=predicted,
        measured=measured,
        moved={selector: _round(moved[selector]) for selector in most if moved[selector]},
        error=error,
        text=text,
    )


def _is_comparable(before: Trial, trial: Trial) -> bool:
    """Whether the trial moved weights only: the same work inside each layer, the same sparsity."""
    if before.recipe is None or trial.recipe is None or not before.kl:
        return False
    same_work = name_work(before.recipe, before.groups) == name_work(trial.recipe, trial.groups)
    return same_work and same_sparsity(before.sparsity, trial.sparsity)


def _lesson_of_whole(run: str, recipe: Recipe, trial: Trial, predicted: float) -> Lesson:
    assert trial.kl is not None
    factor = trial.kl / predicted
    return Lesson(
        run=run,
        iteration=trial.iteration,
        recipe=name_work(recipe, trial.groups),
        selector=WHOLE,
        factor=_round(factor),
        confidence=round(1 / (1 + ((trial.kl_error or 0.0) / trial.kl) ** 2), 4),
        predicted=predicted,
        measured=trial.kl,
        text=f"At {trial.sparsity:.1%} with {recipe.label} KL was {trial.kl:.4f}, {factor:.2f} times the "
        f"{predicted:.4f} of the profile's curves.",
    )


def _round(factor: float) -> float:
    """Four digits, but never to zero: factors are averaged as logs."""
    return float(f"{factor:.4g}")


def combine_lessons(evidence: Evidence, reflection: Reflection) -> list[Lesson]:
    """The measured lesson, and what the reflector adds to it."""
    lessons, vetoed = [], 0
    if evidence.measured is not None:
        selector = tidy_selector(evidence.measured.selector, evidence.layers)
        text = f"{evidence.measured.text}{_recount_facts(evidence)}"
        update: dict[str, Any] = {"selector": selector, "text": text}
        vetoed = int(reflection.veto)
        if vetoed:  # mere words, which nothing is computed with
            why = " ".join(reflection.reason.split()) or "no reason given"
            update |= {
                "text": f"{text} The reflector vetoes this: {why}",
                "factor": 1.0,
                "confidence": 0.0,
                "moved": {},
            }
        lessons.append(evidence.measured.model_copy(update=update))
    for learnt in reflection.lessons:
        selector = tidy_selector(learnt.selector, evidence.layers)
        said = f"{' '.join(learnt.evidence.split()).rstrip('.')}."
        known = next((i for i, lesson in enumerate(lessons) if i >= vetoed and lesson.selector == selector), None)
        if known is None:
            lessons.append(_make_lesson(evidence, learnt, selector, said))
        else:
            text = f"{lessons[known].text} The reflector ({learnt.direction}): {said}"
            lessons[known] = lessons[known].model_copy(update={"text": text})
    config, sparsity = evidence.config, round(evidence.trial.sparsity, 4)
    ground = {"calibration": config.calibration_text, "pattern": config.pattern, "sparsity": sparsity}
    return [lesson.model_copy(update=ground) for lesson in lessons]


def _recount_facts(evidence: Evidence) -> str:
    """What the trial did to the right answers' probability, as a lesson tells it; "" where no questions were asked."""
    share, least = evidence.trial.fact_retention, evidence.config.min_fact_retention
    if share is None:
        return ""
    return f" Answer probability kept: {share:.3f}" + (f", less than {least:g}." if share < least else ".")


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
        recipe=name_work(evidence.recipe, evidence.plan.groups),
        curves=find_curves(evidence.recipe),
        selector=selector,
        factor=1.0 if idle else _round(learnt.multiplier),
        predicted=measured.predicted if measured else trial.predicted_kl,
        measured=measured.measured if measured else trial.kl,
        text=f"The reflector finds {selector} {learnt.direction}: {said} ({advice})",
        source="reflector",
        confidence=0.0 if idle else round(min(learnt.confidence, WORD), 4),
    )
