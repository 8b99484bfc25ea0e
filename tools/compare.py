"""Which recipe is best on this model? `python -m tools.compare --recipes wanda:uniform,refit:kappa --sparsity 0.45,2:4`

Prunes the model by every recipe (METHOD:ALLOCATION) to every sparsity, measures each on the validation text, and writes
compare.csv, compare.md, compare.json and a plot of perplexity over sparsity. Rows that are done are kept on Ctrl-C;
the same command goes on.

Rows are made one after another. With `--workers` the work of each is shared: layers to prune are dealt out, text is
shared out in windows and questions in batches, and the candidates of an evolutionary search are each measured whole by
one worker. Structured rows and tasks are this process' alone. The figures are the same.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from pydantic import BaseModel, Field, field_validator
from rich.console import Console
from rich.table import Table

from tools.base.console import carry_out, print_line, show_bars
from tools.base.errors import ImpossiblePlan, UserError
from tools.base.files import write_json, write_text, write_whole
from tools.base.options import Parser, add_flags, parse_flags, read_options
from tools.base.rows import as_csv, lock_out, read_kept, refuse_other_settings, save_figure
from tools.base.secrets import read_secrets
from tools.base.settings import TEAM, TaskSettings, TeamSettings
from tools.base.words import escape, show
from tools.measure.benchmarks import Benchmark, load_benchmarks
from tools.measure.harness import run_benchmark
from tools.models.load import check_device, locate_model
from tools.plans.allocate import Allocation, allocate
from tools.plans.evolve import Search, SearchSettings, Stage, evolve
from tools.plans.layer_profile import LayerProfile, predict_kl
from tools.plans.recipe import Recipe, parse_pattern, parse_recipe
from tools.plans.work_order import order_allocation
from tools.results.paper import PRESETS, Measured, describe_tasks
from tools.results.schema import Protocol, Score, describe_protocol
from tools.texts.windows import check_texts

if TYPE_CHECKING:
    from tools.base.progress import Progress
    from tools.measure.losses import Evaluation
    from tools.measure.recall import Recall, Retention
    from tools.workbench.bench import Workbench

METHODS = ("magnitude", "wanda", "sparsegpt", "two-sided", "two-sided-obs", "two-sided+refit", "refit")
ALLOCATIONS = ("uniform", "owl", "alphapruning", "evolution", "kappa")
"""What `all` means: every method with every allocation."""

STRUCTURED = {"flap": ("neurons", "heads"), "depth": ("blocks",)}
"""What goes as a whole with the method structured, by the name that stands for its allocation."""

REFERENCE = "sparsegpt:uniform"
"""Degradations are shown as multiples of this recipe's."""

SEARCH_CHILDREN = 8
SEARCH_STAGES = (Stage(2, 1), Stage(1, 4))
"""The evolutionary search's generations: small ones, so that a budget of a laptop's size holds several."""

LABELLED = 10
"""Recipes that the plot's legend names, the best ones; it explains the colours and marks of the others."""


class CompareSettings(TaskSettings, TeamSettings):
    """The model, its texts, and what is compared."""

    recipes: str = Field(
        "wanda:uniform,sparsegpt:uniform,sparsegpt:owl,two-sided-obs:kappa,refit:kappa",
        description="Comma-separated METHOD[+refit][~clipped][~quarter|~half]:ALLOCATION[@STRENGTH], or all. Methods: "
        f"{', '.join(METHODS)}. Allocations: {', '.join(ALLOCATIONS)}, and kappa-mask. Beside all: "
        "structured[+refit]:flap, the same number of neurons (by FLAP's fluctuation) and groups of heads from every "
        "block, and structured[+refit]:depth, whole blocks; a sparsity is then the share of the prunable weights "
        "that is removed, and patterns have no such row.",
    )
    sparsity: str = Field("0.45", description="Comma-separated fractions and patterns, such as 0.45,0.6,2:4.")
    out: str = Field("compare", min_length=1, description="Directory of the tables, the plot and the work.")
    max_layer_sparsity: float = Field(0.95, gt=0, le=1, description="No layer is pruned further than this.")
    evolution_tokens: int = Field(
        65536, ge=1, description="Calibration tokens that the evolutionary search may evaluate for one row."
    )

    @field_validator("recipes", "sparsity", mode="before")
    @classmethod
    def _join_list(cls, value: Any) -> str:
        """YAML has lists and numbers."""
        return ",".join(str(part) for part in (value if isinstance(value, list) else [value]))


