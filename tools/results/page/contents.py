"""What the page says of a run, worked out of its record: sentences, tiles, rows, maps, bars and facts."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tools.base.words import show, show_seconds, show_size
from tools.plans.layer_profile import predict_layer_kl
from tools.results.page.figures import Cell, Prediction
from tools.results.page.record import Layers, Record
from tools.results.schema import CutResult, Knowledge, Score, Summary
from tools.results.sentences import (
    describe_result,
    name_text,
    relate_to_wanda,
    tell_spending,
)
from tools.results.trial import Trial

OVERVIEW = ("sparsity", "perplexity", "dense", "uniform Wanda", "KL", "trials", "rolled back", "agents' tokens", "cost")
"""Heads of the table of several runs, after the run's name and status."""


def find_status(record: Record) -> str:
    """finished, short of target, stopped or unfinished."""
    if record.summary:
        return record.summary.status.replace("-", " ")
    return "stopped" if record.stopped else "unfinished"


def find_target(record: Record) -> float | None:
    """The sparsity asked for; None where the config does not say."""
    target = record.summary.target_sparsity if record.summary else record.config.get("target_sparsity")
    return float(target) if isinstance(target, int | float) and 0 < target < 1 else None


def takes_parts(record: Record) -> bool:
    """Whether whole parts go, in place of single weights."""
    return bool(record.config.get("target_size"))


def describe_run(record: Record) -> list[str]:
    """What happened, in three sentences or so."""
    kept, dense, target = record.kept, record.dense, find_target(record)
    changed = kept is not None and kept.iteration > 0
    if record.summary:
        last = f"The plan that was kept: {kept.plan}" if kept and changed else "No plan was kept, so nothing was pruned"
        why = f"; the loop ended because {record.stop}" if record.stop else ""
        return [describe_result(record.summary), f"{last}{why}."]
    most = record.config.get("max_iterations")
    undone = sum(t.verdict == "rollback" for t in record.trials)
    said = [
        f"This run has not finished: {len(record.trials)}{f' of at most {most}' if most else ''} iterations are done, "
        f"{undone} of them rolled back."
    ]
    if kept and changed and dense:
        aim, state = f" (target {target:.2%})" if target else "", "gone" if takes_parts(record) else "zero"
        said.append(
            f"So far {kept.sparsity:.2%} of the prunable weights are {state}{aim}, at a validation perplexity of "
            f"{show(kept.perplexity)}; dense {show(dense.perplexity)}."
        )
    elif dense:
        said.append(f"Nothing is pruned yet; the dense model's validation perplexity is {show(dense.perplexity)}.")
    if record.stopped:
        again = f"; to go on: {record.stopped.resume}" if record.stopped.resume else ""
        said.append(f"The process ended: {record.stopped.reason.rstrip('.')}{again}")
    elif record.node:
        said.append(f"The last step begun: {record.node}.")
    return said


def list_tiles(record: Record) -> list[tuple[str, str, str]]:
    """The headline figures: (title, figure, words below it)."""
    target = find_target(record)
    aim = f"target {target:.2%}" if target else ""
    kept, dense, summary = record.kept, record.dense, record.summary
    state = "Weights gone" if takes_parts(record) else "Zero weights"
    tiles = []
    if summary:
        p = summary.perplexity
        tiles.append((state, f"{summary.achieved_sparsity:.2%}", _say_of_what(aim, summary)))
        if summary.cut:
            tiles += _list_gains(summary.cut)
        tiles.append(("Perplexity on test", show(p.pruned), f"dense {show(p.dense)}"))
        if (share := relate_to_wanda(p.dense, p.pruned, p.uniform_wanda)) is not None:
            tiles.append(("Perplexity lost", f"{share:.2f} ×", f"that of uniform Wanda ({show(p.uniform_wanda)})"))
        else:
            tiles.append(("Uniform Wanda", show(p.uniform_wanda), "at the same sparsity"))
    elif kept and dense:
        tiles.append((f"{state} so far", f"{kept.sparsity:.2%}", aim))
        tiles.append(("Validation perplexity", show(kept.perplexity), f"dense {show(dense.perplexity)}"))
    if kept and dense:
        error = f"± {kept.kl_error:.4f}, " if kept.kl_error else ""
        tiles.append(("KL to dense", show(kept.kl, 4), f"{error}nats per token"))
    if record.trials:
        undone = sum(t.verdict == "rollback" for t in record.trials)
        tiles.append(("Trials", str(len(record.trials)), f"{undone} rolled back"))
    return tiles


