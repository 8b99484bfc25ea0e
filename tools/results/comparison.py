"""Recipes compared, as `tools.compare` keeps and shows them: compare.json, .csv, .md and a plot. No torch in here."""

import operator
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from pydantic import BaseModel, Field
from rich.console import Console
from rich.table import Table

from tools.base.files import write_text, write_whole
from tools.base.rows import as_csv, write_kept
from tools.base.words import escape, show, show_score, show_share, show_size
from tools.plans.evolve import describe_search
from tools.plans.jobs import STRUCTURED, Job, name_target
from tools.plans.methods import Statistics
from tools.results.losses import Evaluation, compare_kl, compare_perplexity
from tools.results.paper import Measured, describe_tasks
from tools.results.schema import ANSWERS_KEPT, Polished, Protocol, Reach, Score, TextFigures, describe_bos, describe_cut
from tools.results.sentences import describe_polish, describe_reach, name_text, tell_share, tell_texts
from tools.results.sparsity_curve import list_curves, plot_curves, plot_sparsity
from tools.results.tables import list_table

REFERENCE = "sparsegpt:uniform"
"""Degradations are shown as multiples of this recipe's: SparseGPT as its authors run it, each block behind its pruned
predecessors."""

Answers = dict[str, list[float]]
ANSWERS = "By task and metric, what each question came to, where a score is their mean: so that differences are paired."


class Row(BaseModel):
    """One recipe at one sparsity, measured on the validation text."""

    recipe: str
    method: str = Field(description="What is done inside a layer, such as two-sided+refit.")
    allocation: str = Field(description="How sparsity is shared out; uniform wherever a pattern says it all.")
    sparsity: float = Field(description="The target, as a fraction.")
    pattern: str = Field(description="N:M, or empty for zeros anywhere.")
    statistics: Statistics | None = Field(
        description="What the layers' inputs were taken from: the dense model, or block by block from behind pruned "
        "predecessors; null for structured rows."
    )
    achieved_sparsity: float = Field(
        description="Share of the prunable weights that are zero; structured: that are gone, as nearly as parts allow."
    )
    perplexity: float | None = Field(description="Null where the loss was not finite.")
    dense_perplexity: float
    kl: float | None = Field(description="KL(dense || pruned), nats per token; null where it was not finite.")
    kl_error: float | None = Field(description="Standard error of kl over the windows.")
    texts: list[TextFigures] = Field(
        [], exclude_if=operator.not_, description="Each of the named texts, of which the figures are means by weight."
    )
    losses: Evaluation | None = Field(
        None,
        exclude_if=operator.not_,
        description="Of each window, so that rows are paired.",
    )
    fact_retention: float | None = Field(
        None,
        description=f"{ANSWERS_KEPT} beside the dense model; null without --questions, or where one was not finite.",
    )
    fact_error: float | None = Field(None, description="Its standard error over the questions.")
    scores: list[Score] = Field([], description="Tasks of lm-evaluation-harness, with --tasks.")
    answers: Answers = Field({}, exclude_if=operator.not_, description=ANSWERS)
    seconds: float = Field(
        description="Pruning the model, once it is known how much of each layer goes; structured: choosing included."
    )
    allocation_seconds: float = Field(
        description="Deciding that. A search's whole time, over interruptions; but about 0 where the curves or spectra "
        "it takes were measured before, for another row."
    )
    peak_memory_bytes: int = Field(
        description="The most that the process had used by then: of the GPU where the model is on one."
    )
    evaluated_tokens: int = Field(
        description="Calibration tokens run through the model to share sparsity out, whether or not other rows read "
        "the same. evolution: through pruned models. kappa: the profile's gradients, forward twice and backward, which "
        "counts as two; and as many again for curves of the method's own. polish: what it is trained on, forward twice "
        "and backward; what is held out, at each measure; all of that by the dense model. structured: through models "
        "cut on trial."
    )
    model_bytes: int | None = Field(
        None, description="structured: of all weights, each once, in the number format of the run."
    )
    dense_bytes: int | None = Field(None, description="structured: the dense model's.")
    decoded_per_second: float | None = Field(
        None, description="structured, of stock shapes: tokens a second, as decoding_gain says."
    )
    decoding_gain: float | None = Field(
        None,
        description="structured, of stock shapes: tokens a second of greedy decoding, one sequence, in stock "
        "transformers on this machine, as a multiple of the dense model's; median of timings by turns.",
    )
    generations: int | None = Field(None, description="evolution: generations of the search that were done.")
    planned_generations: int | None = Field(
        None, description="evolution: generations of EvoPress's setting; fewer are done where --evolution-tokens end."
    )
    children: int | None = Field(None, description="evolution: children in each generation.")
    polished: Polished | None = Field(
        None, description="What the polish did, where there was one; its seconds are among those of pruning."
    )
    protocol: Protocol

    @property
    def search(self) -> str:
        """How long the search was, for people; empty where there was none."""
        if self.generations is None or self.planned_generations is None or self.children is None:
            return ""
        return describe_search(self.generations, self.planned_generations, self.children, self.evaluated_tokens)


