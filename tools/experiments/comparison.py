"""Recipes compared on one model, row by row; what is done is on disk after each, and gone on from."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator
from rich.console import Console

from tools.base.console import print_line, show_bars
from tools.base.errors import DamagedArtifact, ImpossiblePlan, UserError
from tools.base.options import join_list
from tools.base.rows import lock_out, read_kept, refuse_other_settings
from tools.base.settings import TEAM, PolishSettings, TaskSettings, TeamSettings
from tools.base.words import count
from tools.experiments.comparison_rows import Limits, MadeRow, make_row
from tools.measure.benchmarks import Benchmark, load_benchmarks, refuse_shared_questions
from tools.measure.harness import run_benchmark
from tools.models.load import check_device, locate_model
from tools.plans.costs import count_polish
from tools.plans.evolve import EFFORTS, EffortName, describe_effort, follow_effort
from tools.plans.jobs import ALL_ALLOCATIONS, ALL_METHODS, LABELS_OF_PARTS, Job, list_jobs, list_standing
from tools.plans.methods import METHODS, name_sequential
from tools.plans.mix import refuse_unknown
from tools.plans.recipe import Recipe
from tools.plans.rules import name_allocations
from tools.results.comparison import (
    Answers,
    Comparison,
    Row,
    Unasked,
    describe_dense,
    describe_row,
    show_tables,
    write_comparison,
)
from tools.results.losses import name_score
from tools.results.schema import Score
from tools.texts.windows import check_texts
from tools.workbench.open import use_workbench
from tools.workbench.store import DENSE

if TYPE_CHECKING:
    from tools.base.progress import Progress
    from tools.workbench.bench import Workbench

_STRUCTURED = "; ".join(f"{label}, {sentence}" for label, sentence in LABELS_OF_PARTS.items())


class CompareSettings(TaskSettings, PolishSettings, TeamSettings):
    """The model, its texts, and what is compared."""

    recipes: str = Field(
        "wanda:uniform,sparsegpt:uniform,sparsegpt:owl,two-sided-obs:kappa,refit:kappa",
        description="Comma-separated METHOD[+refit][~clipped][~dampedSHARE][~SHARETEXT…][~quarter|~half]"
        "[~dense|~sequential][+polish[TOKENS]]:ALLOCATION[@STRENGTH], or all. Statistics without a mark are "
        "those that a method's authors take: sequential (block by block, behind pruned predecessors) for "
        f"{name_sequential(METHODS.values())}, dense for all others and for a search. Shares of named texts, such as "
        "~0.7code~0.3prose, stand for their weights. A polish without TOKENS is on --polish-tokens. Methods: "
        f"{', '.join(ALL_METHODS)}. Allocations: {', '.join(ALL_ALLOCATIONS)}, and kappa-mask. Beside all: "
        f"{_STRUCTURED}; a sparsity is then the share of the prunable weights that is removed, and patterns have no "
        "such row.",
    )
    sparsity: str = Field("0.45", description="Comma-separated fractions and patterns, such as 0.45,0.6,2:4.")
    out: str = Field("compare", min_length=1, description="Directory of the tables, the plot and the work.")
    max_layer_sparsity: float = Field(0.95, gt=0, le=1, description="No layer is pruned further than this.")
    evolution: EffortName = Field(
        "fast",
        description="How long the evolutionary search of a row is, as EvoPress (arXiv 2410.14649) publishes it. "
        f"{'; '.join(f'{name}: {describe_effort(effort)}' for name, effort in EFFORTS.items())}.",
    )
    evolution_tokens: int = Field(
        0,
        ge=0,
        description="Calibration tokens that such a search may put through pruned models for one row: it ends before "
        "the generation that would exceed them, and the row says how many generations were done of how many. 0: all.",
    )

    @field_validator("recipes", "sparsity", mode="before")
    @classmethod
    def _join_list(cls, value: Any) -> str:
        return join_list(value)


def compare(settings: CompareSettings, console: Console) -> Comparison:
    """Make the rows that are not there yet and print a line for each; everything is on disk after each.

    Where tasks are asked for that the comparison has not had so far, its rows that are asked for are made once more,
    on the profile that is there, and those that are not stay without figures of tasks.

    A row that cannot be, by its bounds or its pattern, is left out with a warning. Raises UserError for those when all
    others are made, and for bad input; DamagedArtifact when the profile that rows share is not whole.
    """
    jobs = list_jobs(settings.recipes, settings.sparsity, settings.polish_tokens)
    _check_input(settings, jobs)
    benchmarks = load_benchmarks(settings, settings.dtype)
    directory = Path(settings.out)
    lock_out(directory, directory / "work")
    known, settings = _read_comparison(directory, settings)
    done = {_key(row): row for row in known.rows if row.scores or not benchmarks} if known else {}
    if known:
        print_line(console, describe_dense(known))
        for job in jobs:
            if job.key in done:
                print_line(console, describe_row(job, done[job.key], known.reach))
    impossible: list[str] = []
    todo = [job for job in jobs if job.key not in done]
    if todo or known is None or (benchmarks and not known.dense_scores):
        known, impossible = _make_rows(todo, len(jobs), known, settings, benchmarks, console)
    else:
        write_comparison(directory, known)  # a kill may have left some of the files a row behind
    if console.is_terminal:
        show_tables(known, console)
    print_line(console, f"see {directory / 'compare.md'}")
    if impossible:
        more = f" (and {len(impossible) - 1} more, warned of above)" if len(impossible) > 1 else ""
        raise UserError(f"{impossible[0]}{more}")
    return known


def _check_input(settings: CompareSettings, jobs: list[Job]) -> None:
    """Refuse what can be refused before anything is loaded. Raises UserError."""
    _refuse_jobs(settings, jobs)
    locate_model(settings.model)
    check_device(settings.device)
    check_texts(settings)
    refuse_shared_questions(settings, settings)


def _refuse_jobs(settings: CompareSettings, jobs: list[Job]) -> None:
    """Raises UserError where there is too little text, or too few tokens, for a polish that is asked for, where a
    mixture weighs what is no text, and where all sparsities lie above that of any layer."""
    recipes = [job.recipe for job in jobs if isinstance(job.recipe, Recipe)]
    try:
        for tokens in {recipe.polish_tokens for recipe in recipes} - {0}:
            count_polish(settings, tokens)
        for recipe in recipes:
            refuse_unknown(recipe.mix, settings.mixable)
    except ImpossiblePlan as error:
        raise UserError(str(error)) from error
    least = min(job.sparsity for job in jobs)
    if len(recipes) == len(jobs) and least > settings.max_layer_sparsity:  # whole parts have bounds of their own
        raise UserError(
            f"sparsity {least:g} is above the {settings.max_layer_sparsity:g} of max_layer_sparsity; ask for less, or "
            "raise that"
        )


def _read_comparison(directory: Path, settings: CompareSettings) -> tuple[Comparison | None, CompareSettings]:
    """(what is in `--out`, the settings to go on with); None where nothing is.

    Raises UserError for a comparison with other settings.
    """
    known = read_kept(directory / "compare.json", Comparison)
    if known is None:
        return None, settings
    wanted = _fingerprint(settings)
    searched = any(row.allocation in name_allocations("search") for row in known.rows)
    unused = set() if searched else {"evolution", "evolution_tokens"}
    if not known.settings.get("tasks"):
        unused |= set(TaskSettings.model_fields)
    refuse_other_settings(directory, "a comparison", known.settings, wanted, unused)
    return known.model_copy(update={"settings": wanted}), settings


def _fingerprint(settings: CompareSettings) -> dict[str, Any]:
    """What rows must agree in to stand in one table."""
    return settings.model_dump(exclude={"recipes", "sparsity", "out", "polish_tokens", *TEAM})


def _key(row: Row) -> tuple[str, float, str]:
    return row.recipe, row.sparsity, row.pattern


def _make_rows(
    jobs: list[Job],
    total: int,
    known: Comparison | None,
    settings: CompareSettings,
    benchmarks: list[Benchmark],
    console: Console,
) -> tuple[Comparison, list[str]]:
    """(`known` with a row for each job that can be, why the others cannot)."""
    directory = Path(settings.out)
    limits = Limits(settings.max_layer_sparsity, settings.evolution, settings.evolution_tokens)
    impossible: list[str] = []

    def warn(text: str) -> None:
        print_line(console, f"warning: {text}")

    with (
        show_bars(console, total) as (begin, progress),
        use_workbench(settings, directory / "work", warn, progress) as bench,
    ):
        if known is None:
            begin("dense model", 0)
            known = _profile(bench, settings, jobs, progress)
            write_comparison(directory, known)
            print_line(console, describe_dense(known))
        if benchmarks and not known.dense_scores:
            bench.pruner.restore(DENSE)
            known.dense_scores, known.dense_answers = _ask_tasks(benchmarks, bench.model, bench, "dense", progress)
            write_comparison(directory, known)
        if bench.questions:
            bench.evaluator.ask("dense", "validation", progress)
        standing, under = list_standing(jobs), None
        for i, job in enumerate(jobs):
            begin(job.title, total - len(jobs) + i)
            under = under if job in standing else None
            try:
                made = _take_up(job, known, bench) or make_row(job, bench, known, limits, progress, under)
            except ImpossiblePlan as error:
                impossible.append(f"{job.title}: {error}")
                warn(impossible[-1])
                continue
            if benchmarks and made.checkpoint:
                known.unasked = Unasked(row=made.row, checkpoint=made.checkpoint)
                write_comparison(directory, known)
            made.row.scores, made.row.answers = _ask_tasks(benchmarks, made.model, bench, job.title, progress)
            row, known.unasked = made.row, None
            known.rows = [x for x in known.rows if _key(x) != job.key] + [row]  # one without its tasks goes
            write_comparison(directory, known)
            print_line(console, describe_row(job, row, known.reach))
            under = under or made
    return known, impossible


def _take_up(job: Job, known: Comparison, bench: "Workbench") -> MadeRow | None:
    """The row of this job whose tasks were broken off, its model in place; None where it is another's."""
    if known.unasked is None or _key(known.unasked.row) != job.key:
        return None
    row, checkpoint = known.unasked.row, known.unasked.checkpoint
    try:
        bench.pruner.restore(checkpoint)
    except DamagedArtifact as error:
        bench.warn(f"{error}; the row is made again")
        return None
    return MadeRow(row, bench.model, checkpoint)