class Row(BaseModel):
    """One recipe at one sparsity, measured on the validation text."""

    recipe: str
    method: str = Field(description="What is done inside a layer, such as two-sided+refit.")
    allocation: str = Field(description="How sparsity is shared out; uniform wherever a pattern says it all.")
    sparsity: float = Field(description="The target, as a fraction.")
    pattern: str = Field(description="N:M, or empty for zeros anywhere.")
    achieved_sparsity: float = Field(
        description="Share of the prunable weights that are zero; structured: that are gone, as nearly as parts allow."
    )
    perplexity: float | None = Field(description="Null where the loss was not finite.")
    dense_perplexity: float
    kl: float | None = Field(description="KL(dense || pruned), nats per token; null where it was not finite.")
    kl_error: float | None = Field(description="Standard error of kl over the windows.")
    fact_retention: float | None = Field(
        None,
        description="Share of the right answers' probability per token that is left of the dense model's; null without "
        "--questions, or where one was not finite.",
    )
    fact_error: float | None = Field(None, description="Its standard error over the questions.")
    scores: list[Score] = Field([], description="Tasks of lm-evaluation-harness, with --tasks.")
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
        "counts as two; and as many again for curves of the method's own. structured: through models cut on trial."
    )
    protocol: Protocol


class Comparison(BaseModel):
    """`compare.json`."""

    settings: dict[str, Any] = Field(description="Model and texts; rows of other settings are never mixed in.")
    profile: str = Field(description="Hash of the profile that all rows share.")
    profile_seconds: float
    dense_perplexity: float
    dense_scores: list[Score] = Field([], description="Tasks of lm-evaluation-harness, with --tasks.")
    rows: list[Row] = []


class Job(NamedTuple):
    """One row to be made."""

    label: str
    recipe: Recipe
    """Its allocation is uniform where the label's is evolution. Of a structured job no more than `refit` counts."""
    sparsity: float

    @property
    def key(self) -> tuple[str, float, str]:
        """What tells rows apart."""
        return self.label, self.sparsity, self.recipe.pattern

    @property
    def structured(self) -> bool:
        """Whether whole parts of the model go."""
        return self.allocation in STRUCTURED

    @property
    def title(self) -> str:
        """For people, such as `refit:kappa at 45%`."""
        return f"{self.label} at {_name_target(self.sparsity, self.recipe.pattern)}"

    @property
    def allocation(self) -> str:
        """The label's part behind the colon."""
        return self.label.partition(":")[2]


class SavedSearch(BaseModel):
    """Where the evolutionary search of a row stands, and what it is about: another one never goes on from it."""

    profile: str
    settings: SearchSettings
    search: Search
    seconds: float


class Decision(NamedTuple):
    """How much of each layer goes, and what it took to find out."""

    allocation: Allocation
    tokens: int
    seconds: float


# --- what is asked for ---------------------------------------------------------------------------------------------


def list_jobs(recipes: str, sparsities: str) -> list[Job]:
    """The rows asked for, in order. Raises UserError in one line for a recipe or a sparsity that there is not.

    With a pattern every layer gets the same, so that allocations make no difference: each method is one row.
    """
    every = [f"{method}:{allocation}" for allocation in ALLOCATIONS for method in METHODS]
    labels = [label for part in _split(recipes) for label in (every if part == "all" else [part])]
    if not labels:
        raise UserError("no recipe is given; try --recipes wanda:uniform,refit:kappa")
    targets = [_parse_sparsity(part) for part in _split(sparsities)]
    if not targets:
        raise UserError("no sparsity is given; try --sparsity 0.45")
    jobs: dict[tuple[str, float, str], Job] = {}
    for sparsity, pattern in targets:
        for label in labels:
            job = _make_job(label, sparsity, pattern)
            if not (job.structured and pattern):
                jobs.setdefault(job.key, job)
    if not jobs:
        raise UserError("patterns are not for structured recipes; try --sparsity 0.2")
    return list(jobs.values())


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _parse_sparsity(text: str) -> tuple[float, str]:
    """(fraction, pattern or "")."""
    try:
        if ":" in text:
            pruned, group = parse_pattern(text)
            return pruned / group, f"{pruned}:{group}"
        sparsity = float(text)
    except ValueError as error:
        raise UserError(f"sparsity {text!r} is neither a fraction such as 0.45 nor a pattern such as 2:4") from error
    if not 0 < sparsity < 1:
        raise UserError(f"sparsity {text!r} must lie between 0 and 1, such as 0.45")
    return sparsity, ""


