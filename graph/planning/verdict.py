"""Whether a trial is kept, and whether the loop goes on."""

from typing import Literal

from graph.config import RunConfig
from graph.planning.refinements import STRONG
from graph.planning.rule import tried_strongest
from graph.state import SIGMAS, State, Trial, last_accepted, same_sparsity
from tools.measure.losses import Evaluation, compare_kl
from tools.measure.recall import Retention

Verdict = Literal["accept", "rollback"]


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
    if not tried_strongest(state.trials, state.config):
        return f"{STRONG.method} has not been tried at the target"
    return "the last round was an improvement" if best is state.trials[-1] else ""


def _find_best_at_target(state: State) -> Trial | None:
    best = last_accepted(state.trials)
    return best if best and same_sparsity(best.sparsity, state.config.target_sparsity) else None
