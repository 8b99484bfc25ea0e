"""Was the agent worth its tokens? `python -m graph.ablate --planner openai:gpt-5.1 --seeds 0,1,2 --out ablate`

Prunes the same model to the same sparsity in several ways (arms), each with the same budget of tokens put through
pruned models, once for every seed, and measures what each arm kept on the test text. Writes ablate.csv, ablate.md,
ablate.json and a plot. Finished rows are kept on Ctrl-C, and half-done runs go on; the same command does it.
"""

import json
import math
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from pydantic import BaseModel, Field, field_validator
from rich.console import Console

from tools.base.console import carry_out, print_line, show_bars
from tools.base.errors import ImpossiblePlan, UserError
from tools.base.files import write_json, write_text, write_whole
from tools.base.options import Parser, add_flags, parse_flags, read_options
from tools.base.rows import as_csv, lock_out, read_kept, refuse_other_settings, save_figure
from tools.base.rundir import scan_events, unlock_run
from tools.base.secrets import read_secrets
from tools.base.settings import TEAM, TeamSettings
from tools.base.words import count, escape, show
from tools.models.load import check_device, locate_model
from tools.plans.allocate import Allocation, allocate
from tools.plans.layer_profile import LayerProfile, group_layers
from tools.plans.recipe import Adjustment, Recipe
from tools.plans.work_order import order_allocation
from tools.results.schema import SIGMAS, Protocol, describe_protocol
from tools.texts.windows import check_texts
from tools.workbench.open import close_workbench, use_workbench
from tools.workbench.search import search_allocation

if TYPE_CHECKING:
    from tools.base.progress import Progress
    from tools.workbench.bench import Workbench

ARMS = {
    "chat": "a chat model plans and a chat model reflects",
    "chat-alone": "a chat model plans, fixed rules reflect",
    "heuristic": "fixed rules plan and reflect",
    "kappa": "one plan: the default recipe, shared out by the KL curves",
    "random": "plans drawn at random from the planner's levers, the best one kept",
    "search": "an evolutionary search over the shares of the layers, the default recipe's weights",
}
"""What is compared; the first three are runs of the graph."""

CHAT = ("chat", "chat-alone")
GRAPH = (*CHAT, "heuristic")
ALONE = "kappa"
"""Gains are counted from this arm, which nobody planned."""

RANDOM_METHODS = ("two-sided", "sparsegpt", "two-sided-obs", "refit")
RANDOM_STRENGTHS = (0.8, 0.9, 1.0)
RANDOM_GROUPS = 4
"""Groups of layers that a random plan counts otherwise than predicted."""
RANDOM_FACTORS = (0.5, 2.0)


class AblateSettings(TeamSettings):
    """The model, its texts, who plans, and how much each may try."""

    target_sparsity: float = Field(
        0.45, gt=0, lt=1, description="Share of the prunable weights that are zero at the end, as a fraction."
    )
    arms: str = Field(
        "", description=f"Comma-separated: {', '.join(ARMS)}. Empty: all; those with chat need --planner."
    )
    seeds: str = Field("0,1,2", description="Comma-separated seeds; each arm is run once for each.")
    planner: str = Field("", description="The chat model that plans, as in graph.run; empty leaves its arms out.")
    reflector: str = Field("", description="The chat model that reflects, as in graph.run; empty: the planner's.")
    evaluated_tokens: int = Field(
        49152, ge=1, description="Tokens that each arm may put through pruned models before it has to choose."
    )
    max_layer_sparsity: float = Field(0.9, gt=0, le=1, description="No layer is pruned further than this.")
    out: str = Field("ablate", min_length=1, description="Directory of the tables, the plot and the work.")

    @field_validator("arms", "seeds", mode="before")
    @classmethod
    def _join_list(cls, value: Any) -> str:
        """YAML has lists and numbers."""
        return ",".join(str(part) for part in (value if isinstance(value, list) else [value]))