def _list_gains(cut: CutResult) -> list[tuple[str, str, str]]:
    """The tiles of what a cut made of the model."""
    tiles = [("Bytes", f"{cut.share:.2%}", f"asked for {cut.size:.4g}")]
    if cut.gain is not None:
        tiles.append(("Tokens/s decoded", f"{cut.gain:.2f} ×", f"dense {cut.dense_decoded_per_second:.1f}"))
    return tiles


def _say_of_what(aim: str, summary: Summary) -> str:
    reach = summary.reach
    return aim if reach.is_nearly_all else f"{aim}, of {reach.of_blocks:.1%} of the blocks' weights"


def list_row(record: Record) -> list[str]:
    """A run's cells under OVERVIEW: on the test text, or, while it goes on, on the validation text so far."""
    kept, dense, p = record.kept, record.dense, record.summary.perplexity if record.summary else None
    sparsity = record.summary.achieved_sparsity if record.summary else kept.sparsity if kept else None
    usage = record.usage
    return [
        "" if sparsity is None else f"{sparsity:.2%}",
        show(p.pruned) if p else f"{show(kept.perplexity)} so far" if kept else "",
        show(p.dense) if p else show(dense.perplexity) if dense else "",
        show(p.uniform_wanda) if p else "",
        show(kept.kl, 4) if kept else "",
        str(len(record.trials)),
        str(sum(t.verdict == "rollback" for t in record.trials)),
        f"{usage.input_tokens + usage.output_tokens:,}",
        f"${usage.cost:.4f}" if usage.cost else "",
    ]


def find_cells(record: Record) -> list[Cell]:
    """The sparsity of every layer of the weights that were kept; empty while these are dense."""
    layers = record.layers
    return _zip_layers(layers, layers.sparsity) if layers else []


def find_costs(record: Record) -> list[Cell]:
    """The predicted KL of every layer at its sparsity, nats per token; empty where profile or layers are missing, or
    whole parts go, which layers have no curves of."""
    layers, curves = record.layers, {layer.name: layer for layer in record.profile}
    if layers is None or takes_parts(record) or not curves.keys() >= set(layers.names):
        return []
    costs = [
        float(predict_layer_kl(curves[name], np.array([s]))[0])
        for name, s in zip(layers.names, layers.sparsity, strict=True)
    ]
    return _zip_layers(layers, costs)


def _zip_layers(layers: Layers, values: Sequence[float]) -> list[Cell]:
    return [Cell(*cell) for cell in zip(layers.names, layers.blocks, layers.kinds, values, strict=True)]


def find_limits(records: Sequence[Record]) -> tuple[float, float]:
    """The least and the most predicted KL of a layer over all runs, so that their maps can be compared.

    Less than a thousandth of the most is all one colour.
    """
    costs = [cell.value for record in records for cell in find_costs(record) if cell.value > 0]
    most = max(costs, default=1.0)
    least = max(min(costs, default=most), most / 1000)
    return (least, most) if least < most else (most / 2, most)


def list_measured(record: Record) -> list[Trial]:
    """The trials that have figures."""
    return [t for t in record.trials if t.measured]


def list_predictions(trials: Sequence[Trial]) -> list[Prediction]:
    """The trials that have a KL above 0, both predicted and measured."""
    return [
        Prediction(t.iteration, t.verdict, t.predicted_kl, t.kl, t.kl_error or 0.0)
        for t in trials
        if t.measured and t.kl is not None and t.kl > 0 and t.predicted_kl > 0
    ]


