"""Whether a trial is kept, and whether the loop goes on."""

from graph.config import RunConfig
from graph.planning.bounds import Verdict
from graph.planning.rule import name_strongest, tried_strongest
from graph.state import State, last_accepted
from tools.plans.budget import same_sparsity
from tools.results.losses import Evaluation, compare_kl, find_likelihood_better
from tools.results.trial import Trial


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
