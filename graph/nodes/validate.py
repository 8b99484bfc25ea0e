"""validate: perplexity and paired KL on the validation text, and the verdict."""

from typing import Any, Literal

from langgraph.runtime import Runtime

from graph.agents.heuristic import group_kl
from graph.config import RunConfig
from graph.plans import describe_plan
from graph.session import enter, open_bench
from graph.state import SAME_SPARSITY, State, Trial, last_accepted
from tools.losses import Evaluation, compare_kl
from tools.summary import SIGMAS


def validate(state: State, runtime: Runtime[RunConfig]) -> dict[str, Any]:
    """Measure the weights in the model and judge them against the last accepted ones."""
    assert state.plan is not None, "plan runs first"
    session = enter("validate", state, runtime)
    with open_bench(state, session) as bench:
        zeros, weights = bench.count_zeros()  # before an evaluation that may have to put other weights in
        evaluation = bench.evaluate(state.current, "validation", state.profile, session.progress)
        best = accepted_trial(state)
        accepted = (
            bench.evaluate(state.accepted, "validation", state.profile, session.progress)
            if state.trials and best is not state.dense
            else bench.read_profile(state.profile).dense
        )
        verdict, reason = judge(state.config, zeros / weights, evaluation, best, accepted)
        trial = Trial(
            iteration=state.iteration,
            checkpoint=state.current,
            sparsity=zeros / weights,
            perplexity=evaluation.perplexity,
            kl=evaluation.mean_kl,
            kl_error=evaluation.kl_error if evaluation.finite else None,
            change_error=compare_kl(evaluation, accepted)[1] if evaluation.finite else None,
            predicted_kl=group_kl(bench.read_profile(state.profile).layers, bench.planned_sparsity(state.current)),
            verdict=verdict,
            reason=reason,
            plan=describe_plan(state.plan),
            recipe=state.plan.recipe,
            seconds=round(session.elapsed, 3),
        )
        session.emit("trial", **trial.model_dump())
    tokens = state.evaluated_tokens + state.config.validation_tokens
    return {"trials": [trial], "evaluated_tokens": tokens, "seconds": session.seconds}


def accepted_trial(state: State) -> Trial:
    """The last trial that was kept; the dense model before the first."""
    assert state.dense is not None, "profile runs first"
    return last_accepted(state.trials) or state.dense


def judge(
    config: RunConfig, sparsity: float, trial: Evaluation, best: Trial, accepted: Evaluation
) -> tuple[Literal["accept", "rollback"], str]:
    """The verdict on a trial, and why.

    Towards the target: accept while perplexity is at most (1 + tau) times the last accepted one. At the same
    sparsity: accept only when the paired KL falls by SIGMAS standard errors. At the target, nothing sparser or less
    sparse replaces an accepted trial. A pattern is reached in one step, whatever the perplexity. Anything that is not
    finite is rolled back.
    """
    perplexity, before = trial.perplexity, best.perplexity
    if not trial.finite or perplexity is None or before is None:
        return "rollback", "the loss is not finite"
    if abs(sparsity - best.sparsity) <= SAME_SPARSITY:
        change, error = compare_kl(trial, accepted)
        figures = f"KL {change:+.4f} ± {error:.4f} at the same sparsity"
        if change < -SIGMAS * error:
            return "accept", f"{figures}: better"
        return "rollback", f"{figures}: {'inside the noise' if abs(change) <= SIGMAS * error else 'worse'}"
    if abs(best.sparsity - config.target_sparsity) <= SAME_SPARSITY:
        return (
            "rollback",
            f"sparsity {sparsity:.2%} is off the target of {config.target_sparsity:.2%}, once reached",
        )
    if config.pattern:
        return "accept", f"{config.pattern} has no smaller step; from here only what lowers the KL is kept"
    limit = (1 + config.tau) * before
    if perplexity <= limit:
        return "accept", f"perplexity {perplexity:.2f} is within {limit:.2f} = (1 + {config.tau:g}) x {before:.2f}"
    return "rollback", f"perplexity {perplexity:.2f} is above {limit:.2f} = (1 + {config.tau:g}) x {before:.2f}"


def after_validate(state: State) -> Literal["accept", "rollback"]:
    """The edge that does the rollback."""
    return "accept" if state.trials[-1].verdict == "accept" else "rollback"