def describe_predictions(points: Sequence[Prediction]) -> str:
    """How far off the predictions were; empty without any."""
    factors = sorted(p.measured / p.predicted for p in points)
    if not factors:
        return ""
    if len(factors) == 1:
        return f"What was measured is {factors[0]:.2f} times what was predicted."
    middle = math.exp(sum(map(math.log, factors)) / len(factors))
    return (
        f"What was measured is between {factors[0]:.2f} and {factors[-1]:.2f} times what was predicted, "
        f"{middle:.2f} times in the geometric mean of {len(factors)} trials."
    )


class Bar(NamedTuple):
    """A figure and one standard error each way, as places in a table's cell from 0 to 100."""

    at: float
    low: float
    high: float


class ScoreRow(NamedTuple):
    """A benchmark's figure."""

    score: Score
    first: bool
    """The first of its task and metric."""
    bar: Bar | None
    """None where the figure was not finite."""


def list_scores(summary: Summary | None) -> list[ScoreRow]:
    """The benchmarks by task and metric, whose bars are on one scale for all models."""
    groups: dict[tuple[str, str], list[Score]] = {}
    for score in summary.benchmarks if summary else []:
        groups.setdefault((score.task, score.metric), []).append(score)
    rows = []
    for scores in groups.values():
        known = [(s.value, s.error or 0.0) for s in scores if s.value is not None]
        low = min((value - error for value, error in known), default=0.0)
        high = max((value + error for value, error in known), default=1.0)
        for score in scores:
            bar = None if score.value is None else _place(score.value, score.error, low, high)
            rows.append(ScoreRow(score, score is scores[0], bar))
    return rows


def place_retention(knowledge: Knowledge | None) -> Bar | None:
    """The share of the answers' probability that is left, between nothing and all of it, or what is more."""
    if knowledge is None or knowledge.retention is None:
        return None
    error = knowledge.retention_error or 0.0
    return _place(knowledge.retention, error, 0, max(1.0, knowledge.retention + error))


def _place(value: float, error: float | None, low: float, high: float) -> Bar:
    span = high - low or 1.0
    places = (2 + 96 * (v - low) / span for v in (value, value - (error or 0), value + (error or 0)))
    return Bar(*(round(place, 2) for place in places))


class Continued(NamedTuple):
    """A prompt and what both models made of it."""

    prompt: str
    dense: str
    pruned: str
    same: int
    """Characters in which the two begin alike."""


def list_samples(summary: Summary | None) -> list[Continued]:
    """The prompts and what came of them."""
    return [
        Continued(s.prompt, s.dense, s.pruned, _count_same(s.dense, s.pruned))
        for s in (summary.samples if summary else [])
    ]


def _count_same(first: str, second: str) -> int:
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def list_facts(record: Record) -> list[tuple[str, str]]:
    """(title, fact): how it was measured, with what, and what it cost."""
    summary, config, usage = record.summary, record.config, record.usage
    facts = []
    if summary:
        p = summary.protocol
        facts += [
            ("Test text", f"{p.text}: {p.tokens:,} tokens in {p.windows}, {p.dtype}; seen once, by no agent"),
        ]
    for split in ("calibration", "validation"):
        if {split, f"{split}_windows", "window"} <= config.keys():
            windows = f"{config[f'{split}_windows']} windows of {config['window']} tokens"
            facts.append((f"{split.capitalize()} text", f"{windows} of {name_text(config, split).replace('`', '')}"))
    agents = [f"{agent}: {config[agent]}" for agent in ("planner", "reflector") if agent in config]
    if agents:
        facts.append(("Agents", ", ".join(agents)))
    asked = usage.calls or usage.failed_requests
    facts.append(("Spent on agents", tell_spending(usage.model_dump()) if asked else "nothing: no model was asked"))
    if summary:
        facts += [
            ("Evaluated", f"{summary.evaluated_tokens:,} tokens through the model once it was profiled"),
            ("Time", f"{show_seconds(summary.seconds)}, peak memory {show_size(summary.peak_memory_bytes, 'GB', 2)}"),
            ("Versions", ", ".join(f"{name} {number}" for name, number in summary.protocol.versions.items())),
            ("mask_sha256", summary.mask_sha256),
        ]
    return facts
