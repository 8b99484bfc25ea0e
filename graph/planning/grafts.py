"""Plans that take layers of two earlier rounds as they are: which can be had, and what they come to."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from graph.config import RunConfig
from graph.planning.plan import Plan
from graph.state import Trial
from tools.base.errors import ImpossiblePlan
from tools.plans.allocate import describe_zeros
from tools.plans.budget import SAME_SPARSITY
from tools.plans.graft import Graft, describe_graft, refuse_gone
from tools.plans.layer_profile import LayerProfile
from tools.plans.selectors import select_layers
from tools.plans.work_order import WorkOrder

if TYPE_CHECKING:
    from tools.workbench.checkpoints import Taken


def list_at_hand(trials: Sequence[Trial], kept: Collection[str]) -> dict[int, Trial]:
    """The trials whose layers are on disk, those of the `kept` checkpoints, by their rounds."""
    return {trial.iteration: trial for trial in trials if trial.measured and trial.checkpoint in kept}


@dataclass(frozen=True)
class Grafts:
    """What may be taken of earlier rounds."""

    list_at_hand: Callable[[], Mapping[int, Trial]] = dict
    """The trials whose layers are on disk, by their rounds."""
    read: Callable[[str], Mapping[str, "Taken"]] = lambda checkpoint: {}
    """The layers of a checkpoint."""
    _read: dict[str, Mapping[str, "Taken"]] = field(default_factory=dict)

    def dress(self, plan: Plan, graft: Graft) -> Plan:
        """The plan with the recipe that most of its layers were made by, whatever it said of one, and without factors
        of lessons, which nothing of it goes by."""
        rest = self.list_at_hand().get(graft.rest)
        recipe = rest.recipe if rest and rest.recipe else plan.recipe
        return plan.model_copy(update={"recipe": recipe, "multipliers": {}})

    def resolve(
        self, plan: Plan, graft: Graft, layers: Sequence[LayerProfile], config: RunConfig, line: str
    ) -> WorkOrder:
        """The order that takes the layers, whose predicted KL is by the curves of `layers`. Raises ImpossiblePlan."""
        at_hand = self.list_at_hand()
        refuse_gone(graft, at_hand)
        if plan.groups or plan.adjustments or plan.expression:
            raise ImpossiblePlan("a graft takes layers as they are; leave groups, adjustments and expression out")
        chosen = set(select_layers(graft.selector, layers))
        if len(chosen) == len(layers):
            raise ImpossiblePlan(
                f"graft {graft.selector!r} is every layer, which is round {graft.of} itself; name fewer"
            )
        of, rest = (self._list_layers(at_hand[number].checkpoint) for number in (graft.of, graft.rest))
        differ = {name for name in of if of[name].artifact != rest[name].artifact}
        if not differ & chosen or differ <= chosen:
            whose = f"those of {graft.selector!r}" if not differ & chosen else f"all but those of {graft.selector!r}"
            itself = graft.of if differ & chosen else graft.rest
            raise ImpossiblePlan(
                f"{whose} are the same layers in rounds {graft.of} and {graft.rest}: this is round {itself} itself"
            )
        taken = {layer.name: (of if layer.name in chosen else rest)[layer.name].order for layer in layers}
        shared = describe_zeros(layers, {name: order.zeros for name, order in taken.items()})
        _refuse_other_budget(shared.zeros, plan, graft, layers, config)
        return WorkOrder(layers=taken, sparsity=shared.sparsity, predicted_kl=shared.predicted_kl, line=line)

    def _list_layers(self, checkpoint: str) -> Mapping[str, "Taken"]:
        if checkpoint not in self._read:
            self._read[checkpoint] = self.read(checkpoint)
        return self._read[checkpoint]


def _refuse_other_budget(
    zeros: Mapping[str, int], plan: Plan, graft: Graft, layers: Sequence[LayerProfile], config: RunConfig
) -> None:
    """Raises ImpossiblePlan where the zeros that two rounds bring together are not those of the plan.

    Not one may be missing, so that nothing is won by pruning less; as many more may be there as verdicts call the same
    sparsity. Where a pattern says how many there are, a plan may name its sparsity that roughly either way.
    """
    total, found = sum(layer.weights for layer in layers), sum(zeros.values())
    wanted, most = round(plan.sparsity * total), int(SAME_SPARSITY * total)
    if -(most if config.pattern else 0) <= found - wanted <= most:
        return
    more = f"{abs(found - wanted):,} {'more' if found > wanted else 'fewer'}"
    raise ImpossiblePlan(
        f"{describe_graft(graft)} have {found:,} zeros together, {more} ({(found - wanted) / total:+.3%}) than the "
        f"{wanted:,} of {plan.sparsity:.2%}; none may be missing, and {most:,} at most be more"
    )