def _make_job(label: str, sparsity: float, pattern: str) -> Job:
    method, _, allocation = label.partition(":")
    if method.partition("+")[0] == "structured":
        return _make_structured_job(label, sparsity)
    evolves = allocation == "evolution"
    try:
        recipe = parse_recipe(f"{method}:uniform" if evolves else label)
    except ValueError as error:
        raise UserError(str(error)) from error
    if pattern:
        recipe = recipe.model_copy(update={"pattern": pattern, "allocation": "uniform", "strength": 1.0})
        return Job(recipe.label, recipe, sparsity)
    return Job(f"{recipe.mask_label}:evolution" if evolves else recipe.label, recipe, sparsity)


def _make_structured_job(label: str, sparsity: float) -> Job:
    method, _, allocation = label.partition(":")
    if method not in ("structured", "structured+refit") or allocation not in STRUCTURED:
        known = ", ".join(f"structured[+refit]:{name}" for name in STRUCTURED)
        raise UserError(f"recipe {label!r} is none of {known}")
    return Job(label, Recipe(method="magnitude", refit=method.endswith("+refit")), sparsity)


def _name_target(sparsity: float, pattern: str) -> str:
    return pattern or f"{100 * sparsity:g}%"


# --- the rows ------------------------------------------------------------------------------------------------------


def compare(settings: CompareSettings, console: Console) -> Comparison:
    """Make the rows that are not there yet and print a line for each; everything is on disk after each.

    A row that cannot be, by its bounds or its pattern, is left out with a warning. Raises UserError for those when all
    others are made, and for bad input; DamagedArtifact when the profile that rows share is not whole.
    """
    jobs = list_jobs(settings.recipes, settings.sparsity)
    _check_input(settings)
    benchmarks = load_benchmarks(settings, settings.dtype)
    directory = Path(settings.out)
    lock_out(directory, directory / "work")
    known = _read_comparison(directory, settings)
    done = {_key(row): row for row in known.rows} if known else {}
    if known:
        print_line(console, _describe_dense(known))
    for job in jobs:
        if job.key in done:
            print_line(console, _describe_row(job, done[job.key]))
    impossible: list[str] = []
    todo = [job for job in jobs if job.key not in done]
    if todo or known is None:
        known, impossible = _make_rows(todo, len(jobs), known, settings, benchmarks, console)
    else:
        _write(directory, known)  # a kill may have left some of the files a row behind
    if console.is_terminal:
        show_tables(known, console)
    print_line(console, f"see {directory / 'compare.md'}")
    if impossible:
        more = f" (and {len(impossible) - 1} more, warned of above)" if len(impossible) > 1 else ""
        raise UserError(f"{impossible[0]}{more}")
    return known


