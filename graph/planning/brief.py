"""Plan a round with a chat model: what it is shown, what it may ask, and what it may answer.

The prompt is made so that its long part never changes within a run: the instructions
(`graph/prompts/planner.md` and `planner_tools.md`, free to edit) and the table of layers
come first, so that endpoints can serve them from their prompt cache.
"""

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AnyMessage, HumanMessage, SystemMessage

from graph.config import RunConfig, read_prompt
from graph.goals.schema import count_allowed
from graph.llm.ask import CallRecord, KeepPrompt, Reply, ask
from graph.llm.attempts import UNMETERED, Meter
from graph.llm.ladder import describe_schema
from graph.llm.quoting import data_block, quote_data, quote_words
from graph.llm.toolbox import Toolbox, do_now
from graph.planning.past import (
    describe_bounds,
    describe_dense,
    describe_experience,
    describe_goal,
    describe_hope,
    describe_notes,
    describe_probes,
    describe_shares,
    describe_texts,
    spell_out_plan,
    spell_out_trial,
    write_plan,
)
from graph.planning.plan import MOST_HYPOTHESIS, Plan, drop_schema, find_schema, tell_of_cuts
from graph.planning.prices import describe_costs, describe_spending
from graph.planning.situation import Situation
from graph.planning.table import TOLD_ZEROS, describe_groups, describe_layers, describe_parts, describe_present
from graph.reflecting.posterior import WHOLE
from graph.reflecting.schema import Lesson
from tools.base.named import hide_directories, hide_path
from tools.base.words import round_seconds, show_short
from tools.plans.budget import same_sparsity
from tools.plans.cuts import Parts
from tools.plans.groups import drop_null
from tools.results.trial import Trial

MAX_TRIALS = 12
MAX_LESSONS = 12
LATEST = 2
"""Trials of which is told whole what was expected of them, and what the reflector said."""
EARLIER = 160
"""Characters of that for those before them."""


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
        _find_schema(situation.config),
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
    if situation.parts is not None:
        return _cut_messages(situation, situation.parts, toolbox)
    parts = [
        describe_groups(situation) if toolbox else describe_layers(situation),
        _describe_model(situation),
        _describe_bounds(situation),
        _describe_trials(situation),
        *filter(None, [describe_probes(situation.probes), describe_experience(situation.experience)]),
        _describe_lessons(situation.lessons, situation.config),
        *filter(None, [describe_notes(situation.notes)]),
        _describe_rest(situation, grouped=toolbox is not None),
        *_describe_tools(toolbox),
        f"Plan round {situation.iteration}.",
    ]
    return [SystemMessage(_instructions(situation.config, toolbox is not None)), HumanMessage("\n\n".join(parts))]


def _cut_messages(situation: Situation, parts: Parts, toolbox: Toolbox | None) -> list[AnyMessage]:
    """As `planner_messages`, where parts are to go."""
    told = [
        describe_parts(parts),
        _describe_model(situation),
        _describe_bounds(situation),
        _describe_trials(situation),
        *filter(None, [describe_probes(situation.probes), describe_notes(situation.notes)]),
        *_describe_tools(toolbox),
        f"Plan round {situation.iteration}.",
    ]
    return [SystemMessage(_instructions(situation.config, toolbox is not None)), HumanMessage("\n\n".join(told))]


def _describe_tools(toolbox: Toolbox | None) -> list[str]:
    """What is left for instruments, and what they take; nothing where there are none."""
    return ["\n".join(filter(None, [f"Tools: {toolbox.describe_budget()}", toolbox.prices]))] if toolbox else []


def tell_schema(plans: type[Plan]) -> str:
    """The JSON schema of plans as a prompt has it: without what names say anyhow, and what is told with the recipe."""
    schema = describe_schema(plans)
    parts = schema.pop("$defs")
    if group := parts.get("GroupRecipe"):  # runs that take parts away have none
        own, told = group["properties"].items(), parts["Recipe"]["properties"]
        group["properties"] = {name: {} if name in told else field for name, field in own}
    short = _shorten_schema(_put_in_place(schema, parts))
    return json.dumps(short, separators=(",", ":"), ensure_ascii=False)


