"""Layers of one round beside those of another: nothing is pruned for it. No torch."""

from collections.abc import Collection

from pydantic import BaseModel, ConfigDict, Field

from tools.base.errors import ImpossiblePlan
from tools.base.words import shorten
from tools.plans.selectors import MOST_SELECTOR


class Graft(BaseModel):
    """Layers of two rounds in one model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    selector: str = Field(min_length=1, max_length=MOST_SELECTOR, description="Which layers, as in adjustments.")
    of: int = Field(ge=1, description="The round they are taken from.")
    rest: int = Field(ge=1, description="The round of all others.")


def refuse_gone(graft: Graft, at_hand: Collection[int]) -> None:
    """Raises ImpossiblePlan where the layers of one of both rounds are not on disk, with the rounds whose are."""
    if graft.of == graft.rest:
        raise ImpossiblePlan(f"a graft is of two rounds, and not of {graft.of} twice")
    for round_ in (graft.of, graft.rest):
        if round_ not in at_hand:
            told = ", ".join(map(str, sorted(at_hand))) or "none"
            raise ImpossiblePlan(f"the layers of round {round_} are not at hand for a graft; those of rounds: {told}")


def describe_graft(graft: Graft) -> str:
    """Such as `*.v_proj of round 2, the rest of round 1`."""
    return f"{shorten(' '.join(graft.selector.split()), 80)} of round {graft.of}, the rest of round {graft.rest}"
