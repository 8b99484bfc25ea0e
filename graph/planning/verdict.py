"""Whether a trial is kept, and whether the loop goes on."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from graph.config import RunConfig
from graph.planning.budget import find_lateness
from graph.planning.orders import describe_plan, hash_request
from graph.planning.rule import name_strongest, tried_strongest
from graph.runs.session import Session
from graph.state import State, last_accepted
from tools.measure.recall import Retention
from tools.plans.budget import same_sparsity
from tools.plans.work_order import WorkOrder
from tools.results.losses import Evaluation, compare_kl, find_likelihood_better
from tools.results.schema import TextFigures
from tools.results.trial import Trial

Verdict = Literal["accept", "rollback"]


def heed_facts(least: float, retention: Retention | None, verdict: Verdict, reason: str) -> tuple[Verdict, str]:
    """The verdict, with the answer probability that a plan must keep: less than the `least` share rolls it back."""
    if verdict == "rollback" or not least:
        return verdict, reason
    if retention is None:
        return "rollback", "the probability of an answer is not finite"
    figures = f"answer probability kept {retention.share:.3f} ± {retention.error:.3f}"
    if retention.share < least:
        return "rollback", f"{figures}, below {least:g}, although {reason}"
    return verdict, f"{reason}; {figures}"


def heed_bounds(
    bounds: Mapping[str, float],
    trial: Sequence[TextFigures],
    dense: Sequence[TextFigures],
    verdict: Verdict,
    reason: str,
) -> tuple[Verdict, str]:
    """The verdict, with how far each bounded text's perplexity may rise above the dense model's, as a fraction."""
    before = {text.name: text.perplexity for text in dense}
    for text in trial if verdict == "accept" else ():
        least = before.get(text.name)
        if text.name not in bounds or not least:
            continue
        if text.perplexity is None:
            return "rollback", f"the loss on {text.name} is not finite"
        rise = text.perplexity / least - 1
        if rise > bounds[text.name]:
            told = f"perplexity on {text.name} {text.perplexity:.2f}, {rise:+.1%} above {least:.2f}"
            return "rollback", f"{told}, where {bounds[text.name]:.3g} is the bound, although {reason}"
    return verdict, reason


def accepted_trial(state: State) -> Trial:
    """The last trial that was kept; the dense model before the first."""
    assert state.dense is not None, "profile runs first"
    return last_accepted(state.trials) or state.dense


def judge(
    config: RunConfig, sparsity: float, trial: Evaluation, best: Trial, accepted: Evaluation
) -> tuple[Verdict, str]:
    """The verdict on a trial, and why.

    Towards the target: accept while perplexity is at most (1 + tau) times the last accepted one. At the same
    sparsity: accept when the KL is lower with the probability asked for, by a paired t-test; a swap of two equals costs
    nothing. At the target, nothing sparser or less sparse replaces an accepted trial. A pattern is reached in one step,
    whatever the perplexity. Anything that is not finite is rolled back.
    """
    perplexity, before = trial.perplexity, best.perplexity
    reached = same_sparsity(best.sparsity, config.target_sparsity)
    if not trial.finite or perplexity is None or before is None:
        return "rollback", "the loss is not finite"
    if same_sparsity(sparsity, best.sparsity):
        return _judge_likely(config.accept_probability, trial, accepted)
    if reached:
        return (
            "rollback",
            f"sparsity {sparsity:.2%} is off the target of {config.target_sparsity:.2%}, once reached",
        )
    if config.pattern:
        return "accept", f"{config.pattern} has no smaller step; from here only what lowers the KL is kept"
    limit = config.limit_perplexity(before)
    if perplexity <= limit:
        return "accept", f"perplexity {perplexity:.2f} is within {limit:.2f} = (1 + {config.tau:g}) x {before:.2f}"
    return "rollback", f"perplexity {perplexity:.2f} is above {limit:.2f} = (1 + {config.tau:g}) x {before:.2f}"


def _judge_likely(least: float, trial: Evaluation, accepted: Evaluation) -> tuple[Verdict, str]:
    (change, error), better = compare_kl(trial, accepted), find_likelihood_better(trial, accepted)
    figures = f"KL {change:+.4f} ± {error:.4f} on {len(trial.kl)} windows, better with probability {better:.3f}"
    if better >= least:
        return "accept", f"{figures}, at least {least:g}"
    return "rollback", f"{figures}, below {least:g}"


def decide_stop(state: State) -> str:
    """Why the loop ends here; empty while it goes on."""
    if state.iteration >= state.config.max_iterations:
        return f"{state.iteration} iterations were asked for and done"
    limit = state.config.max_evaluated_tokens
    if limit and state.evaluated_tokens + state.trial_tokens > limit:
        return f"{state.evaluated_tokens:,} of at most {limit:,} tokens were evaluated, and another trial takes more"
    best = _find_best_at_target(state)
    idle = state.iteration - best.iteration if best else 0
    if idle >= state.config.patience:
        return f"at the target, {idle} rounds in a row brought no improvement"
    return ""


def find_early(state: State) -> str:
    """Why it is too early for a reflector to end the loop; empty where it is not."""
    best = _find_best_at_target(state)
    if best is None:
        return "the target is not reached yet"
    if state.config.planner_fallback == "none":
        return ""
    if not state.parts and not tried_strongest(state.trials, state.config):
        return f"{name_strongest(state.trials, state.config)} has not been tried at the target"
    return "the last round was an improvement" if best is state.trials[-1] else ""


def _find_best_at_target(state: State) -> Trial | None:
    best = last_accepted(state.trials)
    return best if best and same_sparsity(best.sparsity, state.config.target_sparsity) else None


Update = dict[str, Any]


def record_refusal(state: State, order: WorkOrder | None, reason: str, session: Session) -> Update:
    """A person refused the state's plan: the trial is logged, and the loop may end with it.

    `order` is None where the plan could not be carried out anyhow.
    """
    session.emit("approval", iteration=state.iteration, decision="refuse", reason=reason)
    trial = _make_trial(state, order, "refuse", reason, 0.0)
    session.emit("trial", **trial.model_dump())
    stop = decide_stop(state.model_copy(update={"trials": [*state.trials, trial]}))
    stop = stop or find_lateness(state, session.seconds)
    if stop:
        session.emit("note", text=stop)
    return {"trials": [trial], "stop": stop, "seconds": session.seconds}


def record_breakage(state: State, order: WorkOrder | None, reason: str, session: Session) -> Update:
    """The state's plan broke for this reason, before there was an `order` if that is None: the trial is logged."""
    trial = _make_trial(state, order, "rollback", reason, session.elapsed)
    session.emit("trial", **trial.model_dump())
    return {"trials": [trial], "seconds": session.seconds}