def _shorten_schema(node: Any) -> Any:
    if not isinstance(node, dict):
        return [_shorten_schema(part) for part in node] if isinstance(node, list) else node
    node = drop_null(node)
    idle = {"title", "additionalProperties", "minLength"}
    told = bool(node.keys() & {"enum", "properties", "items", "maxLength"})
    told = told or isinstance(node.get("default"), bool | float)
    idle |= {"type"} if told else set()
    idle |= {"default"} if node.get("default", 0) in ("", None) else set()
    return {
        key: {name: _shorten_schema(part) for name, part in value.items()}
        if key in ("properties", "$defs")
        else _shorten_schema(value)
        for key, value in node.items()
        if key not in idle
    }


def _put_in_place(node: Any, parts: dict[str, Any]) -> Any:
    """The schema with its parts where they are meant; what is said of the place counts."""
    if isinstance(node, list):
        return [_put_in_place(item, parts) for item in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        node = parts[node["$ref"].rsplit("/", 1)[-1]] | {key: value for key, value in node.items() if key != "$ref"}
    return {key: _put_in_place(value, parts) for key, value in node.items()}


def _find_schema(config: RunConfig) -> type[Plan]:
    if config.takes_parts:
        return tell_of_cuts()
    return find_schema(config.polish_tokens, config.mixable, config.pattern, writes=count_allowed(config) > 0)


def _instructions(config: RunConfig, tools: bool) -> str:
    schema = tell_schema(_find_schema(config))
    text = config.planner_prompt or read_prompt("cuts" if config.takes_parts else "planner")
    return text.replace("{tools}", _tell_tools(config) if tools else "").replace("{schema}", schema)


def _tell_tools(config: RunConfig) -> str:
    """What the prompt says of the tools; nothing of the rule's plans where the planner is to do without them."""
    if config.takes_parts:
        return read_prompt("cuts_tools")
    text = read_prompt("planner_tools")
    return re.sub(r"^- `candidates\(.*\n", "", text, flags=re.MULTILINE) if config.planner_unaided else text


def _describe_model(situation: Situation) -> str:
    """What is pruned, and by how much text; constant through a run. Of files no more than their names."""
    config = situation.config
    kind = f" ({quote_data(situation.architecture, 60)})" if situation.architecture else ""
    pattern = f", zeros {config.pattern}" if config.pattern else ""
    model, text = hide_path(config.model), hide_directories(config.calibration_text)
    tokens, windows = config.count_fitted() * config.window, config.count_all("validation")
    each = ", of each text as many, whatever it counts, and so is every part of them" if len(config.text) > 1 else ""
    return (
        f'Model "{quote_data(model, 80)}"{kind}{pattern}; statistics of {tokens:,} tokens of '
        f'"{quote_data(text, 160)}"; trials on {windows} windows of {config.window:,}{each}.'
    )


def _describe_bounds(situation: Situation) -> str:
    config = situation.config
    limit = ""
    if not situation.at_target and not config.pattern:
        base = (situation.accepted or situation.dense).perplexity
        shown = "unknown" if base is None else f"{config.limit_perplexity(base):.5g}"
        times = f"{1 + config.tau:g} times that of the last accepted weights"
        limit = f" Perplexity limit of this round: {shown} ({times})."
    text = (
        f"Bounds: target sparsity {config.target_sparsity:g}{_describe_reach(config)}. "
        f"Round {situation.iteration} of at most {_count_rounds(situation)}.{limit} At the target kept if KL is lower "
        f"with probability {config.accept_probability:g}."
    ) + describe_shares(config, situation.texts_left)
    text += describe_bounds(config, situation.dense)
    text += describe_costs(config, situation.budget) + describe_spending(config, situation.seconds, situation.usage)
    if config.min_fact_retention:
        text += f" A round whose answer probability kept is below {config.min_fact_retention:g} is rolled back."
    text += describe_goal(config)
    if not config.protect:
        return text
    selectors = [quote_data(selector, 80) for selector in config.protect[:20]]
    return f"{text} Never touched, whatever you plan:\n" + data_block("protected", selectors)


def _describe_reach(config: RunConfig) -> str:
    """What the target comes to where parts go, else how far a layer may go."""
    if config.takes_parts:
        return f", which leaves {config.aim}"
    return f". No layer above {config.max_layer_sparsity:g}"


def _count_rounds(situation: Situation) -> int:
    budget = situation.budget
    return budget.count_rounds(situation.iteration - 1) if budget else situation.config.max_iterations


def _describe_trials(situation: Situation) -> str:
    dense = situation.dense
    lines = [f"dense: perplexity {show_short(dense.perplexity)}{describe_dense(dense)}"]
    left_out = len(situation.trials) - MAX_TRIALS
    if left_out > 0:
        lines.append(f"({left_out} earlier trials left out)")
    shown = situation.trials[-MAX_TRIALS:]
    for place, trial in enumerate(shown, 1 - len(shown)):
        limit = MOST_HYPOTHESIS if place > -LATEST else EARLIER
        judged = quote_words(situation.judged.get(trial.iteration, ""), limit)
        beside = situation.beside.get(trial.iteration)
        lines.append(
            _describe_trial(trial, hypothesis=limit)
            + (f"; beside what is kept now {beside[0]:+.3g} +- {show_short(beside[1])}" if beside else "")
            + (f"; reflector: {judged}" if judged else "")
        )
    told = data_block("trials", lines) + _describe_kept(situation)
    return f"Trials so far, on the validation text:\n{told}"


def _describe_kept(situation: Situation) -> str:
    """The plan of the weights that were kept last, as its planner would write it; empty where there is none."""
    if situation.accepted is None or situation.accepted_plan is None:
        return ""
    plan = write_plan(spell_out_plan(situation.accepted_plan.model_copy(update={"reason": ""})))
    return f"\nThe plan of round {situation.accepted.iteration}, kept last:\n" + data_block("kept", [plan])


def _describe_trial(trial: Trial, limit: int = 160, hypothesis: int = MOST_HYPOTHESIS) -> str:
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
        f"KL {show_short(trial.kl)}{error}, predicted {show_short(trial.predicted_kl)}"
        f"{describe_hope(trial.kl, trial.predicted_kl)}{describe_texts(trial)}"
        f"{describe_facts(trial)}; {trial.verdict}: {quote_data(trial.reason, limit)}"
        f"{f'; expected: {quote_words(trial.hypothesis, hypothesis)}' if trial.hypothesis else ''}"
    )


