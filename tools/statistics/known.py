"""What is known of every layer, and sums of that over several texts.

All figures are means over tokens: those of several texts together are sums of each text's own, by its share.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Literal, Protocol

import torch
from torch import Tensor

from tools.base.errors import UnknownStatistics


@dataclass
class ModelStatistics:
    """What the calibration text says of every layer, fp32 on the model's device."""

    mean_square: dict[str, Tensor]
    gradient_square: dict[str, Tensor]
    clipped_square: dict[str, Tensor]
    """Gamma with each token clipped at `tools.statistics.flow.CLIP` times the median one."""
    group: dict[str, str]
    """Layer name to the first layer that reads the same input, under whose name their second moment is kept."""
    gradient: dict[str, float]
    """The paper's gradient score."""
    kappa: dict[str, list[float]]
    """The KL each layer is predicted to cost at each of LEVELS, two-sided mask, nats per token."""
    few: dict[str, int] = field(default_factory=dict)
    """Tokens that experts were sent which were sent too few of them (`tools.statistics.experts`)."""

    def take(self, part: "ModelStatistics") -> None:
        """Add what is known of more layers."""
        for own in fields(self):
            getattr(self, own.name).update(getattr(part, own.name))


def know_read(whole: ModelStatistics) -> ModelStatistics:
    """Of what is known that which a walk up tells: what layers read, without gradients and curves."""
    return ModelStatistics(dict(whole.mean_square), {}, {}, dict(whole.group), {}, {}, dict(whole.few))


def know_nothing() -> ModelStatistics:
    """What is known before anything is."""
    return ModelStatistics({}, {}, {}, {}, {}, {})


def mix_tensors(parts: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """The sum of figures of several texts, each by its share; of one, the figures themselves."""
    if len(parts) == 1:
        return parts[0]
    total = torch.zeros_like(parts[0])
    for part, share in zip(parts, shares, strict=True):
        if share:
            total += share * part
    return total


def mix_statistics(parts: Sequence[ModelStatistics], shares: Sequence[float]) -> ModelStatistics:
    """What several texts together say, each by its share: all are means over tokens.

    Experts are sent too few tokens where every text that counts sends them too few.
    """
    first, counting = parts[0], [part for part, share in zip(parts, shares, strict=True) if share]
    if len(parts) == 1:
        return first

    def mix(figures: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {name: mix_tensors([own[name] for own in figures], shares) for name in figures[0]}

    def mix_curves(curves: Sequence[Sequence[float]]) -> list[float]:
        return [sum(s * kl for s, kl in zip(shares, level, strict=True)) for level in zip(*curves, strict=True)]

    few = set.intersection(*(set(part.few) for part in counting))
    return ModelStatistics(
        mix([part.mean_square for part in parts]),
        mix([part.gradient_square for part in parts]),
        mix([part.clipped_square for part in parts]),
        first.group,
        {x: sum(s * p.gradient[x] for p, s in zip(parts, shares, strict=True)) for x in first.gradient},
        {name: mix_curves([part.kappa[name] for part in parts]) for name in first.kappa},
        {name: sum(part.few[name] for part in counting) for name in first.group if name in few},
    )


Way = Literal["up", "down"]


class KeptBlocks(Protocol):
    """Whoever keeps what a walk learnt of each block, so that it goes on from there once it was interrupted."""

    def read(self, way: Way, block: int) -> ModelStatistics | None:
        """What was learnt of a block; None where it was not passed."""

    def keep(self, way: Way, block: int, part: ModelStatistics) -> None:
        """Keep what was learnt of a block."""


def refuse_infinite(statistics: ModelStatistics, dtype: str) -> None:
    """Raises UnknownStatistics for activations or gradients that are not finite."""
    for values in (statistics.mean_square, statistics.gradient_square):
        for name, value in values.items():
            if not bool(torch.isfinite(value).all()):
                raise UnknownStatistics(
                    f"activations or gradients of {name} are not finite in {dtype}; try --dtype fp32 or bf16"
                )
