"""Plan a round with a chat model: what it is shown, what it may ask, and what it may answer.

The prompt is made so that its long part never changes within a run: the instructions
(`graph/prompts/planner.md` and `planner_tools.md`, free to edit) and the table of layers
come first, so that endpoints can serve them from their prompt cache.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AnyMessage, HumanMessage, SystemMessage

from graph.config import RunConfig, read_prompt
from graph.llm.ask import CallRecord, KeepPrompt, Reply, ask
from graph.llm.metering import UNMETERED, Meter
from graph.llm.quoting import data_block, quote_data
from graph.llm.toolbox import Toolbox, do_now
from graph.planning.plan import Plan, drop_schema, find_schema
from graph.planning.situation import Situation
from graph.planning.texts import describe_bounds, describe_dense, describe_goal, describe_shares, describe_texts
from graph.reflecting.schema import Lesson
from graph.state import Trial, same_sparsity
from tools.base.names import hide_directories
from tools.base.words import show_short
from tools.plans.costs import (
    count_calibration,
    count_in_order,
    count_polish,
    count_profile,
    count_walk,
    count_weights,
)
from tools.plans.layer_profile import LEVELS, LayerProfile
from tools.plans.recipe import Recipe

MAX_ROWS = 400
"""Rows of the layer table; 10 to 14 tokens each. Larger models are shown as means over neighbours."""
MAX_TRIALS = 12
MAX_LESSONS = 12


def plan_with_chat(
    situation: Situation,
    model: BaseChatModel,
    on_call: Callable[[CallRecord], None] | None = None,
    check: Callable[[Plan], None] | None = None,
    advise: Callable[[Plan], str] | None = None,
    keep_prompt: KeepPrompt = do_now,
    toolbox: Toolbox | None = None,
    carry_out: Callable[[Callable[[], Reply]], Reply] = do_now,
    meter: Meter = UNMETERED,
) -> Plan:
    """Ask a chat model for the plan of the next round; it may call the tools of the `toolbox` first.

    `check` raises ValueError with a reason for the model when a plan that fits the schema
    still cannot be carried out: a sparsity above the target, a selector that means no
    layer, bounds that no allocation meets. Such a plan is handed back like any that does not
    fit. `advise` has words for a plan that can be carried out to no avail, which is handed back with them once.
    `keep_prompt` makes the first messages, `carry_out` does a call, and either may have kept what it gives; `on_call`
    hears of every reply, the `meter` of every request. Raises AgentError when no usable plan came.
    """
    messages = keep_prompt(lambda: planner_messages(situation, toolbox))
    plan = ask(
        model,
        find_schema(situation.config.polish_tokens, situation.config.text),
        messages,
        check=check and (lambda plan: check(drop_schema(plan))),
        advise=advise and (lambda plan: advise(drop_schema(plan))),
        on_call=on_call,
        toolbox=toolbox,
        carry_out=carry_out,
        meter=meter,
    )
    return drop_schema(plan)


def advise_against(plan: Plan, situation: Situation) -> str:
    """Why a plan that can be carried out would be a wasted round, for the planner; empty where it need not be."""
    target = situation.config.target_sparsity
    if situation.at_target and not same_sparsity(plan.sparsity, target):
        return (
            f"sparsity {plan.sparsity:g} is off the target, which is reached: such a plan is rolled back whatever it "
            f"measures; plan {target:g}"
        )
    trial = situation.find_trial(plan)
    if trial is None:
        return ""
    return (
        "This is a plan that you know the result of, and it would be the same again. Change a lever that is untried.\n"
        + _describe_trial(trial)
    )


def planner_messages(situation: Situation, toolbox: Toolbox | None = None) -> list[AnyMessage]:
    """The two messages a planner gets: instructions that never change, and the situation."""
    parts = [
        describe_layers(situation),
        _describe_bounds(situation),
        _describe_trials(situation),
        _describe_lessons(situation.lessons, situation.config),
        _describe_rest(situation),
        *([_describe_untried(situation.untried)] if situation.untried else []),
        *([f"Tools: {toolbox.describe_budget()}"] if toolbox else []),
        f"Plan round {situation.iteration}.",
    ]
    return [SystemMessage(_instructions(situation.config, toolbox is not None)), HumanMessage("\n\n".join(parts))]


def _instructions(config: RunConfig, tools: bool) -> str:
    described = find_schema(config.polish_tokens, config.text).model_json_schema()
    schema = json.dumps(described, separators=(",", ":"), ensure_ascii=False)
    text = config.planner_prompt or read_prompt("planner")
    return text.replace("{tools}", read_prompt("planner_tools") if tools else "").replace("{schema}", schema)


# The table of layers


@dataclass(frozen=True)
class _Row:
    """A layer of the table, or several that it stands for."""

    blocks: str
    kind: str
    layers: list[LayerProfile]


def describe_layers(situation: Situation) -> str:
    """The table of layers: constant through a run, a line each, at most 8,000 tokens."""
    rows = _rows(situation.layers)
    labels = _labels([row.kind for row in rows])
    columns = _columns(situation.config.target_sparsity)
    unit = _unit([fmean(layer.kappa[columns[0]] for layer in row.layers) for row in rows])
    levels = " ".join(f"kl{LEVELS[column]:.2f}".replace("0.", ".") for column in columns)
    lines = [_describe_kind(kind, label, situation.layers) for kind, label in labels.items()]
    lines += [f"columns: layer, wanda z, grad z, {levels} (kl in units of {unit:.0e} nats/token)"]
    blocks = None
    for row in rows:
        if row.blocks != blocks:
            blocks = row.blocks
            lines.append(f"block {blocks}")
        lines.append(f"{labels[row.kind]} {_figures(row.layers, columns, unit)}")
    example = quote_data(situation.layers[0].name, 120)
    title = f"The {len(situation.layers)} prunable layers{_describe_merging(rows, len(situation.layers))}:"
    return title + "\n" + data_block("layers", [f"names look like: {example}", *lines])


def _describe_merging(rows: Sequence[_Row], layers: int) -> str:
    if len(rows) == layers:
        return ""
    left_out = layers - sum(len(row.layers) for row in rows)
    return f", shown as {len(rows)} means over neighbours" + (f" ({left_out} not shown)" if left_out else "")


def _describe_kind(kind: str, label: str, layers: Sequence[LayerProfile]) -> str:
    same = [layer for layer in layers if layer.kind == kind or _merge_numbers(layer.kind) == kind]
    sizes = sorted({layer.weights for layer in same})
    size = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    zeros = sum(layer.zeros for layer in same) / sum(layer.weights for layer in same)
    already = f", {zeros:.2g} of them zero already" if zeros >= 0.001 else ""
    return f"{label} = {quote_data(kind, 80)}: {size} weights{already}"


def _rows(layers: Sequence[LayerProfile]) -> list[_Row]:
    """The layers in a fixed order, merged as little as `MAX_ROWS` asks.

    First numbered siblings (experts) become one, then neighbouring blocks.
    """
    rows = _merge(layers, 1, numbers=False)
    if len(rows) <= MAX_ROWS:
        return rows
    span = 1
    rows = _merge(layers, span, numbers=True)
    while len(rows) > MAX_ROWS and span <= max(layer.block for layer in layers):
        span += 1
        rows = _merge(layers, span, numbers=True)
    return rows[:MAX_ROWS]


def _merge(layers: Sequence[LayerProfile], span: int, *, numbers: bool) -> list[_Row]:
    last = max(layer.block for layer in layers)
    groups: dict[tuple[int, str], list[LayerProfile]] = {}
    for layer in layers:
        kind = _merge_numbers(layer.kind) if numbers else layer.kind
        groups.setdefault((layer.block // span, kind), []).append(layer)
    return [
        _Row(_range_of_blocks(group * span, min(group * span + span - 1, last)), kind, members)
        for (group, kind), members in sorted(groups.items(), key=lambda item: item[0][0])
    ]


def _range_of_blocks(first: int, last: int) -> str:
    return f"{first}" if first == last else f"{first}-{last}"


def _merge_numbers(kind: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", kind)


def _labels(kinds: Sequence[str]) -> dict[str, str]:
    """A short label for each kind, in order of first appearance: `v` for self_attn.v_proj where that is enough."""
    distinct = list(dict.fromkeys(kinds))
    last = [kind.rsplit(".", 1)[-1].removesuffix("_proj") for kind in distinct]
    return {
        kind: quote_data(kind if last.count(short) > 1 else short, 40)
        for kind, short in zip(distinct, last, strict=True)
    }


def _columns(target: float) -> range:
    """Indices of two of LEVELS: the one nearest to the target and the next above, or the last two."""
    nearest = min(range(len(LEVELS)), key=lambda i: abs(LEVELS[i] - target))
    first = min(nearest, len(LEVELS) - 2)
    return range(first, first + 2)


def _unit(values: Sequence[float]) -> float:
    """A power of ten in which the median value has two digits: for many models every digit is a token."""
    positive = [value for value in values if value > 0 and math.isfinite(value)]
    return 10.0 ** (math.floor(math.log10(median(positive))) - 1) if positive else 1.0


def _figures(layers: Sequence[LayerProfile], columns: Iterable[int], unit: float) -> str:
    scores = [fmean(layer.wanda_z for layer in layers) * 10, fmean(layer.gradient_z for layer in layers) * 10]
    kl = [fmean(layer.kappa[column] for layer in layers) / unit for column in columns]
    return " ".join([*(_rounded(score) for score in scores), *(_two_digits(value) for value in kl)])


def _rounded(value: float) -> str:
    return f"{round(value)}" if math.isfinite(value) else "?"


def _two_digits(value: float) -> str:
    """A number as a whole one of two significant digits: 1234 -> 1200, 5.12 -> 5."""
    if not math.isfinite(value):
        return "?"
    return f"{float(f'{value:.1e}'):.0f}"


# The rest of the situation


def _describe_bounds(situation: Situation) -> str:
    config = situation.config
    limit = "unknown"
    base = (situation.accepted or situation.dense).perplexity
    if base is not None:
        limit = f"{(1 + config.tau) * base:.5g}"
    text = (
        f"Bounds: target sparsity {config.target_sparsity:g}. No layer above {config.max_layer_sparsity:g}. "
        f"Round {situation.iteration} of at most {_count_rounds(situation)}. Perplexity limit of this round: {limit} "
        f"(1 + {config.tau:g} times that of the last accepted weights)."
    ) + describe_shares(config)
    text += describe_bounds(config, situation.dense)
    text += _describe_budget(situation)
    if config.min_fact_retention:
        text += f" A round whose answer probability kept is below {config.min_fact_retention:g} is rolled back."
    text += describe_goal(config)
    if not config.protect:
        return text
    selectors = [quote_data(selector, 80) for selector in config.protect[:20]]
    return f"{text} Never touched, whatever you plan:\n" + data_block("protected", selectors)


def _count_rounds(situation: Situation) -> int:
    budget = situation.budget
    return budget.count_rounds(situation.iteration - 1) if budget else situation.config.max_iterations


def _describe_budget(situation: Situation) -> str:
    """The tokens that are left and what takes them; nothing where they are not limited."""
    config, budget = situation.config, situation.budget
    if budget is None or budget.left == math.inf:
        return ""
    costs = [
        f"a trial takes {budget.trial:,}",
        "a probe as many as it measures on, for each plan",
        f"statistics sequential {count_in_order(['sequential'], config):,} more, stages "
        f"{count_in_order(['stages'], config):,}, in a probe and in a trial",
        f"tokens weighted {count_weights(config) + count_calibration(config):,} more, once for each text",
        f"curves method {count_walk(config):,} more, once for each method",
        f"a new profile, reprofile or another calibration text, {count_profile(config):,}",
    ]
    if config.polish_tokens:
        costs.append(f"polish {count_polish(config, config.polish_tokens):,} more, in a probe and in a trial")
    return (
        f" Budget: {budget.left:,.0f} of {config.max_evaluated_tokens:,} tokens through the model are left, "
        f"{budget.trials_left:.0f} trials without extras: {'; '.join(costs)}. Plans beyond it are refused."
    )


def _describe_trials(situation: Situation) -> str:
    dense = situation.dense
    lines = [f"dense: perplexity {show_short(dense.perplexity)}{describe_dense(dense)}"]
    left_out = len(situation.trials) - MAX_TRIALS
    if left_out > 0:
        lines.append(f"({left_out} earlier trials left out)")
    lines += [_describe_trial(trial) for trial in situation.trials[-MAX_TRIALS:]]
    return "Trials so far, on the validation text:\n" + data_block("trials", lines)


def _describe_trial(trial: Trial, limit: int = 160) -> str:
    plan = re.sub(r"^[\d.]+% ", "", quote_data(trial.plan, limit))  # a percentage would set a bad example
    if trial.verdict == "refuse":
        reason = quote_data(trial.reason, limit)
        return f"round {trial.iteration}: sparsity {trial.sparsity:.4g} {plan}; refused by the user, untried: {reason}"
    if trial.broken:
        reason = f"broke unmeasured, and would again: {quote_data(trial.reason, 2 * limit)}"
        return f"round {trial.iteration}: sparsity {trial.sparsity:.4g} {plan}; {reason}"
    error = f" +- {show_short(trial.kl_error)}" if trial.kl_error is not None else ""
    return (
        f"round {trial.iteration}: sparsity {trial.sparsity:.4g} {plan}; perplexity {show_short(trial.perplexity)}; "
        f"KL {show_short(trial.kl)}{error}, predicted {show_short(trial.predicted_kl)}{describe_texts(trial)}"
        f"{describe_facts(trial)}; {trial.verdict}: {quote_data(trial.reason, limit)}"
        f"{f'; expected: {quote_data(trial.hypothesis, 2 * limit)}' if trial.hypothesis else ''}"
    )


def describe_facts(trial: Trial) -> str:
    """`; answer probability kept 0.912 +- 0.008` where questions were asked of both models, else nothing."""
    if trial.fact_retention is None:
        return ""
    return f"; answer probability kept {show_short(trial.fact_retention)} +- {show_short(trial.fact_error)}"


def recount_trial(trial: Trial) -> str:
    """A trial in one line, with more of it than the prompt has room for."""
    change = f"; +- {show_short(trial.change_error)} beside the last kept" if trial.change_error is not None else ""
    return f"{_describe_trial(trial, 2_000)}{change}; {trial.seconds:.0f} s to measure"


def _describe_lessons(lessons: Sequence[Lesson], config: RunConfig) -> str:
    if not lessons:
        return "Lessons: none yet."
    lines = [describe_lesson(lesson, config) for lesson in lessons[-MAX_LESSONS:]]
    return "Lessons of this and earlier runs, oldest first:\n" + data_block("lessons", lines)


def describe_lesson(lesson: Lesson, config: RunConfig) -> str:
    """A lesson in one line; of one that was learnt on another text or pattern, that it weighs nothing in this run."""
    model = f"{quote_data(lesson.model, 60)}, " if lesson.model else ""  # a relative's
    ground = f" {quote_data(hide_directories(lesson.ground), 80)}" if lesson.ground else ""
    text, pattern = config.calibration_text, config.pattern
    other = "text" if not lesson.knows(text, lesson.pattern or "") else "pattern"
    idle = "" if lesson.knows(text, pattern) else f" (another {other} than this run's: in no allocation)"
    return (
        f"{model}run {quote_data(lesson.run, 40)} round {lesson.iteration}, "
        f"{quote_data(lesson.recipe_label, 40) or 'any recipe'}{ground}{idle}: "
        f"{quote_data(lesson.selector, 80)} cost {show_short(lesson.factor)} times what was predicted. "
        f"{quote_data(lesson.text, 200)}"
    )


def _describe_rest(situation: Situation) -> str:
    """What is left to prune, and the present sparsity of each layer in the order of the table."""
    total = sum(layer.weights for layer in situation.layers)
    zeros = sum(layer.weights * situation.sparsity.get(layer.name, 0.0) for layer in situation.layers)
    now, target = zeros / total, situation.config.target_sparsity
    # Neither the model's own few zeros nor what is between the two: a weak model takes that for the sparsity to plan.
    if all(share < 0.005 for share in situation.sparsity.values()):
        return f"Left to prune: all of {total:,} weights; sparsity is {target:g} at the target. Nothing is pruned yet."
    text = f"Left to prune: sparsity is {now:.4f} of {total:,} weights now, and {target:g} at the target."
    if situation.accepted is not None and now >= target - 0.001:
        text += f" The target is reached: only a KL below {show_short(situation.accepted.kl)} is kept."
    lines: dict[str, list[str]] = {}
    for row in _rows(situation.layers):
        share = fmean(situation.sparsity.get(layer.name, 0.0) for layer in row.layers)
        lines.setdefault(row.blocks, []).append(f"{share:.2f}".removeprefix("0"))
    return f"{text} Present sparsities, a line per block, in the order of the table:\n" + data_block(
        "sparsities", [f"{blocks}: {' '.join(shares)}" for blocks, shares in lines.items()]
    )


def _spell_out(recipe: Recipe) -> dict[str, Any]:
    """The fields of a recipe that are not as they are when left out, and its method."""
    told = recipe.model_dump(exclude_defaults=True, exclude={"pattern", "statistics"})
    own = Recipe(method=recipe.method).statistics
    return {"method": recipe.method, **told, **({} if recipe.statistics == own else {"statistics": recipe.statistics})}


def _describe_untried(plans: Sequence[Plan]) -> str:
    lines = []
    for plan in plans:
        recipe = _spell_out(plan.recipe)
        adjustments = [adjustment.model_dump(exclude_defaults=True) for adjustment in plan.adjustments]
        shown = {"sparsity": plan.sparsity, "recipe": recipe, **({"adjustments": adjustments} if adjustments else {})}
        lines.append(quote_data(f"{json.dumps(shown, ensure_ascii=False)}: {plan.reason}", 400))
    return "Untried, each one lever from the best plan so far, likeliest first:\n" + data_block("untried", lines)
