"""Makes the rows of an ablation that are not there yet."""

import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from graph.ablation.arms import Arm, choose, make_config, price_recipe
from graph.ablation.graph_arms import list_shared_flags, run_graph
from graph.ablation.rows import (
    Ablation,
    Profiled,
    Row,
    conclude,
    judge_perplexity,
    judge_row,
    list_settings,
    measure_checkpoint,
    measure_dense,
)
from graph.ablation.settings import CHAT, FIXED, GRAPH, AblateSettings, list_arms, list_seeds
from graph.ablation.tables import describe_row, write_tables
from graph.checks import check_budget
from tools.base.console import print_line, show_bars
from tools.base.errors import BrokenPlan, UserError
from tools.base.progress import Warn
from tools.base.rows import lock_out, read_kept, refuse_other_settings
from tools.base.rundir import unlock_run
from tools.base.settings import TEAM
from tools.models.load import check_device, load_tokenizer, locate_model
from tools.results.schema import describe_protocol
from tools.texts.windows import check_texts, check_windows
from tools.workbench.open import close_workbench, use_workbench
from tools.workbench.store import DENSE

if TYPE_CHECKING:
    from tools.base.progress import Progress
    from tools.workbench.bench import Workbench

COUNTING = 2
"""How seeds and tokens are counted: rows of another way are never mixed in. 1: seeds changed the drawn labels alone."""


def ablate(settings: AblateSettings, graph_flags: Sequence[str], console: Console) -> Ablation:
    """Make the rows that are not there yet; everything is on disk after each.

    `graph_flags` are handed on to the arms that are runs of the graph. Raises UserError; KeyboardInterrupt passes.
    """
    arms, seeds = list_arms(settings), list_seeds(settings)
    _check_input(settings, graph_flags)
    directory = Path(settings.out)
    lock_out(directory, directory)
    try:
        known, settings = _read_ablation(directory, settings, graph_flags)
        arms = _leave_out(arms, settings, console)
        wanted = [(arm, seed) for seed in seeds for arm in arms]
        done = {(row.arm, row.seed): row for row in known.rows}
        for pair in wanted:
            if pair in done:
                print_line(console, describe_row(done[pair]))
        if missing := {seed for arm, seed in wanted if (arm, seed) not in done}:
            _check_length(settings.for_seed(max(missing)))
        with show_bars(console, len(wanted)) as (begin, progress):
            for i, (arm, seed) in enumerate(wanted):
                if (arm, seed) in done:
                    continue
                begin(f"{arm}, seed {seed}", i)
                row = _make_row(arm, seed, settings, graph_flags, known, console, progress)
                known.rows.append(row)
                write_tables(directory, known)
                print_line(console, describe_row(row))
        write_tables(directory, known)  # a kill may have left some of the files a row behind
        for line in conclude(known.rows):
            print_line(console, line)
        print_line(console, f"see {directory / 'ablate.md'}")
    finally:
        unlock_run(directory)
    return known


def _check_input(settings: AblateSettings, graph_flags: Sequence[str]) -> None:
    """Refuse what can be refused before anything is loaded. Raises UserError."""
    if any(flag.partition("=")[0] == "--goal" for flag in graph_flags):
        raise UserError("give --goal before the lone --, and --judge: what the goal's texts count for every arm's row")
    shared = list_shared_flags(settings)
    for name in (flag.partition("=")[0] for flag in graph_flags):
        if name in shared:
            raise UserError(f"{name} holds for every arm; give what is meant by it before the lone --")
    locate_model(settings.model)
    check_device(settings.device)
    for given in list_settings(settings):
        check_texts(given)
    check_budget(make_config(settings), "evaluated_tokens")


def _leave_out(arms: Sequence[str], settings: AblateSettings, console: Console) -> list[str]:
    """The arms without fixed recipes that the budget does not hold, which is told."""
    prices = {arm: price_recipe(arm, settings) for arm in arms if arm in FIXED}
    for arm in (dear := [arm for arm, price in prices.items() if price > settings.evaluated_tokens]):
        print_line(console, f"{arm} is left out: it takes {prices[arm]:,} of the {settings.evaluated_tokens:,} tokens")
    return [arm for arm in arms if arm not in dear]


def _check_length(settings: AblateSettings) -> None:
    """Refuse texts that are too short for the greatest seed, hours before its turn comes. Raises UserError."""
    try:
        tokenizer = load_tokenizer(settings)
    except Exception:  # whatever is wrong with a model is said in one line where it is loaded
        return
    with _named(f"seed {settings.seed}"):
        for given in list_settings(settings):
            check_windows(given, tokenizer)