class Row(BaseModel):
    """What one arm reached with one seed."""

    arm: str
    seed: int
    sparsity: float = Field(description="Share of the prunable weights that were zero at the end.")
    reached: bool = Field(description="Whether that is the target; rows short of it are compared with none.")
    perplexity: float | None = Field(description="On the test text, of what the arm chose; null where not finite.")
    kl: float | None = Field(description="KL(dense || pruned) on the validation text, by which it chose.")
    plan: str = Field(description="What it chose, in short.")
    trials: int = Field(description="Plans, or candidates of a search, that were measured.")
    by_rule: int = Field(0, description="How many of a chat planner's trials the rule planned in its stead.")
    evaluated_tokens: int = Field(description="Tokens put through pruned models until it chose.")
    agent_tokens: int = Field(0, description="Tokens read and written by chat models.")
    cost: float = Field(0.0, description="US dollars, by the prices given.")
    seconds: float = Field(description="The whole arm, with the profile whether or not another arm made it.")


class Profiled(BaseModel):
    """The profile that the arms of one seed share."""

    profile: str = Field(description="Hash of the profile.")
    seconds: float


class Ablation(BaseModel):
    """`ablate.json`."""

    settings: dict[str, Any] = Field(description="Model, texts and budget; rows of other settings are never mixed in.")
    protocol: Protocol
    dense_perplexity: float | None = Field(None, description="On the test text; null before it was measured.")
    profiles: dict[int, Profiled] = Field({}, description="By seed; arms that are runs of the graph make their own.")
    rows: list[Row] = []


class Standing(NamedTuple):
    """One arm over all its seeds; errors are standard errors, None with one seed."""

    arm: str
    seeds: int
    perplexity: float
    perplexity_error: float | None
    kl: float
    gain: float | None
    """Perplexity gained over the arm kappa, paired by seed: positive is better."""
    gain_error: float | None
    evaluated_tokens: float
    agent_tokens: float
    cost: float
    seconds: float


# --- what is asked for ---------------------------------------------------------------------------------------------


def list_arms(settings: AblateSettings) -> list[str]:
    """The arms asked for, in the order of ARMS. Raises UserError in one line."""
    asked = [part.strip() for part in settings.arms.split(",") if part.strip()]
    if unknown := [arm for arm in asked if arm not in ARMS]:
        raise UserError(f"there is no arm {unknown[0]!r}; choose among {', '.join(ARMS)}")
    if not settings.planner and (chats := [arm for arm in asked if arm in CHAT]):
        raise UserError(
            f"the arm {chats[0]} needs a chat model: give --planner, such as openai:NAME@http://HOST:PORT/v1"
        )
    return [arm for arm in ARMS if (arm in asked if asked else settings.planner or arm not in CHAT)]


def list_seeds(settings: AblateSettings) -> list[int]:
    """The seeds asked for. Raises UserError in one line."""
    try:
        seeds = list(dict.fromkeys(int(part) for part in settings.seeds.split(",") if part.strip()))
    except ValueError as error:
        raise UserError(f"seeds {settings.seeds!r} must be whole numbers, such as 0,1,2") from error
    if not seeds or min(seeds) < 0:
        raise UserError(f"seeds {settings.seeds!r} must name at least one number from 0 up, such as 0,1,2")
    return seeds


# --- the rows ------------------------------------------------------------------------------------------------------


def ablate(settings: AblateSettings, graph_flags: Sequence[str], console: Console) -> Ablation:
    """Make the rows that are not there yet; everything is on disk after each.

    `graph_flags` are handed on to the arms that are runs of the graph. Raises UserError; KeyboardInterrupt passes.
    """
    arms, seeds = list_arms(settings), list_seeds(settings)
    _check_input(settings)
    directory = Path(settings.out)
    lock_out(directory, directory)
    try:
        known = _read_ablation(directory, settings, graph_flags)
        wanted = [(arm, seed) for seed in seeds for arm in arms]
        done = {(row.arm, row.seed): row for row in known.rows}
        for pair in wanted:
            if pair in done:
                print_line(console, _describe_row(done[pair]))
        with show_bars(console, len(wanted)) as (begin, progress):
            for i, (arm, seed) in enumerate(wanted):
                if (arm, seed) in done:
                    continue
                begin(f"{arm}, seed {seed}", i)
                row = _make_row(arm, seed, settings, graph_flags, known, console, progress)
                known.rows.append(row)
                _write(directory, known)
                print_line(console, _describe_row(row))
        _write(directory, known)  # a kill may have left some of the files a row behind
        for line in conclude(known.rows):
            print_line(console, line)
        print_line(console, f"see {directory / 'ablate.md'}")
    finally:
        unlock_run(directory)
    return known


