"""What a planner is told of earlier rounds and runs beside their trials and lessons, in short tables."""

import json
from collections.abc import Sequence
from typing import Any

from graph.config import RunConfig
from graph.llm.quoting import data_block, quote_data
from graph.planning.plan import Plan
from graph.reflecting.schema import Experience, Note
from tools.base.named import hide_directories
from tools.base.words import show_short, spare_brackets
from tools.instruments.probed import PastProbe
from tools.plans.recipe import Recipe
from tools.results.trial import Trial


def describe_shares(config: RunConfig, left: int = 0) -> str:
    """What each text counts, and how many more plans may have the model write."""
    told = [f"{name} {share:.2f}" for name, share in config.text_shares.items()]
    if not told:
        return ""
    more = f" `new_texts`: {left} more." if config.goal_tokens else ""
    return f" Texts and their weights: {', '.join(told)}; perplexity and KL are the means by weight.{more}"


def describe_bounds(config: RunConfig, dense: Trial) -> str:
    """How far the perplexity of a text may rise, in figures that rounds are compared with."""
    known = {text.name: text.perplexity for text in dense.texts if text.perplexity is not None}
    told = [
        f"{name} {show_short((1 + rise) * known[name])} ({1 + rise:g} times the dense {show_short(known[name])})"
        for name, rise in config.text_bounds.items()
        if name in known
    ]
    return f" Whatever that allows, a round is rolled back above a perplexity on {', '.join(told)}." if told else ""


def describe_goal(config: RunConfig) -> str:
    """The words that weights and bounds stand for."""
    words = quote_data(" ".join(config.goal.splitlines()), 2000)
    return f" The goal that they stand for:\n{data_block('goal', [words])}" if words else ""


def describe_dense(dense: Trial) -> str:
    """` (code 4, prose 9)`: the dense model's perplexities."""
    told = [f"{text.name} {show_short(text.perplexity)}" for text in dense.texts]
    return f" ({', '.join(told)})" if told else ""


def describe_texts(trial: Trial) -> str:
    """`; code KL 0.21 +- 0.004, perplexity 4.4, prose KL 0.05 +- 0.001, perplexity 9.1`."""
    told = [
        f"{text.name} KL {show_short(text.kl)} +- {show_short(text.kl_error)}, perplexity {show_short(text.perplexity)}"
        for text in trial.texts
    ]
    return f"; {', '.join(told)}" if told else ""


LEVERS = {"groups", "adjustments", "cut"}
"""What a plan, and its trial, says beside sparsity and recipe."""


def spell_out_plan(plan: Plan) -> dict[str, Any]:
    """A plan as a planner would write it, and its reason, if it has one; a cut has no recipe, and texts that were
    written for it are there."""
    return _spell_out(plan.sparsity, plan.recipe, plan) | ({"reason": plan.reason} if plan.reason else {})


def spell_out_trial(trial: Trial) -> dict[str, Any]:
    """What a trial's plan asked for, as `spell_out_plan`."""
    return _spell_out(trial.sparsity, trial.recipe, trial)


def write_plan(told: dict[str, Any]) -> str:
    """What was spelt out as JSON in one line, fit for a block of data."""
    return spare_brackets(json.dumps(told, ensure_ascii=True, separators=(",", ":")))


def _spell_out(sparsity: float, recipe: Recipe | None, of: Plan | Trial) -> dict[str, Any]:
    others = of.model_dump(include=LEVERS, exclude_defaults=True)
    told: dict[str, Any] = {"sparsity": float(f"{sparsity:.4g}")}
    if recipe is not None and "cut" not in others:
        told["recipe"] = _spell_recipe(recipe)
    return told | others


def _spell_recipe(recipe: Recipe) -> dict[str, Any]:
    """The fields of a recipe that are not as they are when left out, and its method."""
    told = recipe.model_dump(exclude_defaults=True, exclude={"pattern", "statistics"})
    own = Recipe(method=recipe.method).statistics
    return {"method": recipe.method, **told, **({} if recipe.statistics == own else {"statistics": recipe.statistics})}


