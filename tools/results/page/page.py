"""`report.html`: one run, or several side by side, finished or not, on one page. No torch in here."""

from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml
from markupsafe import Markup

from tools.base.secrets import redact
from tools.base.words import show, show_percent, show_rounded, strip_controls
from tools.results.page.contents import (
    OVERVIEW,
    Bar,
    Continued,
    ScoreRow,
    describe_predictions,
    describe_run,
    find_cells,
    find_costs,
    find_limits,
    find_status,
    find_target,
    list_facts,
    list_measured,
    list_predictions,
    list_row,
    list_samples,
    list_scores,
    list_tiles,
    place_retention,
)
from tools.results.page.figures import Mark, draw_iterations, draw_map, draw_predictions
from tools.results.page.record import Record, Round, read_run
from tools.results.schema import Goal, Summary, TextResult
from tools.results.sentences import compare_weightings, list_loading

if TYPE_CHECKING:
    from jinja2 import Environment

WORDS = 4000
"""Characters of what a model said that are shown; the rest is in events.jsonl."""


def write_page(runs: Sequence[Path]) -> str:
    """The page of one run, or of several side by side, from what their directories hold so far.

    Raises UserError where there is no run, or a file of it cannot be read.
    """
    records = [read_run(run) for run in runs]
    several = len(records) > 1
    limits = find_limits(records)
    figures = [draw_figures(record, i, limits) for i, record in enumerate(records)]
    views = [make_view(record, drawn, several=several) for record, drawn in zip(records, figures, strict=True)]
    template = load_templates().get_template("report.html")
    return redact(template.render(runs=views, several=several, heads=OVERVIEW, longest=WORDS))


@cache
def load_templates() -> "Environment":
    """Templates in which everything is escaped, and no text has control characters."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    def clean(value: Any) -> Any:
        return strip_controls(value, lines=True) if isinstance(value, str) and not isinstance(value, Markup) else value

    templates = Environment(
        loader=PackageLoader("tools.results.page"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=clean,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {
        "perplexity": show,
        "percent": show_percent,
        "nats": partial(show, digits=4),
        "score": show_rounded,
        "yaml": _show_yaml,
    }
    return templates


def _show_yaml(value: Any) -> str:
    """Nested values, one a line."""
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=10_000).rstrip()


class Figures(NamedTuple):
    """What is drawn of a run; None where there is nothing to draw."""

    perplexity: Markup | None
    sparsity: Markup | None
    layers: Markup | None
    kappa: Markup | None
    predictions: Markup | None


def draw_figures(record: Record, number: int, limits: tuple[float, float]) -> Figures:
    """Everything that is drawn for a run; figures of different `number`s share no id.

    `limits` are those of the colours of the predicted KL of a layer.
    """
    marks = list_measured(record)
    cells, costs, points = find_cells(record), find_costs(record), list_predictions(record.trials)
    perplexity = sparsity = layers = kappa = predictions = None
    if marks:
        perplexity = draw_iterations(
            f"perplexity{number}",
            "Perplexity on the validation text over the iterations",
            [Mark(t.iteration, t.verdict, t.perplexity) for t in marks],
            record.dense.perplexity if record.dense else None,
            percent=False,
        )
        sparsity = draw_iterations(
            f"sparsity{number}",
            "Sparsity over the iterations",
            [Mark(t.iteration, t.verdict, t.sparsity) for t in marks],
            record.dense.sparsity if record.dense else None,
            find_target(record),
            percent=True,
        )
    if cells:
        layers = draw_map(f"layers{number}", "Sparsity of every layer", cells, (0, 1), log=False, percent=True)
    if any(cell.value > 0 for cell in costs):
        kappa = draw_map(f"kappa{number}", "Predicted KL of every layer", costs, limits, log=True, percent=False)
    if points:
        predictions = draw_predictions(f"predicted{number}", "Measured over predicted KL", points)
    return Figures(perplexity, sparsity, layers, kappa, predictions)


class View(NamedTuple):
    """What the template shows of a run."""

    name: str
    model: str
    record: Record
    summary: Summary | None
    status: str
    sentences: list[str]
    tiles: list[tuple[str, str, str]]
    """(title, figure, words below it)."""
    row: list[str]
    """Its cells in the table of several runs, whose heads are OVERVIEW."""
    figures: Figures
    undrawn: int
    """Trials without a KL above 0, predicted and measured, which logarithmic axes cannot show."""
    off: str
    """How far predictions were off, in words."""
    goal: Goal | None
    texts: list[TextResult]
    weightings: list[list[str]]
    """Rows of what texts lose by other weights: these, then a cell for each text; the kept ones first."""
    rounds: list[tuple[int, Round]]
    knows: bool
    """Whether knowledge or benchmarks were measured."""
    retention: Bar | None
    scores: list[ScoreRow]
    samples: list[Continued]
    facts: list[tuple[str, str]]
    loading: str


def make_view(record: Record, figures: Figures, *, several: bool) -> View:
    """Everything that is worked out for a run, beside its figures."""
    summary, points = record.summary, list_predictions(record.trials)
    return View(
        name=record.name,
        model=str(summary.model if summary else record.config.get("model", "unknown model")),
        record=record,
        summary=summary,
        status=find_status(record),
        sentences=describe_run(record),
        tiles=list_tiles(record),
        row=list_row(record),
        figures=figures,
        undrawn=len(list_measured(record)) - len(points),
        off=describe_predictions(points),
        goal=summary.goal if summary else None,
        texts=summary.texts if summary else [],
        weightings=compare_weightings(summary.weightings if summary else []),
        rounds=[(i, r) for i, r in sorted(record.rounds.items()) if r.plan or r.trial],
        knows=bool(summary and (summary.knowledge or summary.benchmarks)),
        retention=place_retention(summary.knowledge) if summary else None,
        scores=list_scores(summary),
        samples=list_samples(summary),
        facts=list_facts(record),
        loading="\n".join(list_loading(f"{record.name}/model" if several else "model")),
    )