def describe_facts(trial: Trial) -> str:
    """`; answer probability kept 0.912 +- 0.008` where questions were asked of both models, else nothing."""
    if trial.fact_retention is None:
        return ""
    return f"; answer probability kept {show_short(trial.fact_retention)} +- {show_short(trial.fact_error)}"


def describe_change(trial: Trial, before: Trial | None) -> str:
    """`; -0.0151 +- 0.0042 beside the last kept`: paired, of KL; empty where nothing was kept `before`."""
    if before is None or trial.change_error is None or trial.kl is None or before.kl is None:
        return ""
    return f"; {trial.kl - before.kl:+.3g} +- {show_short(trial.change_error)} beside the last kept"


def recount_trial(trial: Trial, before: Trial | None = None) -> str:
    """A trial in one line, with more of it than the prompt has room for, and beside what was kept `before` it."""
    line = f"{_describe_trial(trial, 2_000)}{describe_change(trial, before)}"
    plan = f"; plan {write_plan(spell_out_trial(trial))}" if trial.recipe or trial.cut else ""
    return f"{line}; {round_seconds(trial.seconds):g} s to measure{plan}"


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
    expected = "the profile's curves say" if lesson.selector == WHOLE else "was predicted"
    cost = f"{quote_data(lesson.selector, 80)} cost {show_short(lesson.factor)} times what {expected}. "
    cost = "" if lesson.moved and lesson.selector == WHOLE else cost  # a trial that blames nobody
    idle = "" if lesson.knows(text, pattern) else f" (another {other} than this run's: in no allocation)"
    return (
        f"{model}run {quote_data(lesson.run, 40)} round {lesson.iteration}, "
        f"{quote_data(lesson.recipe, 40) or 'any recipe'}{ground}{idle}: "
        f"{cost}{quote_data(lesson.text, 200)}"
    )


def _describe_rest(situation: Situation, *, grouped: bool) -> str:
    """What is left to prune, and the present sparsities in the order of the table."""
    total = sum(layer.weights for layer in situation.layers)
    zeros = sum(layer.weights * situation.sparsity.get(layer.name, 0.0) for layer in situation.layers)
    now, target = zeros / total, situation.config.target_sparsity
    # Neither the model's own few zeros nor what is between the two: a weak model takes that for the sparsity to plan.
    if situation.accepted is None and all(share < TOLD_ZEROS for share in situation.sparsity.values()):
        return f"Left to prune: all of {total:,} weights; sparsity is {target:g} at the target. Nothing is pruned yet."
    text = f"Left to prune: sparsity is {now:.4f} of {total:,} weights now, and {target:g} at the target."
    if situation.accepted is not None and situation.at_target:
        text += f" The target is reached: only a KL below {show_short(situation.accepted.kl)} is kept."
    return text + describe_present(situation, grouped=grouped)
