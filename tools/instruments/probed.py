"""What was probed in a round: told from one call of an instrument to the next. No torch in here."""

import operator
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, Field


class Probed(BaseModel):
    """An order that was probed."""

    order: str = Field(description="Its id.")
    checkpoint: str = Field(description="Of its weights.")
    sparsity: float
    tokens: int = Field(description="Of validation text that it was measured on.")
    losses: dict[str, Any] = Field(description="On that text, an `Evaluation`.")
    windows: list[int] = Field(description="Of validation text, which its losses are of.")
    line: str = Field(description="The plan in one line.")
    predicted: float | None = Field(None, description="Its KL as it was predicted, nats per token.")
    change: float | None = Field(None, description="Its KL minus that of the last accepted weights, paired.")
    change_error: float | None = None
    texts: dict[str, tuple[float, float | None]] = Field(
        {}, exclude_if=operator.not_, description="Likewise of each named text: the change, and its error."
    )
    alone: str = Field("", exclude_if=operator.not_, description="As in its order: the layers that it pruned, not all.")


class PastProbe(BaseModel):
    """What a probe of an earlier round measured."""

    number: int = Field(description="In the run, from 1.")
    iteration: int
    plan: str = Field(description="In one line.")
    tokens: int
    kl: float | None = Field(description="Nats per token; null where it was not finite.")
    kl_error: float | None
    predicted: float | None = Field(None, description="As of one of this round.")
    change: float | None = Field(description="KL minus that of the weights kept then; null where none were.")
    change_error: float | None
    texts: dict[str, tuple[float, float | None]] = Field(
        {}, exclude_if=operator.not_, description="Likewise of each named text: the change, and its error."
    )
    best: int = Field(0, description="Number of its round's best probe, where it is another and both are comparable.")
    behind: float | None = Field(None, description="KL minus that one's, paired.")
    behind_error: float | None = None
    windows: list[int] = Field(
        [],
        exclude_if=operator.not_,
        description="Of the best of its round: those of validation text that its losses are of.",
    )
    losses: dict[str, Any] | None = Field(
        None, exclude_if=operator.not_, description="Likewise, an `Evaluation` on these windows."
    )
    trial: float | None = Field(
        None, exclude_if=lambda trial: trial is None, description="KL of its round's trial minus its own, paired."
    )
    trial_error: float | None = Field(None, exclude_if=lambda error: error is None)


def count_probes(past: Sequence[PastProbe]) -> int:
    """How many probes there were before a round, of which the latest are known: its own are numbered from there on."""
    return max((probe.number for probe in past), default=0)


def remember_probe(round_: list[Probed], probed: Probed) -> int:
    """Add to the probes of a round, in which an order has one place; that place, from 0.

    What was measured on more text stays.
    """
    places = [known.order for known in round_]
    if probed.order not in places:
        round_.append(probed)
        return len(round_) - 1
    place = places.index(probed.order)
    if probed.tokens > round_[place].tokens:
        round_[place] = probed
    return place


def find_known(probed: Sequence[Probed], tokens: int) -> set[str]:
    """The orders that were probed on so many tokens in a round: these are read back."""
    return {known.order for known in probed if known.tokens == tokens}


def count_rest(probed: Sequence[Probed], order: str, tokens: int) -> int:
    """Of so many tokens that an order is to be measured on, those that it was not measured on yet in the round."""
    return max(0, tokens - max((known.tokens for known in probed if known.order == order), default=0))