def _check_input(settings: AblateSettings) -> None:
    """Refuse what can be refused before anything is loaded. Raises UserError."""
    locate_model(settings.model)
    check_device(settings.device)
    check_texts(settings)
    needed = settings.validation_tokens
    if settings.evaluated_tokens < needed:
        raise UserError(f"evaluated_tokens {settings.evaluated_tokens:,} allow no trial: one takes {needed:,}")


def _make_row(
    arm: str,
    seed: int,
    settings: AblateSettings,
    graph_flags: Sequence[str],
    known: Ablation,
    console: Console,
    progress: "Progress",
) -> Row:
    if arm in GRAPH:
        row, known.dense_perplexity = _run_graph(arm, seed, settings, graph_flags, progress)
        return row
    seeded = settings.model_copy(update={"seed": seed})
    work = Path(settings.out) / f"seed-{seed}"
    with use_workbench(seeded, work, lambda text: print_line(console, f"warning: {text}"), progress) as bench:
        began = time.monotonic()
        if seed not in known.profiles:
            profile = bench.profile(progress)
            known.profiles[seed] = Profiled(profile=profile, seconds=round(time.monotonic() - began, 1))
            began = time.monotonic()
        profile = known.profiles[seed].profile
        known.dense_perplexity = bench.evaluate("dense", "test", profile, progress, "test, dense").perplexity
        make = {"kappa": _try_kappa, "random": _try_random, "search": _try_search}[arm]
        chosen = make(bench, profile, seeded, progress)
        evaluation = bench.evaluate(chosen.checkpoint, "validation", profile, progress)
        test = bench.evaluate(chosen.checkpoint, "test", profile, progress, "test, pruned")
        bench.restore(chosen.checkpoint)
        zeros, weights = bench.count_zeros()
        bench.forget_checkpoints([])
        return Row(
            arm=arm,
            seed=seed,
            sparsity=zeros / weights,
            reached=True,
            perplexity=test.perplexity,
            kl=evaluation.mean_kl,
            plan=chosen.plan,
            trials=chosen.trials,
            evaluated_tokens=chosen.tokens,
            seconds=round(known.profiles[seed].seconds + time.monotonic() - began, 1),
        )


class _Choice(NamedTuple):
    """What an arm chose."""

    checkpoint: str
    plan: str
    trials: int
    tokens: int


def _share_out(
    bench: "Workbench",
    profile: str,
    settings: AblateSettings,
    recipe: Recipe,
    adjustments: Sequence[Adjustment],
    progress: "Progress",
) -> Allocation:
    """Raises ImpossiblePlan."""
    layers = bench.describe_layers(profile, recipe, progress)
    limit = settings.max_layer_sparsity
    return allocate(layers, settings.target_sparsity, recipe, adjustments, max_layer_sparsity=limit)


def _try_kappa(bench: "Workbench", profile: str, settings: AblateSettings, progress: "Progress") -> _Choice:
    recipe = Recipe()
    allocation = _share_out(bench, profile, settings, recipe, [], progress)
    checkpoint = bench.prune(profile, order_allocation(recipe, allocation), progress)
    return _Choice(checkpoint, recipe.label, 1, settings.validation_tokens)