def _make_rows(
    jobs: list[Job],
    total: int,
    known: Comparison | None,
    settings: CompareSettings,
    benchmarks: list[Benchmark],
    console: Console,
) -> tuple[Comparison, list[str]]:
    """(`known` with a row for each job that can be, why the others cannot)."""
    from tools.workbench.bench import use_workbench  # imports torch

    directory = Path(settings.out)
    impossible: list[str] = []

    def warn(text: str) -> None:
        print_line(console, f"warning: {text}")

    with (
        show_bars(console, total) as (begin, progress),
        use_workbench(settings, directory / "work", warn, progress) as bench,
    ):
        if known is None:
            begin("dense model", 0)
            masks_only = not any(job.recipe.changes_survivors for job in jobs if not job.structured)
            known = _profile(bench, settings, progress, masks_only)
            known.dense_scores = _ask_tasks(benchmarks, bench.model, bench, "dense", progress)
            _write(directory, known)
            print_line(console, _describe_dense(known))
        if bench.questions:
            bench.ask("dense", "validation", progress)
        for i, job in enumerate(jobs):
            begin(job.title, total - len(jobs) + i)
            make = _make_structured_row if job.structured else _make_row
            try:
                row, model = make(job, bench, known, settings, progress)
                row.scores = _ask_tasks(benchmarks, model, bench, job.title, progress)
            except ImpossiblePlan as error:
                impossible.append(f"{job.title}: {error}")
                warn(impossible[-1])
                continue
            known.rows.append(row)
            _write(directory, known)
            print_line(console, _describe_row(job, row))
    return known, impossible


def _check_input(settings: CompareSettings) -> None:
    """Refuse what can be refused before anything is loaded. Raises UserError."""
    locate_model(settings.model)
    check_device(settings.device)
    check_texts(settings)


def _profile(bench: "Workbench", settings: CompareSettings, progress: "Progress", masks_only: bool) -> Comparison:
    """The dense model's losses, statistics and curves, which all rows share."""
    began = time.monotonic()
    profile = bench.profile(progress, masks_only=masks_only)
    dense = bench.read_profile(profile).dense.perplexity
    assert dense is not None, "the workbench refuses a dense model that is not finite"
    return Comparison(
        settings=_fingerprint(settings),
        profile=profile,
        profile_seconds=round(time.monotonic() - began, 1),
        dense_perplexity=dense,
    )


def _make_row(
    job: Job, bench: "Workbench", known: Comparison, settings: CompareSettings, progress: "Progress"
) -> tuple[Row, Any]:
    """(the row, the model it is about). Raises ImpossiblePlan."""
    decide = search_allocation if job.allocation == "evolution" else _allocate
    allocation, tokens, allocation_seconds = decide(job, bench, known.profile, settings, progress)
    bench.forget_checkpoints([])  # what earlier rows or tries made, so that every row's time is its own
    began = time.monotonic()
    checkpoint = bench.prune(known.profile, order_allocation(job.recipe, allocation), progress)
    seconds = time.monotonic() - began
    zeros, weights = bench.count_zeros()
    evaluation = bench.evaluate(checkpoint, "validation", known.profile, progress)
    row = _fill_row(
        job,
        bench,
        known,
        settings,
        evaluation,
        _weigh_facts(bench.ask(checkpoint, "validation", progress), bench, progress) if bench.questions else None,
        achieved_sparsity=zeros / weights,
        seconds=round(seconds, 1),
        allocation_seconds=round(allocation_seconds, 1),
        evaluated_tokens=tokens,
    )
    return row, bench.model


def _fill_row(
    job: Job,
    bench: "Workbench",
    known: Comparison,
    settings: CompareSettings,
    evaluation: "Evaluation",
    facts: "Retention | None",
    **figures: Any,
) -> Row:
    return Row(
        recipe=job.label,
        method=job.label.partition(":")[0],
        allocation=job.allocation,
        sparsity=job.sparsity,
        pattern=job.recipe.pattern,
        perplexity=evaluation.perplexity,
        dense_perplexity=known.dense_perplexity,
        kl=evaluation.mean_kl,
        kl_error=evaluation.kl_error,
        fact_retention=facts.share if facts else None,
        fact_error=facts.error if facts else None,
        peak_memory_bytes=bench.peak_memory_bytes(),
        protocol=describe_protocol(settings, "validation"),
        **figures,
    )