class Unasked(BaseModel):
    """A row that waits for its tasks, so that pruning is not lost where these are broken off."""

    row: Row
    checkpoint: str = Field(description="Of the pruned model, in the work of the comparison.")


class Comparison(BaseModel):
    """`compare.json`."""

    settings: dict[str, Any] = Field(description="Model and texts; rows of other settings are never mixed in.")
    profile: str = Field(description="Hash of the profile that all rows share.")
    profile_seconds: float
    dense_perplexity: float
    bos: bool = Field(False, description="As in the protocols of the rows.")
    reach: Reach
    dense_scores: list[Score] = Field(
        [], description="Tasks of lm-evaluation-harness, with --tasks; none where they were broken off."
    )
    dense_answers: Answers = Field({}, exclude_if=operator.not_, description=ANSWERS)
    rows: list[Row] = []
    unasked: Unasked | None = Field(None, exclude_if=operator.not_, description="The row that comes next, if begun.")


def write_comparison(directory: Path, known: Comparison) -> None:
    """compare.json, .md, .csv, .png and .svg in a directory, and polish.png and .svg where one is polished on several
    numbers of tokens."""
    write_kept(directory / "compare.json", known)
    write_text(directory / "compare.md", describe(known))
    write_text(
        directory / "compare.csv",
        as_csv(Row, known.rows, ["protocol", "texts", "losses", "answers"], _list_text_columns),
    )
    curves = list_curves(known.rows)
    measured = [row for row in known.rows if row.perplexity is not None]
    ranked = rank_recipes(measured)
    for kind in ("png", "svg"):
        write_whole(
            directory / f"compare.{kind}", partial(plot_sparsity, measured, ranked, known.dense_perplexity, kind)
        )
        if curves:
            write_whole(directory / f"polish.{kind}", partial(plot_curves, curves, kind))


def describe_dense(known: Comparison) -> str:
    """The line about the dense model."""
    return f"dense: perplexity {show(known.dense_perplexity)}"


def describe_row(job: Job, row: Row, reach: Reach) -> str:
    """The line about a row that is done."""
    went = "removed" if job.kind == "parts" else "zeros"
    texts = tell_texts([text.model_dump() for text in row.texts])
    return (
        f"{job.title}: {row.achieved_sparsity:.2%} {went}{tell_share(row.achieved_sparsity, reach)}, "
        f"perplexity {show(row.perplexity)}, KL {show(row.kl, 4)}{f' ({texts})' if texts else ''}, "
        f"allocated in {row.allocation_seconds:.1f} s"
        f"{f' by {row.search}' if row.search else ''}, pruned in {row.seconds:.1f} s"
        f"{f', {describe_polish(row.polished)}' if row.polished else ''}"
    )


def show_tables(known: Comparison, console: Console) -> None:
    """The tables of `compare.md` in the terminal."""
    for name, rows in group_rows(known.rows):
        table = Table(title=f"{name}; dense perplexity {show(known.dense_perplexity)}")
        for i, title in enumerate(_list_titles(known)):
            table.add_column(title, justify="right" if i else "left")
        for row in rows:
            table.add_row(*_list_cells(row, rows[0], known))
        console.print(table)


