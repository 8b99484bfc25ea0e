"""Rows of an ablation, and what they say: arms ranked, differences paired by seed, and a sentence for each."""

import math
import operator
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import BaseModel, Field

from graph.ablation.settings import ALONE, FIXED, GRAPH, ROWS, TOLD, AblateSettings
from tools.base.student import CONFIDENCE, find_p, find_quantile
from tools.base.words import count
from tools.models.load import choose_device, load_model
from tools.results.schema import Protocol
from tools.texts.windows import Windows, cut_windows
from tools.workbench.store import DENSE

if TYPE_CHECKING:
    from torch import Tensor

    from tools.base.progress import Progress
    from tools.results.losses import Evaluation
    from tools.workbench.bench import Workbench


class Unseen(NamedTuple):
    """Figures on the test windows of each of these texts, by name; none where there are no such texts."""

    dense: dict[str, float | None]
    """Perplexities."""
    pruned: dict[str, float | None]
    kls: dict[str, float | None]
    """KL(dense || pruned), nats per token."""


NONE = Unseen({}, {}, {})


def list_settings(settings: AblateSettings) -> list[AblateSettings]:
    """The settings with the texts that arms are given and, where there are any, with these in their place."""
    unseen = settings.model_copy(update={"text": settings.unseen, "text_weights": {}, "questions": ""})
    return [settings, unseen] if settings.unseen else [settings]


def measure_exported(settings: AblateSettings, directory: Path, progress: "Progress") -> Unseen:
    """Of a model that a run of the graph left. Raises UserError where it, or the dense one, cannot be loaded."""
    if not settings.unseen:
        return NONE
    model, tokenizer = load_model(choose_device(settings), directory.parent)
    windows = _cut(settings, tokenizer)
    dense, hidden_BTD = _evaluate(model, windows, None, progress)
    del model  # before the other one is loaded
    model, _ = load_model(choose_device(settings.model_copy(update={"model": str(directory)})), directory.parent)
    return _describe(windows, dense, _evaluate(model, windows, hidden_BTD, progress)[0])


def measure_checkpoint(settings: AblateSettings, bench: "Workbench", checkpoint: str, progress: "Progress") -> Unseen:
    """Of a checkpoint of the workbench, which is in the model afterwards."""
    if not settings.unseen:
        return NONE
    windows = _cut(settings, bench.tokenizer)
    bench.pruner.restore(DENSE)
    dense, hidden_BTD = _evaluate(bench.model, windows, None, progress)
    bench.pruner.restore(checkpoint)
    return _describe(windows, dense, _evaluate(bench.model, windows, hidden_BTD, progress)[0])


def measure_dense(settings: AblateSettings, bench: "Workbench", progress: "Progress") -> dict[str, float | None]:
    """Perplexities of the dense model, which is in the workbench afterwards."""
    if not settings.unseen:
        return {}
    windows = _cut(settings, bench.tokenizer)
    bench.pruner.restore(DENSE)
    return _list_perplexities(windows, _evaluate(bench.model, windows, None, progress)[0])


def _cut(settings: AblateSettings, tokenizer: Any) -> Windows:
    return cut_windows(list_settings(settings)[-1], tokenizer)


def _evaluate(
    model: Any, windows: Windows, dense_hidden_BTD: "Tensor | None", progress: "Progress"
) -> "tuple[Evaluation, Tensor]":
    """(losses of the test windows, hidden states); the dense model has no reference."""
    from tools.measure.losses import evaluate_by_blocks, evaluate_windows  # imports torch
    from tools.models.blocks import Blocks
    from tools.models.streamed import find_stream

    windows_BT = windows.test.to(model.device)
    label = f"unseen texts, {'dense' if dense_hidden_BTD is None else 'pruned'}"
    about = (windows_BT, dense_hidden_BTD, label, progress)
    if find_stream(model):
        losses, hidden_BTD = evaluate_by_blocks(Blocks(model), *about, lead=windows.lead)
    else:
        losses, hidden_BTD = evaluate_windows(model, *about, lead=windows.lead)
    return losses.model_copy(update={"texts": windows.name_each("test", range(len(windows_BT)))}), hidden_BTD


def _describe(windows: Windows, dense: "Evaluation", pruned: "Evaluation") -> Unseen:
    kls = {name: pruned.take_text(name).mean_kl for name in windows.texts}
    return Unseen(_list_perplexities(windows, dense), _list_perplexities(windows, pruned), kls)


