"""What is known of every layer, and sums of that over several texts.

All figures are means over tokens: those of several texts together are sums of each text's own, by its share, of which
gamma then leans to its mean by the tokens of all.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Literal, Protocol

import torch
from torch import Tensor

from billhook_kernels.statistics import lean_anew, lean_to_mean
from tools.base.errors import UnknownStatistics

PRIOR = 2048
"""Tokens that a layer's mean over its outputs counts for in gamma (`lean_to_mean`): of 0 to 16,384 the best, or close,
for a refit by gradients of 512, 2,048 and 8,192 tokens (SmolLM2, one text; tools/experiments/README.md, few
gradients)."""


@dataclass
class ModelStatistics:
    """What the calibration text says of every layer, fp32 on the model's device."""

    mean_square: dict[str, Tensor]
    gradient_square: dict[str, Tensor]
    clipped_square: dict[str, Tensor]
    """Gamma with each token clipped at `tools.statistics.gradients.CLIP` times the median one."""
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


def lean(square_O: Tensor, tokens: int) -> Tensor:
    """Gamma of so many tokens of one text, (O,)."""
    return lean_to_mean(square_O, tokens, PRIOR)


def mix_gamma(parts: Sequence[Tensor], shares: Sequence[float], tokens: int) -> Tensor:
    """Gamma (O,) of several texts by their shares, each of which leant by as many `tokens` of its own.

    Together they are so many that they tell as much as 1 / sum of s^2 texts alike. Experts, which were sent fewer, are
    taken at the same ratio: theirs leans further than it might.
    """
    mixed_O = mix_tensors(parts, shares)
    return mixed_O if len(parts) == 1 else lean_anew(mixed_O, tokens, tokens / sum(s * s for s in shares), PRIOR)


def mix_statistics(parts: Sequence[ModelStatistics], shares: Sequence[float], tokens: int) -> ModelStatistics:
    """What several texts together say, each by its share: all are means over tokens, gradients over `tokens` of each.

    Experts are sent too few tokens where every text that counts sends them too few.
    """
    first, counting = parts[0], [part for part, share in zip(parts, shares, strict=True) if share]
    if len(parts) == 1:
        return first

    def mix(figures: Sequence[dict[str, Tensor]], *, leant: bool) -> dict[str, Tensor]:
        by_name = {name: [own[name] for own in figures] for name in figures[0]}
        return {x: mix_gamma(own, shares, tokens) if leant else mix_tensors(own, shares) for x, own in by_name.items()}

    def mix_curves(curves: Sequence[Sequence[float]]) -> list[float]:
        return [sum(s * kl for s, kl in zip(shares, level, strict=True)) for level in zip(*curves, strict=True)]

    few = set.intersection(*(set(part.few) for part in counting))
    return ModelStatistics(
        mix([part.mean_square for part in parts], leant=False),
        mix([part.gradient_square for part in parts], leant=True),
        mix([part.clipped_square for part in parts], leant=True),
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
