"""All that any planner may know when it plans a round."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from graph.config import RunConfig
from graph.planning.plan import Plan
from graph.reflecting.schema import Lesson
from graph.state import SAME_SPARSITY, Trial
from tools.plans.layer_profile import LayerProfile
from tools.plans.recipe import Recipe


@dataclass(frozen=True)
class Situation:
    """All that a planner may know when it plans a round."""

    config: RunConfig
    layers: Sequence[LayerProfile]
    """The profile, in the model's order."""
    sparsity: dict[str, float]
    """Layer name to the share of its weights that are zero in the last accepted weights; may be empty."""
    dense: Trial
    accepted: Trial | None = None
    """The last trial that was kept."""
    accepted_plan: Plan | None = None
    """The plan that made it."""
    trials: Sequence[Trial] = field(default=())
    lessons: Sequence[Lesson] = field(default=())
    iteration: int = 1
    """Number of the round to plan, from 1."""
    is_last: bool = False
    """Whether the run ends after this round, unless it improves on what was kept at the target."""
    read_layers: Callable[[Recipe], Sequence[LayerProfile]] | None = None
    """The profile with what a recipe's allocation needs beside KL curves; without it, what `layers` says must do."""
    find_trial: Callable[[Plan], Trial | None] | None = None
    """The trial in which a plan was tried already, or refused; without it, none was."""
    untried: Sequence[Plan] = field(default=())
    """What the rule would try next at the target, likeliest first."""

    @property
    def at_target(self) -> bool:
        """Whether what was kept last has the target sparsity, so that rounds go on to lower its KL."""
        return self.accepted is not None and self.accepted.sparsity >= self.config.target_sparsity - SAME_SPARSITY
