"""finish: the test text, once; the exported model, its card, the reports and the summary."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from langgraph.runtime import Runtime

from graph.config import RunConfig
from graph.goals.choose import weigh_otherwise
from graph.planning.orders import UNIFORM_WANDA, order_uniform
from graph.planning.verdict import accepted_trial
from graph.runs.session import Session, enter, open_bench
from graph.state import State
from tools.base.errors import BrokenPlan, UserError, in_one_line
from tools.base.files import write_json, write_text
from tools.base.rundir import hash_files
from tools.experiments.evaluation import measure_checkpoints
from tools.measure.recall import Recall, compare_recall
from tools.models.save import export_model
from tools.plans.budget import same_sparsity
from tools.plans.methods import Statistics
from tools.results.cards import find_origin, write_card
from tools.results.losses import Evaluation
from tools.results.page.page import write_page
from tools.results.schema import (
    CutResult,
    Goal,
    Knowledge,
    Origin,
    Perplexities,
    Protocol,
    Sample,
    Summary,
    TextFigures,
    TextResult,
    describe_protocol,
)
from tools.results.tables import write_report

if TYPE_CHECKING:
    from tools.workbench.bench import Workbench


def finish(state: State, runtime: Runtime[RunConfig]) -> dict[str, Any]:
    """Measure dense, uniform Wanda and the accepted weights on the test text; export and report."""
    config = state.config
    state = state.model_copy(update={"current": state.accepted})
    session = enter("finish", state, runtime)
    with open_bench(state, session) as bench:
        best, tokens = accepted_trial(state), state.evaluated_tokens
        layers = bench.profiles.read(state.profile).layers
        zeros, weights = bench.weights.count_zeros()
        if state.parts:  # single zeros are no part that is gone
            zeros = sum(record.zeros for record in bench.pruner.read_checkpoint(state.accepted).values())
        achieved, masks = zeros / weights, bench.weights.hash_masks()

        prompts = list_prompts(state)
        # The dense weights then stay in the model for the first measurement below.
        dense_words = continue_with(bench, "dense", prompts, session)

        def measure(checkpoint: str, label: str) -> Evaluation:
            return bench.evaluator.evaluate(checkpoint, "test", state.profile, session.progress, label)

        # of a cut whole units come as near as they can
        reached = same_sparsity(best.sparsity if state.parts else achieved, config.target_sparsity)
        least = sum(x.zeros for x in layers) / weights
        pattern = config.pattern if reached else ""
        uniform_checkpoint, statistics = prune_uniformly(bench, state, max(achieved, least), pattern, session)
        losses = {
            "dense": measure("dense", "test, dense"),
            "uniform_wanda": measure(uniform_checkpoint, "test, uniform Wanda"),
            "pruned": measure(state.accepted, "test, pruned"),
        }
        knowledge = measure_knowledge(bench, state, session, uniform_checkpoint) if config.questions else None
        checkpoints = {"dense": "dense", "pruned": state.accepted}
        benchmarks = measure_checkpoints(bench, config, checkpoints, session.progress)
        weightings = weigh_otherwise(bench, state, session)
        tokens += max(len(weightings) - 1, 0) * config.count_all("validation") * config.window
        pruned_words = continue_with(bench, state.accepted, prompts, session)
        cut, built = cut_away(bench, state, session)
        protocol = describe_protocol(config, bos=bench.windows.lead > 0)
        origin = look_for_origin(config, protocol, session)
        seconds = session.seconds
        summary = Summary(
            run=state.run,
            model=config.model,
            status="finished" if reached else "short-of-target",
            asked="size" if config.takes_parts else "sparsity",
            target_sparsity=config.target_sparsity,
            achieved_sparsity=achieved,
            reach=bench.told_reach,
            perplexity=Perplexities(**{model: found.perplexity for model, found in losses.items()}),
            wanda_statistics=statistics,
            kl=best.kl,
            goal=describe_goal(state),
            texts=[describe_text(config, figures, losses) for figures in best.texts],
            weightings=weightings,
            benchmarks=benchmarks,
            samples=[Sample(prompt=p, dense=words, pruned=pruned_words[p]) for p, words in dense_words.items()],
            plan=best.plan,
            kept=best.iteration,
            knowledge=knowledge,
            polished=bench.pruner.read_polished(state.accepted),
            cut=cut,
            origin=origin,
            iterations=state.iteration,
            rollbacks=sum(trial.verdict == "rollback" for trial in state.trials),
            evaluated_tokens=tokens,
            agents=state.usage,
            seconds=round(seconds, 3),
            peak_memory_bytes=bench.peak_memory_bytes(),
            mask_sha256=masks,
            protocol=protocol,
        )
        export_model(built, bench.tokenizer, session.directory / "model", write_card(summary, config))
        sparsity = bench.weights.describe_sparsity()
        trials = [trial.model_dump() for trial in ([state.dense] if state.dense else []) + state.trials]
        write_text(session.directory / "report.md", write_report(summary, trials, sparsity, state.stop))
        write_result(session.directory, summary)
        write_text(session.directory / "report.html", write_page([session.directory]))
        session.emit(
            "result",
            **summary.model_dump(),
            model_directory=str(session.directory / "model"),
            report=str(session.directory / "report.html"),
        )
    found = {"current": state.accepted, "accepted": state.accepted, "evaluated_tokens": tokens}
    return {**found, "seconds": session.seconds}


def cut_away(bench: "Workbench", state: State, session: Session) -> tuple[CutResult | None, Any]:
    """(what went whole and what that made of the model, None where nothing did; the model to export).

    The accepted weights stay in the workbench. One that is not on one device is not timed. Raises UserError where
    the smaller model is not the same function.
    """
    from tools.measure.continuations import measure_speeds  # imports torch
    from tools.surgery.parts import is_whole

    bench.pruner.restore(state.accepted)
    found = bench.pruner.build_cut(state.accepted)
    if found is None:
        return None, bench.model
    built, went = found
    decoded: list[float | None] = [None, None]
    if is_whole(bench.model):
        ids_T = bench.windows.validation[0].to(bench.device)
        decoded = [speed for _, speed in measure_speeds([bench.model, built], ids_T, session.progress)]
    sizes = [[parameter.numel() for parameter in model.parameters()] for model in (bench.model, built)]
    widths = [[parameter.nbytes for parameter in model.parameters()] for model in (bench.model, built)]
    result = CutResult(
        size=state.config.target_size,
        heads=went.heads,
        neurons=went.neurons,
        blocks=list(went.dropped),
        dense_parameters=sum(sizes[0]),
        parameters=sum(sizes[1]),
        dense_bytes=sum(widths[0]),
        bytes=sum(widths[1]),
        dense_decoded_per_second=decoded[0],
        decoded_per_second=decoded[1],
    )
    return result, built


def look_for_origin(config: RunConfig, protocol: Protocol, session: Session) -> Origin | None:
    """The run that cut the dense model, where one did; where its files cannot be read, that is told in its stead."""
    try:
        return find_origin(config.model, protocol, config.model_dump(mode="json"))
    except UserError as error:
        session.warn(f"what the dense model was cut from is not told: {in_one_line(error, 200)}")
        return None


def describe_goal(state: State) -> Goal | None:
    """What the model is for, and what was made of that; None without a goal."""
    if state.brief is None:
        return None
    brief, config = state.brief, state.config
    return Goal(words=config.goal, line=brief.line, reason=brief.reason, bounds=config.text_bounds)


def describe_text(config: RunConfig, figures: TextFigures, losses: Mapping[str, Evaluation]) -> TextResult:
    """One of the named texts, from the figures of the trial that was kept and the losses of all models on the test."""
    name = figures.name
    return TextResult(
        name=name,
        source=config.text[name],
        weight=figures.weight,
        kl=figures.kl,
        kl_error=figures.kl_error,
        **{model: found.take_text(name).perplexity for model, found in losses.items()},
    )


def prune_uniformly(
    bench: "Workbench", state: State, sparsity: float, pattern: str, session: Session
) -> tuple[str, Statistics]:
    """(the checkpoint of uniform Wanda, by which statistics): as its authors run it; where that breaks, for it may take
    more memory than the run's own plans, by those of the dense model. Raises BrokenPlan.
    """
    layers = bench.profiles.read(state.profile).layers

    def prune_by(statistics: Statistics, profile: str) -> tuple[str, Statistics]:
        order = order_uniform(layers, sparsity, pattern, state.config.protect, statistics)
        return bench.pruner.prune(profile, order, session.progress), statistics

    try:
        return prune_by(UNIFORM_WANDA.statistics, state.profile)
    except BrokenPlan as error:
        session.warn(f"uniform Wanda behind pruned predecessors: {error}; its row is by the dense model's statistics")
        known = bench.profile(session.progress, masks_only=True) if state.parts else state.profile
        return prune_by("dense", known)


def write_result(directory: Path, summary: Summary) -> None:
    """Write `summary.json`: beside the summary stand the hashes of the model's files."""
    write_json(directory / "summary.json", summary.model_dump() | {"files": hash_files(directory / "model")})