def is_unmeasured(state: State) -> bool:
    """Whether the present round has its trial already, before anything was measured."""
    return bool(state.trials) and state.trials[-1].iteration == state.iteration


def leave_unmeasured(state: State) -> Literal["rollback", "plan", "finish"] | None:
    """Where the present round goes without figures: what broke is rolled back; after a refusal the loop plans again, or
    ends. None where it has yet to be measured.
    """
    if not is_unmeasured(state):
        return None
    if state.trials[-1].broken:
        return "rollback"
    return "finish" if state.stop else "plan"


def _make_trial(
    state: State, order: WorkOrder | None, verdict: Literal["rollback", "refuse"], reason: str, seconds: float
) -> Trial:
    """Such a plan among the trials, so that planners and people see it and nobody proposes it again."""
    plan = state.plan
    assert plan is not None, "plan runs first"
    return Trial(
        iteration=state.iteration,
        checkpoint=state.accepted,
        sparsity=plan.sparsity if order is None else order.sparsity,
        perplexity=None,
        kl=None,
        predicted_kl=0.0 if order is None else order.predicted_kl,
        verdict=verdict,
        broken=verdict == "rollback",
        reason=" ".join(reason.split()),
        plan=describe_plan(plan),
        hypothesis=plan.hypothesis,
        order="" if order is None else order.id,
        asked=hash_request(plan),
        recipe=None if plan.cut else plan.recipe,
        groups=plan.groups,
        adjustments=plan.adjustments,
        cut=plan.cut,
        seconds=round(seconds, 3),
    )
