"""validate: perplexity, paired KL and, where questions are asked, what the model still knows; and the verdict."""

from typing import TYPE_CHECKING, Any

from langgraph.runtime import Runtime

from graph.config import RunConfig
from graph.planning.orders import find_kept, hash_request, resolve_again
from graph.planning.verdict import Verdict, accepted_trial, heed_bounds, heed_facts, judge, record_breakage
from graph.runs.session import Session, enter, open_bench
from graph.state import State
from tools.base.errors import BrokenPlan, ImpossiblePlan
from tools.instruments.probed import PastProbe
from tools.measure.recall import Retention, compare_recall, list_texts
from tools.plans.budget import same_sparsity
from tools.plans.work_order import WorkOrder
from tools.results.losses import Evaluation, compare_kl, find_likelihood_better
from tools.results.trial import Trial

if TYPE_CHECKING:
    from tools.workbench.bench import Workbench


EDITED = "the plan was edited behind the making of its weights"


def validate(state: State, runtime: Runtime[RunConfig]) -> dict[str, Any]:
    """Measure the weights in the model and judge them against the last accepted ones.

    Weights whose measurement breaks are rolled back, and so are those of another plan than the state's.
    """
    session = enter("validate", state, runtime)
    with open_bench(state, session) as bench:
        kept = find_kept(bench, state)
        try:
            order = kept or resolve_again(bench, state, session.progress)
        except ImpossiblePlan as error:  # it was edited in the state once the weights were there
            return record_breakage(state, None, f"{EDITED}, and cannot be carried out: {error}", session)
        if kept is None and not bench.pruner.is_made_of(state.current, state.profile, order):
            return record_breakage(state, order, f"{EDITED}, which are another plan's", session)
        try:
            trial, evaluation = measure_trial(bench, state, order, session)
        except BrokenPlan as error:
            return record_breakage(state, order, str(error), session)
        session.emit("trial", **trial.model_dump())
        probes = compare_probes(state, evaluation)
    tokens = state.evaluated_tokens + trial.tokens - state.probed.get(order.id, 0)  # measured and counted before
    return {
        "trials": [trial],
        "probes": probes,
        "evaluated_tokens": tokens,
        "seconds": session.seconds,
    }


def compare_probes(state: State, evaluation: Evaluation) -> list[PastProbe]:
    """What earlier rounds are told of by probes, the best of this one beside its trial."""
    if not state.probes:
        return []
    from tools.instruments.comparisons import compare_with_trial  # torch, imported by now

    return compare_with_trial(state.probes, state.iteration, evaluation)


def measure_trial(bench: "Workbench", state: State, order: WorkOrder, session: Session) -> tuple[Trial, Evaluation]:
    """(figures and verdict of the state's plan, whose order was carried out; its losses). Raises BrokenPlan."""
    assert state.plan is not None, "plan runs first"
    # before an evaluation that may have to put other weights in; of a cut what whole units come nearest to
    sparsity = order.sparsity if order.cut else (counted := bench.weights.count_zeros())[0] / counted[1]
    evaluation = bench.evaluator.evaluate(state.current, "validation", state.profile, session.progress)
    best = accepted_trial(state)
    accepted = (
        bench.evaluator.evaluate(state.accepted, "validation", state.profile, session.progress)
        if state.trials and best is not state.dense
        else bench.profiles.read(state.profile).dense
    )
    retention, asked = ask_questions(bench, state, session)
    noise = compare_kl(evaluation, accepted)[1] if evaluation.finite else None
    rivals = same_sparsity(sparsity, best.sparsity)
    verdict, reason = judge(state.config, sparsity, evaluation, best, accepted)
    texts, dense = list_texts(evaluation, accepted), state.dense.texts if state.dense else []
    verdict, reason = heed_bounds(state.config.text_bounds, texts, dense, verdict, reason)
    verdict, reason = heed_facts(state.config.min_fact_retention, retention, verdict, reason)
    trial = Trial(
        iteration=state.iteration,
        checkpoint=state.current,
        sparsity=sparsity,
        perplexity=evaluation.perplexity,
        kl=evaluation.mean_kl,
        kl_error=evaluation.kl_error if evaluation.finite else None,
        change_error=noise,
        better=find_likelihood_better(evaluation, accepted) if rivals and evaluation.finite else None,
        texts=texts,
        predicted_kl=order.predicted_kl,
        fact_retention=retention.share if retention else None,
        fact_error=retention.error if retention else None,
        tokens=state.config.validation_tokens + asked,
        verdict=verdict,
        reason=reason,
        plan=order.line,
        hypothesis=state.plan.hypothesis,
        order=order.id,
        asked=hash_request(state.plan),
        recipe=None if order.cut else state.plan.recipe,
        groups=state.plan.groups,
        adjustments=state.plan.adjustments,
        cut=state.plan.cut,
        seconds=round(session.elapsed, 3),
    )
    return trial, evaluation


def ask_questions(bench: "Workbench", state: State, session: Session) -> tuple[Retention | None, int]:
    """What the present weights still know, beside the dense ones, and the tokens it took; (None, 0) without questions.

    The first is None, too, where an answer's probability was not finite.
    """
    if not state.config.questions:
        return None, 0
    recall = bench.evaluator.ask(state.current, "validation", session.progress)
    dense = bench.evaluator.ask("dense", "validation", session.progress)  # asked when the profile was made
    return compare_recall(recall, dense), recall.tokens


def after_validate(state: State) -> Verdict:
    """The edge that does the rollback."""
    return "accept" if state.trials[-1].verdict == "accept" else "rollback"