@contextmanager
def _named(what: str) -> Iterator[None]:
    """Errors inside say what they are about."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{what}: {error}") from error


def _make_row(
    arm: str,
    seed: int,
    settings: AblateSettings,
    graph_flags: Sequence[str],
    known: Ablation,
    console: Console,
    progress: "Progress",
) -> Row:
    seeded = settings.for_seed(seed)
    if arm in GRAPH:
        row, known.dense[seed], known.protocol.bos = run_graph(arm, seeded, graph_flags, progress)
        return row
    work = Path(settings.out) / f"seed-{seed}"
    warn: Warn = lambda text: print_line(console, f"warning: {text}")  # noqa: E731
    if seed not in known.profiles:
        _profile(seeded, work, known, warn, progress)
    own = work / _DIRECTORY.sub("-", arm)
    _copy_profile(work, own)
    with use_workbench(seeded, own, warn, progress) as bench:
        row = _try_arm(arm, seeded, bench, known.profiles[seed], progress)
    close_workbench()
    shutil.rmtree(own)
    return row


_DIRECTORY = re.compile(r"[^A-Za-z0-9]+")


def _profile(settings: AblateSettings, directory: Path, known: Ablation, warn: Warn, progress: "Progress") -> None:
    """Make the profile that the arms of a seed share, and measure the dense model on the test text."""
    with use_workbench(settings, directory, warn, progress) as bench:
        began = time.monotonic()
        profile = bench.profile(progress)
        seconds = round(time.monotonic() - began, 1)
        dense = bench.evaluator.evaluate(DENSE, "test", profile, progress, "test, dense")
        known.dense[settings.seed] = dense.perplexity
        if settings.judge:
            texts = {name: dense.take_text(name).perplexity for name in settings.text}
            texts |= measure_dense(settings, bench, progress)
            known.dense[settings.seed] = judge_perplexity(texts, settings.judge)
        known.protocol.bos = bench.windows.lead > 0
        known.profiles[settings.seed] = Profiled(profile=profile, seconds=seconds)
    close_workbench()


def _copy_profile(directory: Path, own: Path) -> None:
    """Let an arm begin with the profile and nothing that other arms made, so that its seconds are all its own.

    Artifacts are links to the same files: they are never written to.
    """
    if (own / "artifacts").is_dir():
        return  # it was interrupted
    own.mkdir(parents=True, exist_ok=True)
    begun = own / "begun"
    shutil.rmtree(begun, ignore_errors=True)
    shutil.copytree(directory / "artifacts", begun, copy_function=_link)
    begun.rename(own / "artifacts")


def _link(source: str, target: str) -> None:
    if source.endswith(".jsonl"):  # the index grows
        shutil.copy2(source, target)
        return
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copy2(source, target)


def _try_arm(arm: str, settings: AblateSettings, bench: "Workbench", profiled: Profiled, progress: "Progress") -> Row:
    """The row of an arm on the workbench."""
    seed, profile = settings.seed, profiled.profile
    began = time.monotonic() - profiled.seconds
    with _named(f"{arm}, seed {seed}"):
        try:
            chosen = choose(arm, Arm(bench, profile, settings, progress, began))
        except BrokenPlan as error:
            raise UserError(f"{error}; the same command goes on from there") from error
    evaluation = bench.evaluator.evaluate(chosen.checkpoint, "validation", profile, progress)
    seconds = round(time.monotonic() - began, 1)
    test = bench.evaluator.evaluate(chosen.checkpoint, "test", profile, progress, "test, pruned")
    unseen = measure_checkpoint(settings, bench, chosen.checkpoint, progress)
    bench.pruner.restore(chosen.checkpoint)
    zeros, weights = bench.weights.count_zeros()
    row = Row(
        arm=arm,
        seed=seed,
        sparsity=zeros / weights,
        reached=True,
        perplexity=test.perplexity,
        kl=evaluation.mean_kl,
        texts={name: test.take_text(name).perplexity for name in settings.text} | unseen.pruned,
        kls={name: evaluation.take_text(name).mean_kl for name in settings.text} | unseen.kls,
        plan=chosen.plan,
        trials=chosen.trials,
        failed=chosen.failed,
        dear=chosen.dear,
        evaluated_tokens=chosen.tokens,
        seconds=seconds,
    )
    return judge_row(row, settings.judge)


def _read_ablation(
    directory: Path, settings: AblateSettings, graph_flags: Sequence[str]
) -> tuple[Ablation, AblateSettings]:
    """(what is in `--out`, or an empty one; the settings to go on with). Raises UserError for other settings."""
    known = read_kept(directory / "ablate.json", Ablation)
    wanted = settings.model_dump(exclude={"arms", "seeds", "out", "seed", *TEAM})
    wanted |= {"graph": list(graph_flags), "counting": COUNTING}
    if known is None:
        return Ablation(settings=wanted, protocol=describe_protocol(settings)), settings
    arms = {row.arm for row in known.rows}
    unused = (set() if arms & set(CHAT) else {"planner", "reflector"}) | (set() if arms & set(GRAPH) else {"graph"})
    refuse_other_settings(directory, "an ablation", known.settings, wanted, unused)
    return known.model_copy(update={"settings": wanted}), settings
