"""validate: perplexity, paired KL and, where questions are asked, what the model still knows; and the verdict."""

from typing import TYPE_CHECKING, Any, Literal

from langgraph.runtime import Runtime

from graph.config import RunConfig
from graph.planning.orders import describe_plan
from graph.planning.rule import group_kl
from graph.runs.session import Session, enter, open_bench
from graph.state import State, Trial, last_accepted, same_sparsity
from tools.measure.losses import Evaluation, compare_kl
from tools.measure.recall import Retention, compare_recall
from tools.results.schema import SIGMAS

if TYPE_CHECKING:
    from tools.workbench.bench import Workbench

Verdict = Literal["accept", "rollback"]


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
        retention, asked = ask_questions(bench, state, session)
        verdict, reason = judge(state.config, zeros / weights, evaluation, best, accepted)
        verdict, reason = heed_facts(state.config.min_fact_retention, retention, verdict, reason)
        trial = Trial(
            iteration=state.iteration,
            checkpoint=state.current,
            sparsity=zeros / weights,
            perplexity=evaluation.perplexity,
            kl=evaluation.mean_kl,
            kl_error=evaluation.kl_error if evaluation.finite else None,
            change_error=compare_kl(evaluation, accepted)[1] if evaluation.finite else None,
            predicted_kl=group_kl(bench.read_profile(state.profile).layers, bench.planned_sparsity(state.current)),
            fact_retention=retention.share if retention else None,
            fact_error=retention.error if retention else None,
            tokens=state.config.validation_tokens + asked,
            verdict=verdict,
            reason=reason,
            plan=describe_plan(state.plan),
            recipe=state.plan.recipe,
            seconds=round(session.elapsed, 3),
        )
        session.emit("trial", **trial.model_dump())
    return {"trials": [trial], "evaluated_tokens": state.evaluated_tokens + trial.tokens, "seconds": session.seconds}


def ask_questions(bench: "Workbench", state: State, session: Session) -> tuple[Retention | None, int]:
    """What the present weights still know, beside the dense ones, and the tokens it took; (None, 0) without questions.

    The first is None, too, where an answer's probability was not finite.
    """
    if not state.config.questions:
        return None, 0
    recall = bench.ask(state.current, "validation", session.progress)
    dense = bench.ask("dense", "validation", session.progress)  # asked when the profile was made
    return compare_recall(recall, dense), recall.tokens


def heed_facts(least: float, retention: Retention | None, verdict: Verdict, reason: str) -> tuple[Verdict, str]:
    """The verdict, with the facts that a plan must not lose: less than the `least` share of them rolls it back."""
    if verdict == "rollback" or not least:
        return verdict, reason
    if retention is None:
        return "rollback", "the probability of an answer is not finite"
    figures = f"{retention.share:.3f} ± {retention.error:.3f} of the answers' probability per token is left"
    if retention.share < least:
        return "rollback", f"facts: {figures}, below {least:g}, although {reason}"
    return verdict, f"{reason}; facts: {figures}"


def accepted_trial(state: State) -> Trial:
    """The last trial that was kept; the dense model before the first."""
    assert state.dense is not None, "profile runs first"
    return last_accepted(state.trials) or state.dense


def judge(
    config: RunConfig, sparsity: float, trial: Evaluation, best: Trial, accepted: Evaluation
) -> tuple[Verdict, str]:
    """The verdict on a trial, and why.

    Towards the target: accept while perplexity is at most (1 + tau) times the last accepted one. At the same
    sparsity: accept only when the paired KL falls by SIGMAS standard errors. At the target, nothing sparser or less
    sparse replaces an accepted trial. A pattern is reached in one step, whatever the perplexity. Anything that is not
    finite is rolled back.
    """
    perplexity, before = trial.perplexity, best.perplexity
    if not trial.finite or perplexity is None or before is None:
        return "rollback", "the loss is not finite"
    if same_sparsity(sparsity, best.sparsity):
        change, error = compare_kl(trial, accepted)
        figures = f"KL {change:+.4f} ± {error:.4f} at the same sparsity"
        if change < -SIGMAS * error:
            return "accept", f"{figures}: better"
        return "rollback", f"{figures}: {'inside the noise' if abs(change) <= SIGMAS * error else 'worse'}"
    if same_sparsity(best.sparsity, config.target_sparsity):
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


def after_validate(state: State) -> Verdict:
    """The edge that does the rollback."""
    return "accept" if state.trials[-1].verdict == "accept" else "rollback"
