"""Reflect on a trial with a chat model: what it is shown, and what it may answer."""

import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AnyMessage, HumanMessage, SystemMessage
from pydantic import BaseModel

from graph.config import HEURISTIC, RunConfig, read_prompt
from graph.llm.ask import CallRecord, KeepPrompt, Reply, ask
from graph.llm.attempts import UNMETERED, Meter
from graph.llm.ladder import AgentError, DeadEnd, describe_schema
from graph.llm.models import open_model
from graph.llm.quoting import data_block, quote_data
from graph.llm.spending import Account, CapReached
from graph.llm.toolbox import do_now
from graph.planning.brief import describe_change, describe_facts
from graph.planning.budget import open_budget
from graph.planning.orders import group_kl
from graph.planning.past import describe_notes, describe_probes, describe_texts
from graph.planning.plan import MOST_HYPOTHESIS, Plan
from graph.planning.recipes import find_recipe, gather_layers
from graph.planning.table import describe_parts
from graph.reflecting.rule import WORD, Evidence, draw_lesson
from graph.reflecting.schema import MAX_LEARNT, MOST, Lesson, Reflection, drop_schema, tell_of_cuts
from graph.runs.session import Session, open_bench
from graph.state import State, last_accepted, pair_with_kept
from tools.base.named import hide_directories
from tools.base.words import show_short
from tools.plans.budget import same_sparsity
from tools.plans.groups import describe_group
from tools.plans.layer_profile import group_layers, select_layers
from tools.results.schema import Usage
from tools.results.trial import Trial

if TYPE_CHECKING:
    from tools.workbench.bench import Workbench
from graph.reflecting.schema import MAX_NOTES, Advice, Note


def check_evidence(advice: Advice, evidence: Evidence) -> None:
    """Raises ValueError in one line where a note names a round that measured nothing, or that never was."""
    measured = [trial.iteration for trial in (*evidence.trials, evidence.trial) if trial.measured]
    if unknown := [number for number in advice.trials if number not in measured]:
        rounds = ", ".join(map(str, measured))
        raise ValueError(f"note.trials: round {unknown[0]} of this run measured nothing; its measured rounds: {rounds}")


def take_note(evidence: Evidence, reflection: Reflection) -> Note | None:
    """The reflector's note as the run keeps it; None without one."""
    if reflection.note is None:
        return None
    return Note(
        run=evidence.run,
        iteration=evidence.trial.iteration,
        sparsity=evidence.trial.sparsity,
        pattern=evidence.config.pattern,
        cuts=evidence.config.takes_parts,
        text=" ".join(reflection.note.text.split()),
        trials=sorted(set(reflection.note.trials)),
    )


def add_note(notes: Sequence[Note], new: Note) -> list[Note]:
    """The latest notes, oldest first; one that says the same again takes its last place."""
    return [*(note for note in notes if note.text != new.text), new][-MAX_NOTES:]


MAX_GROUP_LINES = 60
"""Groups of layers whose share of a trial's predicted KL a reflector is told."""
MAX_TRIALS = 12
"""Earlier trials that it is told of, the last ones."""
MAX_LESSONS = 20
"""Lessons of earlier rounds, or adjustments, or factors, that it is told of."""


def reflect_with_chat(
    evidence: Evidence,
    model: BaseChatModel,
    on_call: Callable[[CallRecord], None] | None = None,
    keep_prompt: KeepPrompt = do_now,
    carry_out: Callable[[Callable[[], Reply]], Reply] = do_now,
    meter: Meter = UNMETERED,
) -> Reflection:
    """Ask a chat model what a trial taught.

    An answer with a selector that means no layer, or a note whose evidence is no measured round, is handed back like
    one that does not fit the schema, and once one with a lesson that contradicts itself. `keep_prompt` makes the first
    messages, `carry_out` does a call, and either may have kept what it gives; `on_call` hears of every reply, the
    `meter` of every request. Raises AgentError when no usable answer came.
    """

    def check(answer: BaseModel) -> None:
        reflection = drop_schema(answer)
        for learnt in reflection.lessons:
            select_layers(learnt.selector, evidence.layers)
        if reflection.note is not None:
            check_evidence(reflection.note, evidence)

    def advise(answer: BaseModel) -> str:
        named = {f"lessons.{i}": learnt.contradiction for i, learnt in enumerate(drop_schema(answer).lessons)}
        return "\n".join(f"{name}: {problem}" for name, problem in named.items() if problem)

    schema, messages = _find_schema(evidence.config), keep_prompt(lambda: reflector_messages(evidence))
    return drop_schema(
        ask(model, schema, messages, check=check, advise=advise, on_call=on_call, carry_out=carry_out, meter=meter)
    )


# What it is shown