def describe_experience(experience: Sequence[Experience]) -> str:
    """A table of what levers did, by model and sparsity; empty without any."""
    title = "Levers in earlier runs: change of KL in % beside the run's last kept plan, paired (trials, runs):"
    return f"{title}\n{data_block('experience', list_rows(experience))}" if experience else ""


def list_rows(experience: Sequence[Experience]) -> list[str]:
    """`refit: gamma clipped for plain -1.2 +- 0.3 (3, 2)` for each row, under a line that names model and sparsity."""
    lines, last = list[str](), ""
    for row in experience:
        model = f"relative {quote_data(hide_directories(row.model), 60)}" if row.model else "this model"
        if (place := f"{model}, {row.sparsity:.0%}") != last:
            lines.append(place)
            last = place
        figures = f"{100 * row.change:+.1f} +- {100 * row.error:.1f} ({row.trials}, {row.runs})"
        lines.append(f"{quote_data(row.levers, 100)} {figures}")
    return lines


def describe_notes(notes: Sequence[Note]) -> str:
    """A line for each note of strategy; empty without any."""
    lines = [
        f"run {quote_data(note.run, 40)} at {note.sparsity:.0%}, by {count_rounds(note)}: {quote_data(note.text, 300)}"
        for note in notes
    ]
    return f"Notes of the reflector, oldest first:\n{data_block('notes', lines)}" if lines else ""


def count_rounds(note: Note) -> str:
    """`rounds 2, 3`: the evidence of a note."""
    return f"round{'s' if len(note.trials) > 1 else ''} {', '.join(map(str, note.trials))}"


def describe_hope(measured: float | None, predicted: float | None) -> str:
    """` (x1.56)`: how many times as much KL was measured as predicted; empty where one is not known."""
    return f" (x{measured / predicted:.3g})" if measured is not None and predicted else ""


MAX_PROBES = 8
"""Probes of earlier rounds that planners are shown, the latest."""


def take_latest(probes: Sequence[PastProbe], count: int = MAX_PROBES) -> list[PastProbe]:
    """So many of the latest, and before them the best ones that these are compared with."""
    earlier, latest = probes[:-count], probes[-count:]
    told = {probe.best for probe in latest} - {0}
    return [*(probe for probe in earlier if probe.number in told), *latest]


def describe_probes(probes: Sequence[PastProbe]) -> str:
    """A line for each probe, this round's among them where it has been planned; empty without any."""
    lines = [_describe_probe(probe) for probe in probes]
    of_texts = ", also of named texts" if any(probe.texts for probe in probes) else ""
    beside = f"change beside the weights kept then{of_texts}, to its round's best"
    title = f"Probes (KL on tokens; paired: {beside}):"
    return f"{title}\n{data_block('probes', lines)}" if lines else ""


def _describe_probe(probe: PastProbe) -> str:
    error = "" if probe.kl_error is None else f" +- {show_short(probe.kl_error)}"
    change = "" if probe.change is None else f"; {probe.change:+.3g} +- {show_short(probe.change_error)}"
    for name, (of_text, text_error) in probe.texts.items():
        change += f", {quote_data(name, 40)} {of_text:+.3g} +- {show_short(text_error)}"
    behind = f"; {probe.behind:+.3g} +- {show_short(probe.behind_error)} to {probe.best}" if probe.best else ""
    trial = "" if probe.trial is None else f"; its round's trial {probe.trial:+.3g} +- {show_short(probe.trial_error)}"
    plan = quote_data(probe.plan, 120)
    kl = f"{show_short(probe.kl)}{error}{describe_hope(probe.kl, probe.predicted)} on {probe.tokens}"
    return f"probe {probe.number}, round {probe.iteration}: {plan}: {kl}{change}{behind}{trial}"