def measure_knowledge(bench: "Workbench", state: State, session: Session, uniform: str) -> Knowledge:
    """What dense, pruned and uniformly pruned weights know of the questions that were kept for the report."""

    def ask(checkpoint: str, name: str) -> Recall:
        return bench.evaluator.ask(checkpoint, "test", session.progress, f"questions, {name}")

    def count(checkpoint: str, name: str) -> int:
        told = f"own answers, {name}"
        return bench.evaluator.count_right(checkpoint, bench.tokenizer, "test", told, session.progress)

    dense, wanda, pruned = ask("dense", "dense"), ask(uniform, "uniform Wanda"), ask(state.accepted, "pruned")
    right = count("dense", "dense")
    left = compare_recall(pruned, dense)
    return Knowledge(
        source=state.config.questions,
        pairs=state.config.question_pairs,
        dense=dense.mean,
        pruned=pruned.mean,
        uniform_wanda=wanda.mean,
        dense_right=right,
        pruned_right=count(state.accepted, "pruned") if right else None,
        retention=left.share if left else None,
        retention_error=left.error if left else None,
    )


def list_prompts(state: State) -> list[str]:
    """What both models continue in the report: the same prompts for every run, then those that its goal asks for."""
    from tools.measure.continuations import PROMPTS  # imports torch

    return list(dict.fromkeys([*PROMPTS, *(state.brief.probes if state.brief else [])]))


def continue_with(bench: "Workbench", checkpoint: str, prompts: Sequence[str], session: Session) -> dict[str, str]:
    """What the model says after each prompt with the weights of a checkpoint, which stay in it."""
    from tools.measure.continuations import continue_prompts  # imports torch

    bench.pruner.restore(checkpoint)
    session.progress("continue prompts", 0, 1)
    words = continue_prompts(bench.model, bench.tokenizer, prompts)
    session.progress("continue prompts", 1, 1)
    return dict(zip(prompts, words, strict=True))