def reflector_messages(evidence: Evidence) -> list[AnyMessage]:
    """The two messages a reflector gets: instructions that never change, and the trial."""
    parts = [
        describe_parts(evidence.parts) if evidence.parts else _describe_groups(evidence),
        _describe_plan(evidence.plan, evidence.trial),
        _describe_outcome(evidence),
        _describe_trials(evidence),
        *([] if evidence.parts else [_describe_lessons(evidence.lessons)]),
        *filter(None, [describe_probes(evidence.probes), describe_notes(evidence.notes)]),
        _describe_rest(evidence),
        f"Reflect on round {evidence.trial.iteration}.",
    ]
    return [SystemMessage(_instructions(evidence.config)), HumanMessage("\n\n".join(parts))]


def _find_schema(config: RunConfig) -> type[BaseModel]:
    return tell_of_cuts() if config.takes_parts else Reflection


def _instructions(config: RunConfig) -> str:
    schema = json.dumps(describe_schema(_find_schema(config)), separators=(",", ":"), ensure_ascii=False)
    text = config.reflector_prompt or read_prompt("cuts_reflector" if config.takes_parts else "reflector")
    for name, value in (("{most}", MAX_LEARNT), ("{least}", 1 / MOST), ("{greatest}", MOST), ("{word}", WORD)):
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
        lines.append((max(kl), f"{line}{show_short(kl[0])} -> {show_short(kl[1])}"))
    least = sorted((kl for kl, _ in lines), reverse=True)[:MAX_GROUP_LINES][-1]
    shown = [line for kl, line in lines if kl >= least][:MAX_GROUP_LINES]
    left_out = f" ({len(lines) - len(shown)} with less KL left out)" if len(lines) > len(shown) else ""
    example = f"layers are named like: {quote_data(evidence.layers[0].name, 120)}"
    return f"The groups of layers, before and in this trial{left_out}:\n" + data_block("groups", [example, *shown])


def _describe_plan(plan: Plan, trial: Trial) -> str:
    lines = [f"plan: {quote_data(trial.plan, 300)}", f"reason: {quote_data(plan.reason, 500) or 'none given'}"]
    if plan.hypothesis:
        lines.append(f"expected: {quote_data(plan.hypothesis, MOST_HYPOTHESIS)}")
    lines += [f"group: {quote_data(describe_group(group, plan.recipe), 160)}" for group in plan.groups]
    for adjustment in plan.adjustments[:MAX_LESSONS]:
        values = {k: v for k, v in adjustment.model_dump().items() if v is not None and k not in ("selector", "reason")}
        figures = ", ".join(f"{key} {value}" for key, value in values.items())
        lines.append(f"adjusted {quote_data(adjustment.selector, 80)}: {figures}; {quote_data(adjustment.reason, 160)}")
    for selector, factor in list(plan.multipliers.items())[:MAX_LESSONS]:
        lines.append(f"earlier lessons counted {quote_data(selector, 80)} {factor:g} times")
    return "The plan:\n" + data_block("plan", lines)


def _describe_outcome(evidence: Evidence) -> str:
    trials = _name_trials(evidence)
    lines = [f"{name}: {_describe_trial(trial, before)}" for name, trial, before in trials]
    if evidence.parts:
        return "What came of it, on the validation text:\n" + data_block("outcome", lines)
    if evidence.measured is not None:
        lesson = evidence.measured
        beyond = "beyond the noise" if evidence.is_surprise else "inside the noise"
        lines.append(f"the rule's lesson, {beyond}: {quote_data(lesson.text, 300)}")
    else:
        lines.append("the rule's lesson: none, for nothing finite was measured")
    return "What came of it, on the validation text:\n" + data_block("outcome", lines)


def _name_trials(evidence: Evidence) -> list[tuple[str, Trial, Trial | None]]:
    """Each with what was kept before it, where it is to be told beside that."""
    before = [("before", evidence.before, None)] if evidence.before else []
    return [("dense", evidence.dense, None), *before, ("this trial", evidence.trial, evidence.before)]


def _describe_trials(evidence: Evidence) -> str:
    if not evidence.trials:
        return "Earlier trials: none."
    lines = [
        f"round {trial.iteration}: {quote_data(trial.plan, 160)}; {_describe_trial(trial, before)}"
        for trial, before in pair_with_kept(evidence.trials)
    ]
    return "Earlier trials, oldest first:\n" + data_block("trials", lines[-MAX_TRIALS:])


def _describe_trial(trial: Trial, before: Trial | None) -> str:
    if trial.verdict == "refuse":
        return f"sparsity {trial.sparsity:.4g}; refused by a person: {quote_data(trial.reason, 160)}"
    if trial.broken:
        return f"sparsity {trial.sparsity:.4g}; broke, nothing measured: {quote_data(trial.reason, 160)}"
    error = "" if trial.kl_error is None else f" +- {show_short(trial.kl_error)}"
    return (
        f"sparsity {trial.sparsity:.4g}; perplexity {show_short(trial.perplexity)}; "
        f"KL {show_short(trial.kl)}{error}{describe_change(trial, before)}, predicted {show_short(trial.predicted_kl)}"
        f"{describe_texts(trial)}{describe_facts(trial)}; "
        f"{trial.verdict}: {quote_data(trial.reason, 160)}"
    )