def _try_random(bench: "Workbench", profile: str, settings: AblateSettings, progress: "Progress") -> _Choice:
    """As many random plans as the budget allows; the one of least KL on the validation text."""
    tokens = settings.validation_tokens
    trials = settings.evaluated_tokens // tokens
    best: tuple[float, str, str] | None = None
    for first in range(0, trials, bench.abreast):
        tried: list[tuple[str, str]] = []
        for number in range(first, min(first + bench.abreast, trials)):
            recipe, adjustments = draw_plan(bench.read_profile(profile).layers, settings.seed, number)
            with suppress(ImpossiblePlan):
                allocation = _share_out(bench, profile, settings, recipe, adjustments, progress)
                tried.append((bench.prune(profile, order_allocation(recipe, allocation), progress), recipe.label))
        windows = len(bench.windows.validation)
        evaluations = bench.evaluate_each([checkpoint for checkpoint, _ in tried], windows, profile, progress)
        for (checkpoint, label), evaluation in zip(tried, evaluations, strict=True):
            kl = math.inf if evaluation.mean_kl is None else evaluation.mean_kl
            if best is None or kl < best[0]:
                best = kl, checkpoint, label
        if best is not None:
            bench.forget_checkpoints([best[1]])
    if best is None:
        raise UserError(f"no random plan can meet {settings.target_sparsity:.2%}; raise --max-layer-sparsity")
    return _Choice(best[1], best[2], trials, trials * tokens)


def draw_plan(layers: Sequence[LayerProfile], seed: int, number: int) -> tuple[Recipe, list[Adjustment]]:
    """A plan drawn from the levers that a planner has, of this seed and number alone."""
    generator = np.random.default_rng([seed, number])

    def pick(values: Sequence[Any]) -> Any:
        return values[int(generator.integers(len(values)))]

    method = pick(RANDOM_METHODS)
    recipe = Recipe(
        method=method,
        refit=method == "refit" or pick((True, False)),
        allocation=pick(("kappa", "kappa", "uniform", "owl")),
        curves="mask",
        strength=pick(RANDOM_STRENGTHS),
        gamma=pick(("plain", "clipped")),
    )
    if not recipe.reads_curves:  # factors count only where those are read
        return recipe, []
    groups = sorted(group_layers(layers))
    chosen = generator.choice(len(groups), min(RANDOM_GROUPS, len(groups)), replace=False)
    low, high = np.log(RANDOM_FACTORS)
    return recipe, [
        Adjustment(
            selector=groups[place], action="factor", factor=round(float(np.exp(generator.uniform(low, high))), 3)
        )
        for place in sorted(chosen.tolist())
    ]


