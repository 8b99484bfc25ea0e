"""Which weights a run ends with: those at the target that came near, compared once more on text that chose none."""

from typing import TYPE_CHECKING

from graph.planning.bounds import heed_bounds
from graph.state import State, Trial, last_accepted
from tools.plans.budget import same_sparsity
from tools.results.losses import Evaluation, find_likelihood_better, join_windows
from tools.results.schema import Finalist

if TYPE_CHECKING:
    from tools.base.progress import Progress
    from tools.workbench.bench import Workbench

FINALISTS = 4
"""Trials that are compared at the end, at most."""

NEAR = 0.25
"""Probability of a lower KL than the accepted trial's, from which one that was rolled back is compared again."""


def list_finalists(state: State) -> list[Trial]:
    """The trials to compare at the end: the last accepted one, then others kept at the target, last first, then those
    that came nearest. None, unless further windows are asked for and there are two.
    """
    config, best = state.config, last_accepted(state.trials)
    if not config.further_windows or best is None or not same_sparsity(best.sparsity, config.target_sparsity):
        return []
    reached = [t for t in state.trials if t.measured and same_sparsity(t.sparsity, config.target_sparsity)]
    kept = [trial for trial in reversed(reached) if trial.verdict == "accept"]
    near = [t for t in reached if t.verdict == "rollback" and _is_near(t) and _keeps(t, state)]
    chosen = [*kept, *sorted(near, key=lambda trial: -(trial.better or 0.0))]
    distinct = {trial.checkpoint: trial for trial in reversed(chosen)}
    found = [trial for trial in chosen if distinct[trial.checkpoint] is trial][:FINALISTS]
    return found if len(found) > 1 else []


def _is_near(trial: Trial) -> bool:
    """Whether a trial that was rolled back could as well have been kept, by its KL."""
    return trial.better is not None and trial.better >= NEAR


def _keeps(trial: Trial, state: State) -> bool:
    """Whether a trial keeps what a person said must stay: answers, and texts within their bounds."""
    least, dense = state.config.min_fact_retention, state.dense.texts if state.dense else []
    remembers = not least or (trial.fact_retention is not None and trial.fact_retention >= least)
    return remembers and heed_bounds(state.config.text_bounds, trial.texts, dense, "accept", "")[0] == "accept"


def reserve_tokens(state: State) -> int:
    """Tokens that one more trial, and the comparison at the end after it, put through the model at most."""
    finalists = min(max(len(list_finalists(state)), 1) + 1, FINALISTS) if state.weighs else 0
    return state.trial_tokens + finalists * state.config.count_all("further") * state.config.window


def compare_finalists(bench: "Workbench", state: State, progress: "Progress") -> tuple[Trial | None, list[Finalist]]:
    """(the finalist of the lowest KL on windows that no verdict went by, all of them); (None, []) without any.

    Weights that are no longer on disk are made again, to the bit. Layers of no more than two finalists lie there.
    """
    best: Trial | None = None
    losses: dict[int, Evaluation] = {}
    for trial in (finalists := list_finalists(state)):
        parts = [bench.evaluate_further(trial.checkpoint, windows, progress) for windows in _list_windows(state)]
        losses[trial.iteration] = join_windows(*parts)
        if best is None or _rank(losses[trial.iteration]) < _rank(losses[best.iteration]):
            best = trial
        bench.forget_checkpoints(list(dict.fromkeys([best.checkpoint, state.accepted])))
    accepted = losses[finalists[0].iteration] if finalists else None
    return best, [_describe(trial, losses[trial.iteration], accepted) for trial in finalists]


def _list_windows(state: State) -> list[range]:
    """Windows that no verdict went by, as many at once as the validation text has."""
    step, first = state.config.validation_windows, state.config.further_windows
    return [range(at, min(at + step, 2 * first)) for at in range(first, 2 * first, step)]


def _rank(losses: Evaluation) -> float:
    return float("inf") if losses.mean_kl is None or not losses.finite else losses.mean_kl


def _describe(trial: Trial, losses: Evaluation, accepted: Evaluation | None) -> Finalist:
    pair = accepted if accepted is not losses and accepted and accepted.finite and losses.finite else None
    return Finalist(
        iteration=trial.iteration,
        plan=trial.plan,
        windows=len(losses.kl),
        kl=losses.mean_kl,
        better=find_likelihood_better(losses, pair) if pair else None,
    )