def _describe_lessons(lessons: Sequence[Lesson]) -> str:
    if not lessons:
        return "Lessons so far: none."
    lines = [
        f"{quote_data(lesson.selector, 80)} with {quote_data(lesson.recipe, 40) or 'any recipe'}"
        f"{f' {quote_data(hide_directories(lesson.ground), 80)}' if lesson.ground else ''}: x{lesson.factor:g}, "
        f"observed {lesson.count} times, confidence {lesson.confidence:.2f}. {quote_data(lesson.text, 200)}"
        for lesson in lessons[-MAX_LESSONS:]
    ]
    return "Lessons so far, of this and earlier runs, oldest first:\n" + data_block("lessons", lines)


def _describe_rest(evidence: Evidence) -> str:
    config, trial = evidence.config, evidence.trial
    best = trial if trial.verdict == "accept" else evidence.before
    reached = best is not None and same_sparsity(best.sparsity, config.target_sparsity)
    rounds = evidence.rounds or config.max_iterations
    left = f" of at most {rounds}" if trial.iteration < rounds else ", the last: nothing is left for another"
    text = (
        f"Round {trial.iteration}{left}. "
        f"The target sparsity {config.target_sparsity:.4g} is {'reached' if reached else 'not reached yet'}."
    )
    if best is None or not reached:
        return text
    idle = trial.iteration - best.iteration
    end = f"; the run ends by itself at {config.patience}" if config.patience <= rounds else ""
    return f"{text} Rounds without an improvement: {idle}{end}."


def gather_evidence(state: State, session: Session) -> Evidence:
    """What the last trial was, and what the rule makes of it, which is nothing where parts go."""
    assert state.plan is not None and state.dense is not None, "plan and profile run first"
    trial, before = state.trials[-1], last_accepted(state.trials[:-1])
    with open_bench(state, session) as bench:
        known = _read_parts(bench, state) if state.parts else _read_layers(bench, state, session, trial, before)
    return Evidence(
        config=state.config,
        run=state.run,
        recipe=find_recipe(state.plan, state.config),
        plan=state.plan,
        trial=trial,
        dense=state.dense,
        before=before,
        trials=state.trials[:-1],
        notes=state.notes,
        probes=state.probes,
        rounds=open_budget(state).count_rounds(state.iteration),
        **known,
    )


def _read_parts(bench: "Workbench", state: State) -> dict[str, Any]:
    """What is known where parts go."""
    nothing: dict[str, Any] = {"layers": (), "sparsity": {}, "before_sparsity": {}, "lessons": (), "measured": None}
    return nothing | {"parts": bench.cuts.read(state.parts)}


def _read_layers(
    bench: "Workbench", state: State, session: Session, trial: Trial, before: Trial | None
) -> dict[str, Any]:
    """What is known of layers, and the rule's lesson."""
    assert state.plan is not None, "gather_evidence has seen to it"
    layers = gather_layers(
        state.plan, state.config, lambda recipe: bench.curves.describe_layers(state.profile, recipe, session.progress)
    )
    profile = bench.profiles.read(state.profile).layers
    sparsity = bench.pruner.planned_sparsity(trial.checkpoint)
    before_sparsity = bench.pruner.planned_sparsity(before.checkpoint if before else "dense")
    return {
        "layers": layers,
        "sparsity": sparsity,
        "before_sparsity": before_sparsity,
        "lessons": state.lessons,
        "measured": draw_lesson(state.run, layers, trial, sparsity, before, before_sparsity, profile),
    }


def choose_reflection(evidence: Evidence, usage: Usage, session: Session, caps: RunConfig) -> tuple[Reflection, Usage]:
    """What the reflector's model makes of the trial, nothing where there is none, and the tokens spent so far.

    Raises AgentError without a fallback, and CapReached when the agents have spent what `caps` allows.
    """
    config, iteration = evidence.config, evidence.trial.iteration
    if config.reflector == HEURISTIC:
        return Reflection(), usage
    account = Account("reflector", session, usage, config, caps, iteration)
    try:
        model = open_model(config.reflector, config, session.progress)
        reflection = account.converse(
            lambda: reflect_with_chat(
                evidence, model, account.keep_call, account.keep_prompt, account.carry_out, account
            )
        )
    except CapReached:
        raise
    except AgentError as error:
        if config.planner_fallback == "none" and not (config.planner_unaided and isinstance(error, DeadEnd)):
            raise
        session.warn(f"{error}; the rule alone reflects on this round")
        return Reflection(), account.usage
    session.record("reflection", iteration=iteration, reflector=config.reflector, details=reflection.model_dump())
    return reflection, account.usage
