"""What each thing costs that a run does, in operations of products and in measured seconds, and steps made of them."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from pydantic import BaseModel, Field

from tools.base.settings import WorkbenchSettings
from tools.estimate.block import Counts
from tools.estimate.course import Course, name_recipe
from tools.estimate.pruning import count_flops
from tools.estimate.timing import Times
from tools.models.layers import Layer, list_readers
from tools.plans.layer_profile import LEVELS

Prices = Mapping[str, float]
"""What one of each thing costs that is done: a `forward` of one window through all blocks, its `moments`, ..."""


class Work(BaseModel):
    """A step of a run."""

    name: str
    how: str
    times: int = Field(description="How often, as foreseen; 0 for what only some plans ask for.")
    flops: float = Field(description="Floating-point operations of the products of one time.")
    seconds: float | None = Field(description="Of one time, all of it by one process; null where nothing was timed.")
    share: float = Field(1.0, description="How much of it the busiest worker does; all of it where there are none.")
    passes: int = Field(
        1, description="How often all blocks of a streamed model come from disk in one time, for each who has a share."
    )


class Pricing(NamedTuple):
    """What steps are priced by."""

    flops: Prices
    """Those that have none cost nothing."""
    seconds: Prices | None
    """None where nothing was timed."""

    def step(self, name: str, how: str, times: int, share: float, done: Mapping[str, float], passes: int = 1) -> Work:
        """`done` is how often each thing is done that has a price; the others are as in `Work`."""
        operations = sum(often * self.flops.get(thing, 0.0) for thing, often in done.items())
        seconds = self.seconds
        took = None if seconds is None else sum(often * seconds[thing] for thing, often in done.items())
        return Work(name=name, how=how, times=times, flops=operations, seconds=took, share=share, passes=passes)


def price_flops(settings: WorkbenchSettings, layers: Sequence[Layer], counts: Counts, course: Course) -> Prices:
    """In floating-point operations of products; what has none costs nothing."""
    forms = [tuple(layer.weight_OI.shape) for layer in layers]
    squares = sum(_count_tokens(layer, counts) * layer.weight_OI.shape[1] ** 2 for layer in list_readers(layers))
    weights = sum(_count_tokens(layer, counts) * layer.weight_OI.numel() for layer in layers)
    often = {(o, i): forms.count((o, i)) for o, i in forms}
    prices = {
        "forward": counts.forward,
        "moments": 2.0 * settings.window * squares,
        "gradients": counts.forward + counts.head + 2 * (counts.backward + counts.head),
        "curves": 2.0 * settings.window * weights * (1 + len(LEVELS)),
        "loss": counts.head,
        "divergence": 2 * counts.head,
        "write": counts.forward + counts.head,
    }
    for recipe, _ in course.pruned:
        prices[f"prune {name_recipe(recipe)}"] = sum(n * count_flops(recipe, form) for form, n in often.items())
    for recipe in course.curves:
        prices[f"cut {name_recipe(recipe)}"] = sum(
            n * count_flops(recipe, form, levels=True) for form, n in often.items()
        )
    return prices


def _count_tokens(layer: Layer, counts: Counts) -> float:
    """How many of a text's tokens a layer sees, as a share."""
    return counts.routed if layer.pool else 1


def price_seconds(times: Times) -> Prices:
    """In seconds of one process."""
    steps = times.steps
    return {
        "forward": steps.forward,
        "moments": max(steps.statistics - steps.forward, 0.0),
        "gradients": steps.gradients,
        "curves": steps.curves.each,
        "cut masks": steps.curves.fixed,
        "describe": steps.describe,
        "loss": steps.loss,
        "divergence": steps.divergence,
        "word": steps.word,
        "write": steps.write,
        "write moments": times.write * times.moments,
        "read moments": times.read * times.moments,
        **{f"prune {label}": seconds for label, seconds in times.prune.items()},
        **{f"cut {label}": seconds for label, seconds in times.cut.items()},
    }
