"""Rows of an ablation, and what they say: arms ranked, differences paired by seed, and a sentence for each."""

import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any, NamedTuple

from pydantic import BaseModel, Field

from graph.ablation.settings import ALONE, ARMS, GRAPH
from graph.state import SIGMAS
from tools.base.words import count
from tools.results.schema import Protocol


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