def _make_structured_row(
    job: Job, bench: "Workbench", known: Comparison, settings: CompareSettings, progress: "Progress"
) -> tuple[Row, Any]:
    """(the row, the cut model). Raises ImpossiblePlan where the architecture, or whole parts, cannot be cut so."""
    from tools.measure.recall import measure_recall
    from tools.surgery.choose import choose_cut  # imports torch
    from tools.surgery.parts import count_weights, without_fits
    from tools.surgery.rebuild import build_cut, check_cut
    from tools.workbench.bench import DENSE

    bench.restore(DENSE)
    calibration = bench.windows.calibration.to(bench.device)
    began = time.monotonic()
    try:
        kinds = STRUCTURED[job.allocation]
        choice = choose_cut(bench.model, kinds, job.sparsity, calibration, progress, refit=job.recipe.refit)
        model = build_cut(bench.model, choice.cut)
        seconds = time.monotonic() - began
        check_cut(bench.model, choice.cut, build_cut(bench.model, without_fits(choice.cut)), calibration[0])
    except UserError as error:
        raise ImpossiblePlan(str(error)) from error
    evaluation, facts = bench.evaluate_other(model, known.profile, progress), None
    if bench.questions:
        recall = measure_recall(model, bench.questions["validation"], "questions", progress)
        facts = _weigh_facts(recall, bench, progress)
    row = _fill_row(
        job,
        bench,
        known,
        settings,
        evaluation,
        facts,
        achieved_sparsity=1 - count_weights(model) / count_weights(bench.model),
        seconds=round(seconds, 1),
        allocation_seconds=0.0,
        evaluated_tokens=choice.tokens,
    )
    return row, model


def _weigh_facts(recall: "Recall", bench: "Workbench", progress: "Progress") -> "Retention | None":
    """What is left of the dense model's facts, on the questions of the trials; None where either is not finite.

    The dense model was asked first.
    """
    from tools.measure.recall import compare_recall  # imports torch

    return compare_recall(recall, bench.ask("dense", "validation", progress))


def _ask_tasks(
    benchmarks: list[Benchmark], model: Any, bench: "Workbench", label: str, progress: "Progress"
) -> list[Score]:
    found = [run_benchmark(benchmark, model, bench.tokenizer, label, progress) for benchmark in benchmarks]
    return [result.score for results in found for result in results]


def _allocate(job: Job, bench: "Workbench", profile: str, settings: CompareSettings, progress: "Progress") -> Decision:
    began = time.monotonic()
    layers = bench.describe_layers(profile, job.recipe, progress)
    allocation = allocate(layers, job.sparsity, job.recipe, max_layer_sparsity=settings.max_layer_sparsity)
    walks = 1 + job.recipe.needs_curves if job.recipe.allocation == "kappa" else 0
    tokens = 4 * walks * _count_gradient_windows(settings) * settings.window
    return Decision(allocation, tokens, time.monotonic() - began)


def _count_gradient_windows(settings: CompareSettings) -> int:
    return min(settings.gradient_windows, settings.calibration_windows)


def search_allocation(
    job: Job, bench: "Workbench", profile: str, settings: CompareSettings, progress: "Progress"
) -> Decision:
    """The evolutionary search, saved after each generation."""
    began = time.monotonic()
    layers = bench.describe_layers(profile, job.recipe, progress)
    rules = SearchSettings(
        children=SEARCH_CHILDREN,
        stages=list(SEARCH_STAGES),
        window=settings.window,
        windows=_count_gradient_windows(settings),
        tokens=settings.evolution_tokens,
        seed=settings.seed,
        max_layer_sparsity=settings.max_layer_sparsity,
    )
    path = bench.directory / f"search-{job.recipe.mask_label}-{job.sparsity}.json"
    saved = _read_search(path, profile, rules, bench)
    earlier, tokens = (saved.seconds, saved.search.tokens) if saved else (0.0, 0)

    def measure(candidates: list[dict[str, int]], windows: list[int]) -> list[float]:
        nonlocal tokens
        progress(f"evolution for {job.recipe.mask_label}, tokens", tokens, settings.evolution_tokens)
        allocations = [_as_allocation(zeros, layers) for zeros in candidates]
        checkpoints = [
            bench.prune(profile, order_allocation(job.recipe, allocation), lambda *_: None)
            for allocation in allocations
        ]
        tokens += len(candidates) * len(windows) * settings.window
        return bench.measure_kl_each(checkpoints, windows)

    def keep(search: Search) -> None:
        seconds = earlier + time.monotonic() - began
        write_json(path, SavedSearch(profile=profile, settings=rules, search=search, seconds=seconds).model_dump())

    found = evolve(layers, job.sparsity, rules, measure, keep, saved.search if saved else None)
    return Decision(_as_allocation(found.zeros, layers), found.tokens, earlier + time.monotonic() - began)


