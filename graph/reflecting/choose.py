"""Who reflects on a round: the reflector's model, or the rule alone."""

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


def gather_evidence(state: State, session: Session) -> Evidence:
    """What the last trial was, and what the rule makes of it, which is nothing where parts go."""
    assert state.plan is not None and state.dense is not None, "plan and profile run first"
    trial, before = state.trials[-1], last_accepted(state.trials[:-1])
    recipe = find_recipe(state.plan, state.config)
    with open_bench(state, session) as bench:
        if state.parts:
            return Evidence(
                config=state.config,
                run=state.run,
                layers=(),
                recipe=recipe,
                plan=state.plan,
                trial=trial,
                sparsity={},
                dense=state.dense,
                before=before,
                before_sparsity={},
                trials=state.trials[:-1],
                lessons=(),
                notes=state.notes,
                measured=None,
                parts=bench.cuts.read(state.parts),
                rounds=open_budget(state).count_rounds(state.iteration),
            )
        layers = gather_layers(
            state.plan, state.config, lambda recipe: bench.describe_layers(state.profile, recipe, session.progress)
        )
        profile = bench.read_profile(state.profile).layers
        sparsity = bench.planned_sparsity(trial.checkpoint)
        before_sparsity = bench.planned_sparsity(before.checkpoint if before else "dense")
    return Evidence(
        config=state.config,
        run=state.run,
        layers=layers,
        recipe=recipe,
        plan=state.plan,
        trial=trial,
        sparsity=sparsity,
        dense=state.dense,
        before=before,
        before_sparsity=before_sparsity,
        trials=state.trials[:-1],
        lessons=state.lessons,
        notes=state.notes,
        measured=draw_lesson(state.run, layers, trial, sparsity, before, before_sparsity, profile),
        rounds=open_budget(state).count_rounds(state.iteration),
    )


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
