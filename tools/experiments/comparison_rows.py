"""The rows of a comparison: it is decided what goes, the model pruned so, and measured on the validation text."""

import time
from typing import TYPE_CHECKING, Any, NamedTuple

from tools.base.errors import ImpossiblePlan, UserError
from tools.experiments.structured_rows import take_parts
from tools.plans.allocate import allocate
from tools.plans.costs import count_polish, count_walk
from tools.plans.evolve import EffortName
from tools.plans.jobs import Job, PartsRecipe
from tools.plans.recipe import Recipe
from tools.plans.work_order import order_allocation
from tools.results.comparison import Comparison, Row
from tools.results.schema import describe_protocol
from tools.workbench.search import Decision, search_allocation
from tools.workbench.store import DENSE

if TYPE_CHECKING:
    from tools.base.progress import Progress
    from tools.measure.recall import Recall, Retention
    from tools.results.losses import Evaluation
    from tools.workbench.bench import Workbench


class Limits(NamedTuple):
    """What holds for every row."""

    max_layer_sparsity: float
    evolution: EffortName
    evolution_tokens: int


class MadeRow(NamedTuple):
    """A row, as yet without its tasks."""

    row: Row
    model: Any
    """That it is about."""
    checkpoint: str = ""
    """Of that model; empty for one that parts are gone of."""


def make_row(
    job: Job, bench: "Workbench", known: Comparison, limits: Limits, progress: "Progress", under: MadeRow | None = None
) -> MadeRow:
    """A row of the table. Raises ImpossiblePlan where bounds, pattern or model do not allow it.

    `under` is the row that this one polishes, where it was made just before: it is not pruned again, and its seconds
    are part of this one's.
    """
    if isinstance(job.recipe, PartsRecipe):
        return _make_structured_row(job, job.recipe, bench, known, progress)
    decide = _search if job.kind == "search" else _allocate
    decision = decide(job.recipe, job.sparsity, bench, known.profile, limits, progress)
    # what other rows or tries made, so that every row's time is its own
    bench.pruner.forget([under.checkpoint] if under else [])
    began = time.monotonic()
    order = order_allocation(job.recipe, decision.allocation, job.recipe.polish_tokens)
    checkpoint = bench.pruner.prune(known.profile, order, progress)
    seconds = time.monotonic() - began + (under.row.seconds if under else 0)
    polished = bench.pruner.read_polished(checkpoint)
    zeros, weights = bench.weights.count_zeros()
    row = _fill_row(
        job,
        bench,
        known,
        bench.evaluator.evaluate(checkpoint, "validation", known.profile, progress),
        _weigh_facts(bench.evaluator.ask(checkpoint, "validation", progress), bench, progress)
        if bench.questions
        else None,
        achieved_sparsity=zeros / weights,
        seconds=round(seconds, 1),
        allocation_seconds=round(decision.seconds, 1),
        evaluated_tokens=decision.tokens + (count_polish(bench.settings, order.polish) if order.polish else 0),
        polished=polished,
        **_tell_search(decision),
    )
    return MadeRow(row, bench.model, checkpoint)


def _tell_search(decision: Decision) -> dict[str, int]:
    searched = decision.searched
    if searched is None:
        return {}
    return {
        "generations": searched.generations,
        "planned_generations": searched.planned,
        "children": searched.children,
    }


def _allocate(
    recipe: Recipe, sparsity: float, bench: "Workbench", profile: str, limits: Limits, progress: "Progress"
) -> Decision:
    began = time.monotonic()
    layers = bench.curves.describe_layers(profile, recipe, progress)
    allocation = allocate(layers, sparsity, recipe, max_layer_sparsity=limits.max_layer_sparsity)
    walks = 1 + recipe.needs_curves if recipe.reads_curves else 0
    return Decision(allocation, walks * count_walk(bench.settings), time.monotonic() - began)


def _search(
    recipe: Recipe, sparsity: float, bench: "Workbench", profile: str, limits: Limits, progress: "Progress"
) -> Decision:
    return search_allocation(
        bench,
        profile,
        recipe,
        sparsity,
        progress,
        effort=limits.evolution,
        tokens=limits.evolution_tokens,
        max_layer_sparsity=limits.max_layer_sparsity,
    )


def _make_structured_row(
    job: Job, recipe: PartsRecipe, bench: "Workbench", known: Comparison, progress: "Progress"
) -> MadeRow:
    """The row of a cut model. Raises ImpossiblePlan where the architecture, or whole parts, cannot be cut so."""
    from tools.measure.continuations import measure_speeds
    from tools.measure.recall import measure_recall  # imports torch

    if bench.windows.texts:
        raise ImpossiblePlan("structured rows read the calibration text alike; leave named texts out")
    bench.pruner.restore(DENSE)
    try:
        made = take_parts(recipe, job.sparsity, bench, progress)
    except UserError as error:
        raise ImpossiblePlan(str(error)) from error
    model, facts = made.model, None
    evaluation = bench.evaluator.evaluate_other(model, known.profile, progress)
    if bench.questions:
        recall = measure_recall(model, bench.questions["validation"], "questions", progress)
        facts = _weigh_facts(recall, bench, progress)
    cut = gain = None
    if made.stock:
        (_, whole), (_, cut) = measure_speeds(
            [bench.model, model], bench.windows.validation[0].to(bench.device), progress
        )
        gain = cut / whole
    own, dense_bytes = (sum(parameter.nbytes for parameter in each.parameters()) for each in (model, bench.model))
    gone = sum(layer.weight_OI.nbytes for layer in bench.weights.layers) * made.removed  # of which the copy holds all
    row = _fill_row(
        job,
        bench,
        known,
        evaluation,
        facts,
        model_bytes=own if made.stock else dense_bytes - round(gone),
        dense_bytes=dense_bytes,
        decoded_per_second=cut,
        decoding_gain=gain,
        achieved_sparsity=made.removed,
        seconds=round(made.seconds, 1),
        allocation_seconds=0.0,
        evaluated_tokens=made.tokens,
    )
    return MadeRow(row, model)


def _fill_row(
    job: Job,
    bench: "Workbench",
    known: Comparison,
    evaluation: "Evaluation",
    facts: "Retention | None",
    **figures: Any,
) -> Row:
    from tools.measure.recall import list_texts  # imports torch

    return Row(
        recipe=job.label,
        method=job.method,
        allocation=job.allocation,
        sparsity=job.sparsity,
        pattern=job.pattern,
        statistics=job.recipe.statistics if isinstance(job.recipe, Recipe) else None,
        perplexity=evaluation.perplexity,
        dense_perplexity=known.dense_perplexity,
        kl=evaluation.mean_kl,
        kl_error=evaluation.kl_error,
        texts=list_texts(evaluation),
        losses=evaluation,
        fact_retention=facts.share if facts else None,
        fact_error=facts.error if facts else None,
        peak_memory_bytes=bench.peak_memory_bytes(),
        protocol=describe_protocol(bench.settings, "validation", bos=bench.windows.lead > 0),
        **figures,
    )


def _weigh_facts(recall: "Recall", bench: "Workbench", progress: "Progress") -> "Retention | None":
    """What is left of the dense model's facts, on the questions of the trials; None where either is not finite.

    The dense model was asked first.
    """
    from tools.measure.recall import compare_recall  # imports torch

    return compare_recall(recall, bench.evaluator.ask("dense", "validation", progress))