def _profile(bench: "Workbench", settings: CompareSettings, jobs: list[Job], progress: "Progress") -> Comparison:
    """The dense model's losses, statistics and curves, which all rows share."""
    began = time.monotonic()
    recipes = [job.recipe for job in jobs if isinstance(job.recipe, Recipe)]
    profile = bench.profile(progress, masks_only=not any(recipe.changes_survivors for recipe in recipes))
    dense = bench.profiles.read(profile).dense.perplexity
    assert dense is not None, "the workbench refuses a dense model that is not finite"
    return Comparison(
        settings=_fingerprint(settings),
        profile=profile,
        profile_seconds=round(time.monotonic() - began, 1),
        dense_perplexity=dense,
        bos=bench.windows.lead > 0,
        reach=bench.told_reach,
    )


def _ask_tasks(
    benchmarks: list[Benchmark], model: Any, bench: "Workbench", label: str, progress: "Progress"
) -> tuple[list[Score], Answers]:
    found = [run_benchmark(benchmark, model, bench.tokenizer, label, progress) for benchmark in benchmarks]
    results = [result for of_task in found for result in of_task]
    return [result.score for result in results], {name_score(x.score): x.values for x in results if x.values}


def show_needs(settings: CompareSettings, console: Console) -> None:
    """`--dry-run`: the memory, disk and time that the rows would need. Raises UserError."""
    from tools.estimate.memory import Course  # imports torch, as the others do
    from tools.estimate.needs import estimate

    jobs = list_jobs(settings.recipes, settings.sparsity, settings.polish_tokens)
    _refuse_jobs(settings, jobs)
    check_texts(settings)
    recipes = [job.recipe for job in jobs if isinstance(job.recipe, Recipe)]
    polished = [(job.recipe.polish_tokens, job.sparsity) for job in jobs if isinstance(job.recipe, Recipe)]
    polished = [(tokens, sparsity) for tokens, sparsity in polished if tokens]
    course = Course(
        recipes,
        tests=len(jobs),
        polish_tokens=max((tokens for tokens, _ in polished), default=0),
        polished_at=min((sparsity for _, sparsity in polished), default=0.0),
    )
    most = max(job.sparsity for job in jobs)
    for line in estimate(settings, course, target=most, directory=Path(settings.out)):
        print_line(console, line)
    if searches := sum(job.kind == "search" for job in jobs):
        rules = follow_effort(
            settings.evolution,
            window=settings.window,
            windows=settings.count_fitted(),
            tokens=settings.evolution_tokens,
        )
        print_line(
            console,
            f"not counted: the searches of {count(searches, 'row')}, each of up to {rules.planned_tokens:,} tokens "
            f"through models pruned for it ({describe_effort(EFFORTS[settings.evolution])})",
        )
    if len(recipes) < len(jobs):
        print_line(console, "not counted: structured rows")
    if settings.tasks:
        print_line(console, f"not counted: {', '.join(settings.tasks)}, asked of the dense model and of every row")