def _read_search(path: Path, profile: str, rules: SearchSettings, bench: "Workbench") -> SavedSearch | None:
    """The search to go on with; None where there is none of the same profile and settings."""
    if not path.is_file():
        return None
    try:
        saved = SavedSearch.model_validate_json(path.read_bytes())
    except ValueError:
        bench.warn(f"{path} is damaged; the search begins anew")
        return None
    return saved if (saved.profile, saved.settings) == (profile, rules) else None


def _as_allocation(zeros: dict[str, int], layers: Sequence[LayerProfile]) -> Allocation:
    shares = np.array([zeros[layer.name] / layer.weights for layer in layers])
    total = sum(layer.weights for layer in layers)
    return Allocation(zeros=zeros, sparsity=sum(zeros.values()) / total, predicted_kl=predict_kl(layers, shares))


def _key(row: Row) -> tuple[str, float, str]:
    return row.recipe, row.sparsity, row.pattern


def _fingerprint(settings: CompareSettings) -> dict[str, Any]:
    """What rows must agree in to stand in one table."""
    return settings.model_dump(exclude={"recipes", "sparsity", "out", *TEAM})


def _read_comparison(directory: Path, settings: CompareSettings) -> Comparison | None:
    """What is in `--out`; None where nothing is. Raises UserError for a comparison with other settings."""
    known = read_kept(directory / "compare.json", Comparison)
    if known is None:
        return None
    wanted = _fingerprint(settings)
    searched = any(row.allocation == "evolution" for row in known.rows)
    refuse_other_settings(
        directory, "a comparison", known.settings, wanted, set() if searched else {"evolution_tokens"}
    )
    return known.model_copy(update={"settings": wanted})


# --- what is shown -------------------------------------------------------------------------------------------------


def _describe_dense(known: Comparison) -> str:
    return f"dense: perplexity {show(known.dense_perplexity)}"


def _describe_row(job: Job, row: Row) -> str:
    kl = "not finite" if row.kl is None else f"{row.kl:.4f}"
    went = "removed" if job.structured else "zeros"
    return (
        f"{job.title}: {row.achieved_sparsity:.2%} {went}, perplexity {show(row.perplexity)}, KL {kl}, "
        f"allocated in {row.allocation_seconds:.1f} s, pruned in {row.seconds:.1f} s"
    )


def show_tables(known: Comparison, console: Console) -> None:
    """The tables of `compare.md` in the terminal."""
    for name, rows in group_rows(known.rows):
        table = Table(title=f"{name}; dense perplexity {show(known.dense_perplexity)}")
        for i, title in enumerate(_list_titles(known)):
            table.add_column(title, justify="right" if i else "left")
        for row in rows:
            table.add_row(*_list_cells(row, known))
        console.print(table)


def show_needs(settings: CompareSettings, console: Console) -> None:
    """`--dry-run`: the memory, disk and time that the rows would need. Raises UserError."""
    from tools.estimate.needs import ASKED_FOR, estimate, print_estimate  # imports torch

    jobs = list_jobs(settings.recipes, settings.sparsity)
    check_texts(settings)
    rows = [job for job in jobs if not job.structured]
    found = estimate(settings, target=max(job.sparsity for job in jobs), rounds=len(rows))
    for work in found.work:
        if work.name == ASKED_FOR:
            work.times = len({job.recipe.mask_label for job in rows if job.recipe.needs_curves})
    print_estimate(found, console)
    if searches := sum(job.allocation == "evolution" for job in jobs):
        print_line(
            console,
            f"not counted: {searches} evolutionary searches, each of up to {settings.evolution_tokens:,} tokens "
            "through models pruned for it",
        )
    if len(rows) < len(jobs):
        print_line(console, "not counted: structured rows")
    if settings.tasks:
        print_line(console, f"not counted: {', '.join(settings.tasks)}, asked of the dense model and of every row")


