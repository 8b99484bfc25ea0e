"""The registry of methods: how the weights of a layer are chosen, once it is known how many of them go.

What each does to a weight is the function of that name in `billhook_kernels.methods`. A method more is a line
here and a function there: what planners, flags, help and tables say of methods is made from this list.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal, NamedTuple

REFIT_STEPS = 5
"""Steps in which a method grows its mask, unless a recipe says otherwise."""

MOST_STEPS = 10
"""The most that a recipe may ask for."""

MOST_DAMPING = 10.0
"""The most of its mean square that a recipe may add to an input's."""

PROFILED = "two-sided"
"""The method whose mask, without anything else, the KL curves of every profile are about."""

Statistics = Literal["dense", "sequential"]
"""What the inputs of layers are taken from: the dense model, all layers at once; or block by block from behind
pruned predecessors."""


class Method(NamedTuple):
    """One entry."""

    name: str
    sentence: str
    """What it does, for planners and in help, without a full stop."""
    changes_survivors: bool = False
    """Whether the weights that stay end as others than the dense model's."""
    refits_in_steps: bool = False
    """Whether its mask grows in `refit_steps` steps, the survivors refitted after each: no refit follows it."""
    weighs_outputs: bool = False
    """Whether gamma, the mean squared gradients of a layer's outputs, has a say in which weights go."""
    ours: bool = False
    """Whether it is Billhook's own; the others, which are baselines, stand before it wherever methods are compared."""
    also_refitted: bool = False
    """Whether `--recipes all` of tools.compare has it with a refit after it, too."""
    lever: bool = True
    """Whether planners are told of it; opponents that only a comparison has a use for are not."""
    statistics: Statistics = "dense"
    """What its authors take the inputs of layers from.

    The loops of Wanda and SparseGPT run block by block: a forward of the block as it is, still dense, whose inputs all
    of its layers are pruned by, then a second one of the pruned block, whose outputs the next block reads
    (`prune_wanda` and `prune_sparsegpt` in lib/prune.py of locuslab/wanda; `llama_sequential` in llama.py of
    IST-DASLab/sparsegpt, without its --true-sequential). ALPS' loop is the same (`llama_sequential` in llama.py of
    mazumder-lab/ALPS). OWL and AlphaPruning prune by them, too; what OWL shares out by is measured in a walk of its own
    before, of the dense model (`prune_wanda_outlier` in lib/prune_all.py of luuyin/OWL)."""


METHODS = {
    method.name: method
    for method in (
        Method("magnitude", "|W| within the layer"),
        Method("wanda", "|W|*sqrt(a) within each output row", statistics="sequential"),
        Method("two-sided", "W^2*a*gamma within the layer", weighs_outputs=True, ours=True, also_refitted=True),
        Method(
            "alps",
            "ALPS, the whole mask by ADMM, then a fit of survivors",
            changes_survivors=True,
            lever=False,
            statistics="sequential",
        ),
        Method("sparsegpt", "survivors corrected column by column", changes_survivors=True, statistics="sequential"),
        Method(
            "two-sided-obs",
            "survivors corrected column by column",
            changes_survivors=True,
            weighs_outputs=True,
            ours=True,
        ),
        Method(
            "refit",
            "the two-sided mask grown in steps, survivors refitted between; slowest",
            changes_survivors=True,
            refits_in_steps=True,
            weighs_outputs=True,
            ours=True,
        ),
    )
}
"""By name, in the order in which planners are told of those that are levers."""

LEVERS = {name: method for name, method in METHODS.items() if method.lever}
"""Those that planners choose from."""

if TYPE_CHECKING:
    MethodName = str
else:
    MethodName = Literal[tuple(METHODS)]


def name_sequential(methods: Iterable[Method]) -> str:
    """Those whose authors take sequential statistics, for people: `wanda and sparsegpt`."""
    *names, last = (method.name for method in methods if method.statistics == "sequential")
    return f"{', '.join(names)} and {last}" if names else last