def group_rows(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """(sparsity or pattern, its rows, best first) in the order of their sparsity."""
    groups: dict[tuple[float, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.sparsity, row.pattern), []).append(row)
    return [
        (name_target(*target), sorted(groups[target], key=lambda row: row.perplexity or float("inf")))
        for target in sorted(groups)
    ]


def rank_recipes(rows: Sequence[Row]) -> list[str]:
    """The recipes, best first: by their mean place among the rows of the same sparsity."""
    places: dict[str, list[int]] = {}
    for _, members in group_rows(rows):
        for place, row in enumerate(members):
            places.setdefault(row.recipe, []).append(place)
    return sorted(places, key=lambda recipe: fmean(places[recipe]))


def relative_degradation(row: Row, rows: Sequence[Row]) -> float | None:
    """(perplexity - dense) as a multiple of uniform SparseGPT's at the same sparsity; None without it."""
    same = (r for r in rows if (r.sparsity, r.pattern, r.recipe) == (row.sparsity, row.pattern, REFERENCE))
    reference = next(same, None)
    if reference is None or reference.perplexity is None or row.perplexity is None:
        return None
    rise = reference.perplexity - row.dense_perplexity
    return (row.perplexity - row.dense_perplexity) / rise if rise > 0 else None


def _list_titles(known: Comparison) -> list[str]:
    facts = ["answer probability kept"] if known.settings["questions"] else []
    search = ["search"] if any(row.search for row in known.rows) else []
    polish = ["polish"] if any(row.polished for row in known.rows) else []
    texts = [f"KL {name}" for name in known.settings.get("text", {})]
    smaller = ["bytes"] if any(row.model_bytes for row in known.rows) else []
    faster = ["tokens/s"] if any(row.decoding_gain for row in known.rows) else []
    behind = ["behind the first"] if _has_pairs(known.rows) else []
    losses = ["perplexity", "× SparseGPT", "KL", *texts, *behind]
    costs = ["prune s", "allocate s", "tokens"]
    return ["recipe", "sparsity", "of the model", *losses, *facts, *smaller, *faster, *costs, *search, *polish]


def _has_pairs(rows: Sequence[Row]) -> bool:
    """Whether there are rows of one sparsity whose losses are known of each window."""
    return any(sum(row.losses is not None for row in members) > 1 for _, members in group_rows(rows))


def _list_cells(row: Row, first: Row, known: Comparison) -> list[str]:
    """`first` is the best row of the same sparsity."""
    relative = relative_degradation(row, known.rows)
    return [
        row.recipe,
        f"{row.achieved_sparsity:.2%}",
        f"{row.achieved_sparsity * known.reach.of_model:.2%}",
        show(row.perplexity),
        "" if relative is None else f"{relative:.2f}",
        show_score(None if row.kl_error is None else row.kl, row.kl_error),
        *(show_score(text.kl, text.kl_error) for text in row.texts),
        *([_show_behind(row, first)] if _has_pairs(known.rows) else []),
        *([show_share(row.fact_retention, row.fact_error)] if known.settings["questions"] else []),
        *([_show_bytes(row)] if any(other.model_bytes for other in known.rows) else []),
        *([_show_speed(row)] if any(other.decoding_gain for other in known.rows) else []),
        f"{row.seconds:.1f}",
        f"{row.allocation_seconds:.1f}",
        f"{row.evaluated_tokens:,}",
        *([row.search] if any(other.search for other in known.rows) else []),
        *([_show_polish(row.polished)] if any(other.polished for other in known.rows) else []),
    ]


def _show_behind(row: Row, first: Row) -> str:
    """How far a row is behind the first, of losses paired window by window; empty of the first itself."""
    if row is first or not (row.losses and first.losses and row.perplexity and first.perplexity and row.losses.finite):
        return ""
    rise = row.perplexity / first.perplexity
    (_, error), (kl, kl_error) = (compare(row.losses, first.losses) for compare in (compare_perplexity, compare_kl))
    return f"{rise - 1:+.1%} ± {rise * error:.1%}, KL {kl:+.4f} ± {kl_error:.4f}"


def _show_bytes(row: Row) -> str:
    if row.model_bytes is None or row.dense_bytes is None:
        return ""
    return f"{show_size(row.model_bytes, 'MB')} ({row.model_bytes / row.dense_bytes:.1%})"


def _show_speed(row: Row) -> str:
    if row.decoding_gain is None:
        return ""
    return f"{f'{row.decoded_per_second:.1f} ' if row.decoded_per_second else ''}(× {row.decoding_gain:.2f})"


def _show_polish(polished: Polished | None) -> str:
    if polished is None:
        return ""
    rounded = "" if polished.means == "fp32" else f", means of the optimiser in {polished.means}"
    return f"{polished.tokens:,} tokens, {polished.seconds:.1f} s{rounded}"


_EXPLAIN_PAIRS = (
    "Behind the first: by how much perplexity, as a share of the first row's, and KL are above those of the first row, "
    "window by window, ± the standard error of that difference. "
)

_EXPLAIN_POLISH = (
    "Polish: the tokens of calibration text that all survivors were trained on together at the end, and the seconds "
    "of that, which are among those of pruning."
)

_EXPLAIN_STRUCTURED = (
    " Structured: the sparsity is the share of the prunable weights removed; bytes are of the whole model, in brackets "
    "as a share of the dense one's; tokens/s are of greedy decoding, one sequence, in brackets as a multiple of the "
    "dense model's by turns, where a stock shape has such widths."
)

_EXPLAIN_SEARCH = (
    "Search: generations done, of those of EvoPress's setting (arXiv 2410.14649); where they are fewer, "
    "`--evolution-tokens` cut it short, and it is no run of EvoPress's authors."
)

_EXPLAIN_FACTS = ANSWERS_KEPT + ", on {question_pairs} questions of `{questions}`."


def describe(known: Comparison) -> str:
    """`compare.md`."""
    settings = known.settings
    structured = any(row.method.startswith(STRUCTURED) for row in known.rows)
    lines = [
        f"# {escape(settings['model'])}: recipes compared",
        "",
        f"Perplexity on {settings['validation_windows'] * settings['window']:,} tokens of "
        f"{name_text(settings, 'validation')} in windows of {settings['window']}"
        f"{describe_cut(settings.get('text_cut', 0), settings.get('text_spread', 1))}{describe_bos(known.bos)}, "
        f"{settings['dtype']}; dense: {show(known.dense_perplexity)}. Statistics from "
        f"{settings['calibration_windows']} windows of "
        f"{name_text(settings, 'calibration')}, gradients from "
        f"{min(settings['gradient_windows'], settings['calibration_windows'])} of them "
        f"({known.profile_seconds:.1f} s with the dense model's perplexity, shared by all rows).",
        *(["", told] if (told := describe_reach(known.reach)) else []),
        "",
        "Best first. Statistics without a mark are those that a method's authors take. "
        f"× SparseGPT: how far perplexity rises above the dense model's, as a multiple of `{REFERENCE}` at "
        "the same sparsity. KL: of the pruned model from the dense one, nats per token, ± its standard error over the "
        "windows. "
        + (_EXPLAIN_PAIRS if _has_pairs(known.rows) else "")
        + "Tokens: those run through the model to share sparsity out, a backward pass counted as two forwards; "
        "the seconds of curves that several rows share stand in the first of them."
        + (f" {_EXPLAIN_POLISH}" if any(row.polished for row in known.rows) else "")
        + (f" {_EXPLAIN_SEARCH}" if any(row.search for row in known.rows) else "")
        + (f" {_EXPLAIN_FACTS.format(**settings)}" if settings["questions"] else "")
        + (_EXPLAIN_STRUCTURED if structured else "")
        + " Of the model: the share of all its weights, embeddings included, that is zero or gone.",
        "",
        "![Perplexity over sparsity](compare.svg)",
        "",
        *(["![KL over tokens of a polish](polish.svg)", ""] if list_curves(known.rows) else []),
    ]
    for name, rows in group_rows(known.rows):
        cells = [(f"`{recipe}`", *figures) for recipe, *figures in (_list_cells(row, rows[0], known) for row in rows)]
        lines += [f"## {name}", "", *list_table(_list_titles(known), cells, left=1), ""]
    dense = Measured("dense", "", "", 0.0, known.dense_perplexity, known.dense_scores, known.dense_answers)
    lines += describe_tasks(dense, [_as_measured(row) for _, rows in group_rows(known.rows) for row in rows])
    return "\n".join(lines)


def _list_text_columns(row: Row) -> dict[str, float | None]:
    """A row's figures on each of the named texts, by column."""
    columns: dict[str, float | None] = {}
    for text in row.texts:
        figures = {"perplexity": text.perplexity, "kl": text.kl, "kl_error": text.kl_error}
        columns |= {f"{figure} {text.name}": value for figure, value in figures.items()}
    return columns


def _as_measured(row: Row) -> Measured:
    name = f"`{row.recipe}`" + (f" {row.pattern}" if row.pattern else "")
    return Measured(name, row.recipe, row.pattern, row.achieved_sparsity, row.perplexity, row.scores, row.answers)