# --- what is written -----------------------------------------------------------------------------------------------


def _write(directory: Path, known: Comparison) -> None:
    write_json(directory / "compare.json", known.model_dump())
    write_text(directory / "compare.md", describe(known))
    write_text(directory / "compare.csv", as_csv(Row, known.rows, exclude=["protocol"]))
    for kind in ("png", "svg"):
        write_whole(directory / f"compare.{kind}", partial(_plot, known, kind))


def group_rows(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """(sparsity or pattern, its rows, best first) in the order of their sparsity."""
    groups: dict[tuple[float, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.sparsity, row.pattern), []).append(row)
    return [
        (_name_target(*target), sorted(groups[target], key=lambda row: row.perplexity or float("inf")))
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
    facts = ["facts"] if known.settings["questions"] else []
    return ["recipe", "sparsity", "perplexity", "× SparseGPT", "KL", *facts, "prune s", "allocate s", "tokens"]


def _list_cells(row: Row, known: Comparison) -> list[str]:
    relative = relative_degradation(row, known.rows)
    facts = "not finite"
    if row.fact_retention is not None and row.fact_error is not None:
        facts = f"{row.fact_retention:.1%} ± {row.fact_error:.1%}"
    return [
        row.recipe,
        f"{row.achieved_sparsity:.2%}",
        show(row.perplexity),
        "" if relative is None else f"{relative:.2f}",
        "not finite" if row.kl is None or row.kl_error is None else f"{row.kl:.4f} ± {row.kl_error:.4f}",
        *([facts] if known.settings["questions"] else []),
        f"{row.seconds:.1f}",
        f"{row.allocation_seconds:.1f}",
        f"{row.evaluated_tokens:,}",
    ]


_EXPLAIN_FACTS = (
    "Facts: the share of the right answers' probability per token that is left of the dense model's, on "
    "{question_pairs} questions of `{questions}`."
)


def describe(known: Comparison) -> str:
    """`compare.md`."""
    settings = known.settings
    structured = any(row.allocation in STRUCTURED for row in known.rows)
    lines = [
        f"# {escape(settings['model'])}: recipes compared",
        "",
        f"Perplexity on {settings['validation_windows'] * settings['window']:,} tokens of `{settings['validation']}` "
        f"in windows of {settings['window']}, {settings['dtype']}; dense: {show(known.dense_perplexity)}. Statistics "
        f"from {settings['calibration_windows']} windows of `{settings['calibration']}`, gradients from "
        f"{min(settings['gradient_windows'], settings['calibration_windows'])} of them "
        f"({known.profile_seconds:.1f} s with the dense model's perplexity, shared by all rows).",
        "",
        f"Best first. × SparseGPT: how far perplexity rises above the dense model's, as a multiple of `{REFERENCE}` at "
        "the same sparsity. KL: of the pruned model from the dense one, nats per token, ± its standard error over the "
        "windows. Tokens: those run through the model to share sparsity out, a backward pass counted as two forwards; "
        "the seconds of curves that several rows share stand in the first of them."
        + (f" {_EXPLAIN_FACTS.format(**settings)}" if settings["questions"] else "")
        + (" Structured: the sparsity is the share of the prunable weights removed." if structured else ""),
        "",
        "![Perplexity over sparsity](compare.svg)",
        "",
    ]
    for name, rows in group_rows(known.rows):
        titles = _list_titles(known)
        lines += [f"## {name}", "", f"| {' | '.join(titles)} |", "|---|" + "---:|" * (len(titles) - 1)]
        for row in rows:
            recipe, *figures = _list_cells(row, known)
            lines.append(f"| {' | '.join([f'`{recipe}`', *figures])} |")
        lines.append("")
    dense = Measured("dense", "", "", 0.0, known.dense_perplexity, known.dense_scores)
    lines += describe_tasks(dense, [_as_measured(row) for _, rows in group_rows(known.rows) for row in rows])
    return "\n".join(lines)


def _as_measured(row: Row) -> Measured:
    name = f"`{row.recipe}`" + (f" {row.pattern}" if row.pattern else "")
    return Measured(name, row.recipe, row.pattern, row.achieved_sparsity, row.perplexity, row.scores)


_MARKS = "osD^v*PX<>ph"


def _plot(known: Comparison, kind: str, path: Path) -> None:
    """Perplexity over sparsity, a line for each recipe: coloured by allocation, marked by method, hollow for N:M."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import LogFormatter

    rows = [row for row in known.rows if row.perplexity is not None]
    recipes = rank_recipes(rows)
    allocations = list(dict.fromkeys([*ALLOCATIONS, *(row.allocation for row in rows)]))
    methods = list(dict.fromkeys([*METHODS, *(row.method for row in rows)]))
    colors = {name: f"C{i % 10}" for i, name in enumerate(allocations)}
    marks = {name: _MARKS[i % len(_MARKS)] for i, name in enumerate(methods)}

    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.add_subplot()
    legend = [axes.axhline(known.dense_perplexity, color="0.5", linestyle=":", label="dense")]
    for i, recipe in enumerate(recipes):
        own = [row for row in rows if row.recipe == recipe]
        named = i < LABELLED
        look: dict[str, Any] = {"color": colors[own[0].allocation], "marker": marks[own[0].method]}
        paled = look | {"alpha": 1.0 if named else 0.4, "zorder": 3 if named else 2}
        axes.plot(*_list_points(own, patterned=False), **paled)
        axes.plot(*_list_points(own, patterned=True), **paled, linestyle="", fillstyle="none")
        if named:
            legend.append(Line2D([], [], **look, label=recipe))
    if len(recipes) > LABELLED:
        used = {name for row in rows for name in (row.allocation, row.method)}
        legend += [Line2D([], [], color=colors[name], label=name) for name in allocations if name in used]
        legend += [
            Line2D([], [], color="0.4", linestyle="", marker=marks[name], label=name)
            for name in methods
            if name in used
        ]
    if any(row.pattern for row in rows):
        legend.append(Line2D([], [], color="0.4", linestyle="", marker="o", fillstyle="none", label="hollow: N:M"))
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(LogFormatter())
    axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
    axes.set_xlabel("sparsity")
    axes.set_ylabel("perplexity on the validation text")
    figure.legend(handles=legend, loc="outside right upper", fontsize="small")
    save_figure(figure, kind, path)


def _list_points(rows: Sequence[Row], *, patterned: bool) -> tuple[list[float], list[float]]:
    """(sparsities, perplexities)."""
    points = sorted(
        (row.achieved_sparsity, row.perplexity)
        for row in rows
        if row.perplexity is not None and bool(row.pattern) is patterned
    )
    return [x for x, _ in points], [y for _, y in points]


# --- the command ---------------------------------------------------------------------------------------------------


def make_parser() -> argparse.ArgumentParser:
    """One flag per field of `CompareSettings`, beside two about the command itself."""
    parser = Parser(
        prog="python -m tools.compare",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of fields; a run's config will do.")
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        help="Recipes, sparsities and tasks at once, where no flag says otherwise. paper: the baselines, the sparsity "
        "and the tasks of arXiv 2601.09694.",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="Show the memory, disk and time that the rows would need. Only the model's config is read: --model may be "
        "a config.json alone.",
    )
    add_flags(parser, CompareSettings)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """The command: 0 done, 1 interrupted (the same command goes on), 2 bad input."""
    read_secrets()
    given = sys.argv[1:] if arguments is None else arguments
    return carry_out(lambda: _obey(given))


def _obey(arguments: list[str]) -> None:
    options, flags = parse_flags(make_parser(), CompareSettings, arguments)
    path = Path(options.config) if options.config else None
    preset = PRESETS[options.preset] if options.preset else {}
    settings = read_options(CompareSettings, {**preset, **flags}, path, ignore_unknown=True)
    if options.dry_run:
        show_needs(settings, Console())
    else:
        compare(settings, Console())


if __name__ == "__main__":
    sys.exit(main())