def _list_perplexities(windows: Windows, losses: "Evaluation") -> dict[str, float | None]:
    return {name: losses.take_text(name).perplexity for name in windows.texts}


class Row(BaseModel):
    """What one arm reached with one seed, which says which labels are drawn and which stretch of every text is used."""

    arm: str
    seed: int
    sparsity: float = Field(description="Share of the prunable weights that were zero at the end.")
    reached: bool = Field(description="Whether that is the target; rows short of it are compared with none.")
    perplexity: float | None = Field(description="On the test text, of what the arm chose; null where not finite.")
    kl: float | None = Field(description="KL(dense || pruned) on the validation text, by which it chose.")
    texts: dict[str, float | None] = Field(
        {},
        exclude_if=operator.not_,
        description="Perplexity on the test windows of each named text, of which perplexity is the mean by weight.",
    )
    kls: dict[str, float | None] = Field(
        {},
        exclude_if=operator.not_,
        description="KL on the validation windows of each, of unseen ones on the test windows; kl is their mean.",
    )
    plan: str = Field(description="What it chose, in short.")
    trials: int = Field(description="Plans, or candidates of a search, that were measured.")
    failed: int = Field(
        0, description="Plans that no allocation could meet, or that broke while they were carried out."
    )
    dear: int = Field(0, description="Plans that took more tokens than were left, and were passed over.")
    by_rule: int = Field(0, description="How many of a chat planner's trials the rule planned in its stead.")
    evaluated_tokens: int = Field(
        description="Tokens put through the model, once it was profiled, until it chose; a backward counts as two."
    )
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
    protocol: Protocol = Field(description="Of seed 0; every other seed has another stretch of the texts.")
    dense: dict[int, float | None] = Field({}, description="The dense model's perplexity on the test text, by seed.")
    profiles: dict[int, Profiled] = Field({}, description="By seed; arms that are runs of the graph make their own.")
    rows: list[Row] = []


class Mean(NamedTuple):
    """A mean over seeds."""

    value: float
    margin: float | None
    """What the t interval of CONFIDENCE reaches to either side; None with one seed."""
    p: float | None
    """How often a mean as far from 0 comes by chance, by a two-sided t test; None with one seed."""


class Standing(NamedTuple):
    """One arm over all its seeds."""

    arm: str
    seeds: int
    perplexity: Mean
    kl: float
    gain: Mean | None
    """Perplexity gained over the arm kappa, paired by seed: positive is better."""
    evaluated_tokens: float
    agent_tokens: float
    cost: float
    seconds: float


class Difference(NamedTuple):
    """What one arm's perplexity is above another's, and its KL in percent of the other's, paired by seed."""

    arm: str
    other: str
    seeds: int
    perplexity: Mean
    kl: Mean | None
    """None where a KL was not measured, or is 0."""


def judge_perplexity(by_text: Mapping[str, float | None], weights: Mapping[str, float]) -> float | None:
    """The perplexity of several texts, each by its weight, as of one text that is made of them in such shares.

    None where a text that counts was not finite.
    """
    logs = {name: None if value is None else math.log(value) for name, value in by_text.items()}
    mean = weigh_texts(logs, weights)
    return None if mean is None else math.exp(mean)


def judge_row(row: Row, weights: Mapping[str, float]) -> Row:
    """The row with perplexity and KL of its texts by these weights; as it is where there are none."""
    if not weights:
        return row
    judged = {"perplexity": judge_perplexity(row.texts, weights), "kl": weigh_texts(row.kls, weights)}
    return row.model_copy(update=judged)


def weigh_texts(by_text: Mapping[str, float | None], weights: Mapping[str, float]) -> float | None:
    """The mean over several texts, each by its weight; None where one that counts was not finite."""
    counted = [(weight, by_text[name]) for name, weight in weights.items() if weight]
    found = [(weight, value) for weight, value in counted if value is not None]
    return sum(w * value for w, value in found) / sum(w for w, _ in found) if len(found) == len(counted) else None


def average(values: Sequence[float]) -> Mean:
    """The mean of one value for each seed."""
    mean, degrees = fmean(values), len(values) - 1
    if not degrees:
        return Mean(mean, None, None)
    error = stdev(values) / math.sqrt(len(values))
    t = mean / error if error else math.copysign(math.inf, mean) if mean else 0.0
    return Mean(mean, find_quantile(degrees) * error, find_p(t, degrees))