def _try_search(bench: "Workbench", profile: str, settings: AblateSettings, progress: "Progress") -> _Choice:
    """An evolutionary search, on calibration text, with the weights of the default recipe."""
    recipe = Recipe(allocation="uniform")
    found = search_allocation(
        bench,
        profile,
        recipe,
        settings.target_sparsity,
        progress,
        tokens=settings.evaluated_tokens,
        max_layer_sparsity=settings.max_layer_sparsity,
    )
    checkpoint = bench.prune(profile, order_allocation(recipe, found.allocation), progress)
    return _Choice(checkpoint, f"{recipe.mask_label}:evolution", found.tokens // settings.window, found.tokens)


def _run_graph(
    arm: str, seed: int, settings: AblateSettings, graph_flags: Sequence[str], progress: "Progress"
) -> tuple[Row, float | None]:
    """(the row, the dense model's test perplexity) of a run of the graph, begun or gone on with in another process.

    Raises UserError with the run's last words.
    """
    runs, name = Path(settings.out) / "runs", f"{arm}-{seed}"
    summary_path = runs / name / "summary.json"
    progress("run of the graph", 0, 1)
    if not summary_path.is_file():
        if settings.workers:
            close_workbench()  # its workers would hold the processors, or GPUs, that those of the run need
        command = [sys.executable, "-m", "graph.run", "--runs-dir", str(runs)]
        if (runs / name / "run.json").is_file():
            command += ["--resume", name, *_write_flags({field: getattr(settings, field) for field in TEAM})]
        else:
            command += ["--name", name, *_flags_of(arm, seed, settings), *graph_flags]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode != 0 or not summary_path.is_file():
            said = [line.strip() for line in f"{result.stdout}\n{result.stderr}".splitlines() if line.strip()]
            raise UserError(f"{arm}, seed {seed}: {' '.join(said[-2:])[:400]}; the same command goes on from there")
    progress("run of the graph", 1, 1)
    summary = json.loads(summary_path.read_text(encoding="utf-8"))
    agents = summary["agents"]
    row = Row(
        arm=arm,
        seed=seed,
        sparsity=summary["achieved_sparsity"],
        reached=summary["status"] == "finished",
        perplexity=summary["perplexity"]["pruned"],
        kl=summary["kl"],
        plan=summary["plan"],
        trials=summary["iterations"],
        by_rule=_count_by_rule(runs / name) if arm in CHAT else 0,
        evaluated_tokens=summary["evaluated_tokens"],
        agent_tokens=agents["input_tokens"] + agents["output_tokens"],
        cost=agents["cost"],
        seconds=round(summary["seconds"], 1),
    )
    return row, summary["perplexity"]["dense"]


def _count_by_rule(run: Path) -> int:
    """Rounds of a run that were planned by rule; a round that was begun again after a kill counts once."""
    planners = {event["iteration"]: event["planner"] for _, event in scan_events(run, "plan")}
    return list(planners.values()).count("heuristic")


def _flags_of(arm: str, seed: int, settings: AblateSettings) -> list[str]:
    """The options of a run of the graph that is this arm."""
    chat, reflector = settings.planner, settings.reflector or settings.planner
    planner, reflector = {"chat": (chat, reflector), "chat-alone": (chat, "heuristic")}.get(arm, ("heuristic",) * 2)
    fields = {name: getattr(settings, name) for name in TeamSettings.model_fields} | {
        "seed": seed,
        "target_sparsity": settings.target_sparsity,
        "max_layer_sparsity": settings.max_layer_sparsity,
        "max_evaluated_tokens": settings.evaluated_tokens,
        "max_iterations": 200,  # the budget ends the run
        "patience": 200,
        "planner": planner,
        "reflector": reflector,
    }
    return [*_write_flags(fields), "--no-memory"]


def _write_flags(fields: Mapping[str, Any]) -> list[str]:
    """Fields as options of a command."""
    names = {name: name.replace("_", "-") for name in fields}
    flags = [f"--{names[name]}={value}" for name, value in fields.items() if not isinstance(value, bool)]
    switches = {names[name]: value for name, value in fields.items() if isinstance(value, bool)}
    return [*flags, *(f"--{'' if value else 'no-'}{name}" for name, value in switches.items())]


def _read_ablation(directory: Path, settings: AblateSettings, graph_flags: Sequence[str]) -> Ablation:
    """What is in `--out`, or an empty one. Raises UserError for one with other settings."""
    wanted = settings.model_dump(exclude={"arms", "seeds", "out", "seed", *TEAM}) | {"graph": list(graph_flags)}
    known = read_kept(directory / "ablate.json", Ablation)
    if known is None:
        return Ablation(settings=wanted, protocol=describe_protocol(settings))
    arms = {row.arm for row in known.rows}
    unused = (set() if arms & set(CHAT) else {"planner", "reflector"}) | (set() if arms & set(GRAPH) else {"graph"})
    refuse_other_settings(directory, "an ablation", known.settings, wanted, unused)
    return known.model_copy(update={"settings": wanted})


# --- what comes of it ----------------------------------------------------------------------------------------------


def rank_arms(rows: Sequence[Row]) -> list[Standing]:
    """Every arm that reached the target with a finite perplexity for each of its seeds, best first."""
    by_arm = _perplexities(rows)
    alone = by_arm[ALONE]
    standings = []
    for arm in ARMS:
        own = [row for row in rows if row.arm == arm]
        values = list(by_arm[arm].values())
        if not own or len(values) < len(own):
            continue
        gains = [alone[seed] - value for seed, value in by_arm[arm].items() if seed in alone]
        standings.append(
            Standing(
                arm=arm,
                seeds=len(own),
                perplexity=fmean(values),
                perplexity_error=_standard_error(values),
                kl=fmean(row.kl or math.inf for row in own),
                gain=fmean(gains) if gains and arm != ALONE else None,
                gain_error=_standard_error(gains) if arm != ALONE else None,
                evaluated_tokens=fmean(row.evaluated_tokens for row in own),
                agent_tokens=fmean(row.agent_tokens for row in own),
                cost=fmean(row.cost for row in own),
                seconds=fmean(row.seconds for row in own),
            )
        )
    return sorted(standings, key=lambda standing: standing.perplexity)


def _standard_error(values: Sequence[float]) -> float | None:
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def _perplexities(rows: Sequence[Row]) -> dict[str, dict[int, float]]:
    """Arm to seed to perplexity, where the target was reached and it was finite."""
    return {
        arm: {row.seed: row.perplexity for row in rows if row.arm == arm and row.reached and row.perplexity is not None}
        for arm in ARMS
    }


def list_differences(rows: Sequence[Row]) -> list[tuple[str, str, int, float, float | None]]:
    """(arm, other arm, seeds, mean, standard error) of every pair's difference in perplexity, paired by seed."""
    by_arm = _perplexities(rows)
    found = []
    for i, arm in enumerate(ARMS):
        for other in list(ARMS)[i + 1 :]:
            seeds = sorted(by_arm[arm].keys() & by_arm[other].keys())
            if seeds:
                values = [by_arm[arm][seed] - by_arm[other][seed] for seed in seeds]
                found.append((arm, other, len(seeds), fmean(values), _standard_error(values)))
    return found


def conclude(rows: Sequence[Row]) -> list[str]:
    """For each arm with an agent: whether what it gained over fixed rules and over no plan exceeds the noise."""
    lines = [
        f"{row.arm}, seed {row.seed} stopped at {row.sparsity:.2%}, short of the target, and is compared with nothing: "
        "give it more --evaluated-tokens, or a greater --tau behind --."
        for row in rows
        if not row.reached
    ]
    for arm, other, seeds, mean, error in list_differences(rows):
        if arm not in GRAPH or other not in ("heuristic", ALONE):
            continue
        figures = f"{mean:+.3f}" if error is None else f"{mean:+.3f} ± {error:.3f}"
        if error is None:
            verdict = "one seed says nothing about the noise"
        elif abs(mean) <= SIGMAS * error:
            verdict = f"within {SIGMAS:g} standard errors: not more than the noise"
        else:
            verdict = f"{'better' if mean < 0 else 'worse'} by more than {SIGMAS:g} standard errors"
        lines.append(f"{arm} against {other}: perplexity {figures} over {count(seeds, 'seed')}, {verdict}.")
    return lines


# --- what is written -----------------------------------------------------------------------------------------------


def _tell_trials(row: Row) -> str:
    return f"{row.trials} ({row.by_rule} by rule)" if row.by_rule else str(row.trials)


def _describe_row(row: Row) -> str:
    return (
        f"{row.arm}, seed {row.seed}: {row.sparsity:.2%} zeros, perplexity {show(row.perplexity)}, "
        f"KL {show(row.kl, 4)}, trials {_tell_trials(row)}, {row.evaluated_tokens:,} tokens evaluated, "
        f"{row.agent_tokens:,} by agents: {row.plan}"
    )


def _write(directory: Path, known: Ablation) -> None:
    write_json(directory / "ablate.json", known.model_dump(mode="json"))
    write_text(directory / "ablate.md", describe(known))
    write_text(directory / "ablate.csv", as_csv(Row, known.rows))
    for kind in ("png", "svg"):
        write_whole(directory / f"ablate.{kind}", partial(_plot, known, kind))


def _with_error(value: float | None, error: float | None, digits: int) -> str:
    if value is None:
        return ""
    return f"{value:.{digits}f}" if error is None else f"{value:.{digits}f} ± {error:.{digits}f}"


def describe(known: Ablation) -> str:
    """`ablate.md`."""
    settings, protocol = known.settings, known.protocol
    dense = "not measured" if known.dense_perplexity is None else show(known.dense_perplexity)
    lines = [
        f"# {escape(settings['model'])} at {settings['target_sparsity']:.0%}: was the agent worth its tokens?",
        "",
        f"Perplexity on {protocol.tokens:,} tokens of `{protocol.text}` (test text, windows of {protocol.window}, "
        f"{protocol.dtype}; dense: {dense}) of what each arm chose by the validation text. Each arm may put "
        f"{settings['evaluated_tokens']:,} tokens through pruned models; ± is the standard error over seeds.",
        "",
        *(f"- **{arm}**: {ARMS[arm]}" for arm in ARMS if any(row.arm == arm for row in known.rows)),
        "",
        *(f"{line}\n" for line in conclude(known.rows)),
        "![Perplexity of each arm](ablate.svg)",
        "",
        "| arm | seeds | perplexity | gain over kappa | KL | evaluated tokens | agent tokens | cost "
        "| agent tokens per point | cost per point | seconds |",
        "|---|" + "---:|" * 10,
    ]
    for s in rank_arms(known.rows):
        gained = s.gain if s.gain is not None and s.gain > 0 and s.agent_tokens else None
        cells = [
            s.arm,
            f"{s.seeds}",
            _with_error(s.perplexity, s.perplexity_error, 2),
            _with_error(s.gain, s.gain_error, 3),
            f"{s.kl:.4f}",
            f"{s.evaluated_tokens:,.0f}",
            f"{s.agent_tokens:,.0f}",
            f"${s.cost:.4f}",
            f"{s.agent_tokens / gained:,.0f}" if gained else "",
            f"${s.cost / gained:.4f}" if gained else "",
            f"{s.seconds:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "## Differences, paired by seed", "", "| arm | less | seeds | perplexity |", "|---|---|---:|---:|"]
    for arm, other, seeds, mean, error in list_differences(known.rows):
        lines.append(f"| {arm} | {other} | {seeds} | {_with_error(mean, error, 3)} |")
    lines += ["", "## Rows", "", "| arm | seed | perplexity | KL | trials | plan |", "|---|---:|---:|---:|---:|---|"]
    for row in known.rows:
        cells = [row.arm, str(row.seed), show(row.perplexity), show(row.kl, 4), _tell_trials(row), escape(row.plan)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _plot(known: Ablation, kind: str, path: Path) -> None:
    """A dot for each row, a bar for each arm's mean and its standard error."""
    from matplotlib.figure import Figure

    standings = rank_arms(known.rows)
    figure = Figure(figsize=(8, 0.6 * len(standings) + 1.5), layout="constrained")
    axes = figure.add_subplot()
    for place, standing in enumerate(standings):
        dots = [row.perplexity for row in known.rows if row.arm == standing.arm and row.perplexity is not None]
        axes.plot(dots, [place] * len(dots), "o", color="0.6", markersize=4)
        axes.errorbar(standing.perplexity, place, xerr=standing.perplexity_error or 0, fmt="D", color="C0", capsize=4)
    axes.set_yticks(range(len(standings)), [standing.arm for standing in standings])
    axes.invert_yaxis()
    axes.margins(y=0.2)
    axes.set_xlabel("perplexity on the test text; bars: standard error over seeds")
    save_figure(figure, kind, path)


# --- the command ---------------------------------------------------------------------------------------------------


def make_parser() -> Parser:
    """One flag per field of `AblateSettings`, beside one about the command itself."""
    parser = Parser(
        prog="python -m graph.ablate",
        description=__doc__,
        allow_abbrev=False,
        epilog="Options of graph.run behind a lone -- are handed on to the arms that are runs of the graph.",
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of fields; a run's config will do.")
    add_flags(parser, AblateSettings)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """The command: 0 done, 1 interrupted (the same command goes on), 2 bad input.

    Whatever stands behind `--` is handed on to the runs of the graph, such as prices and time-outs.
    """
    read_secrets()
    given = sys.argv[1:] if arguments is None else arguments
    own, graph_flags = (given[: given.index("--")], given[given.index("--") + 1 :]) if "--" in given else (given, [])
    return carry_out(lambda: _obey(own, graph_flags))


def _obey(arguments: list[str], graph_flags: list[str]) -> None:
    options, flags = parse_flags(make_parser(), AblateSettings, arguments)
    path = Path(options.config) if options.config else None
    ablate(read_options(AblateSettings, flags, path, ignore_unknown=True), graph_flags, Console())


if __name__ == "__main__":
    sys.exit(main())
