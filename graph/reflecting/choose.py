"""Who reflects on a round: the reflector's model, or the rule alone."""

from typing import TYPE_CHECKING, Any

from graph.config import HEURISTIC, RunConfig
from graph.llm.ladder import AgentError, DeadEnd
from graph.llm.models import open_model
from graph.llm.spending import Account, CapReached
from graph.planning.budget import open_budget
from graph.planning.recipes import find_recipe, gather_layers
from graph.reflecting.brief import reflect_with_chat
from graph.reflecting.rule import Evidence, draw_lesson
from graph.reflecting.schema import Reflection
from graph.runs.session import Session, open_bench
from graph.state import State, last_accepted
from tools.results.schema import Usage
from tools.results.trial import Trial

if TYPE_CHECKING:
    from tools.workbench.bench import Workbench


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