def rank_arms(rows: Sequence[Row]) -> list[Standing]:
    """Every arm that reached the target with a finite perplexity for each of its seeds, best first; behind those of
    more seeds those of fewer, for seeds have texts of their own, and a mean of easy ones says nothing."""
    by_arm = _perplexities(rows)
    alone = by_arm[ALONE]
    standings = []
    for arm in ROWS:
        own = [row for row in rows if row.arm == arm]
        values = list(by_arm[arm].values())
        if not own or len(values) < len(own):
            continue
        gains = [alone[seed] - value for seed, value in by_arm[arm].items() if seed in alone and arm != ALONE]
        standings.append(
            Standing(
                arm=arm,
                seeds=len(own),
                perplexity=average(values),
                kl=fmean(row.kl or math.inf for row in own),
                gain=average(gains) if gains else None,
                evaluated_tokens=fmean(row.evaluated_tokens for row in own),
                agent_tokens=fmean(row.agent_tokens for row in own),
                cost=fmean(row.cost for row in own),
                seconds=fmean(row.seconds for row in own),
            )
        )
    return sorted(standings, key=lambda standing: (-standing.seeds, standing.perplexity.value))


def _perplexities(rows: Sequence[Row]) -> dict[str, dict[int, float]]:
    """Arm to seed to perplexity, where the target was reached and it was finite."""
    return {
        arm: {row.seed: row.perplexity for row in rows if row.arm == arm and row.reached and row.perplexity is not None}
        for arm in ROWS
    }


def list_differences(rows: Sequence[Row]) -> list[Difference]:
    """Every pair of arms that have seeds in common."""
    by_arm, kls = _perplexities(rows), {(row.arm, row.seed): row.kl for row in rows}
    found = []
    for i, arm in enumerate(ROWS):
        for other in ROWS[i + 1 :]:
            seeds = sorted(by_arm[arm].keys() & by_arm[other].keys())
            if seeds:
                values = [by_arm[arm][seed] - by_arm[other][seed] for seed in seeds]
                paired = [(kls[arm, seed], kls[other, seed]) for seed in seeds]
                rises = [100 * (own / theirs - 1) for own, theirs in paired if own is not None and theirs]
                kl = average(rises) if len(rises) == len(seeds) else None
                found.append(Difference(arm, other, len(seeds), average(values), kl))
    return found


def conclude(rows: Sequence[Row]) -> list[str]:
    """For each run of the graph: whether what it gained over the rule, also over one that is told a goal in figures,
    over what a person does without an agent, over the rule's list and over the best fixed recipe exceeds the noise."""
    lines = [
        f"{row.arm}, seed {row.seed} stopped at {row.sparsity:.2%}, short of the target, and is compared with nothing: "
        "give it more --evaluated-tokens, or a greater --tau behind --."
        for row in rows
        if not row.reached
    ]
    fixed = next((standing.arm for standing in rank_arms(rows) if standing.arm in FIXED), "")
    for difference in list_differences(rows):
        if difference.arm in GRAPH and difference.other in ("heuristic", TOLD, ALONE, "grid", fixed):
            lines.append(_judge(difference))
    return lines


def _judge(difference: Difference) -> str:
    """Whether a difference exceeds the noise."""
    (mean, margin, p), kl = difference.perplexity, difference.kl
    beginning, seeds = f"{difference.arm} against {difference.other}: perplexity {mean:+.3f}", difference.seeds
    if margin is None or p is None:
        return f"{beginning} over {count(seeds, 'seed')}, which says nothing about the noise."
    verdict = f"{'better' if mean < 0 else 'worse'}" if p < 1 - CONFIDENCE else "not more than the noise"
    aside = "" if kl is None or kl.p is None else f" KL {kl.value:+.1f} % ± {kl.margin:.1f} % (p {show_p(kl.p)})."
    return (
        f"{beginning} ± {margin:.3f} ({CONFIDENCE:.0%} t interval over {seeds} seeds, p {show_p(p)}): {verdict}.{aside}"
    )


def show_p(p: float) -> str:
    """A probability, with its sign."""
    return "< 0.001" if p < 0.001 else f"= {p:.2g}"
