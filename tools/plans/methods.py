"""The registry of methods: how the weights of a layer are chosen, once it is known how many of them go.

What each does to a weight is the function of `kernels.methods` that goes by the same name. A method more is a line
here and a function there: what planners, flags, help and tables say of methods is made from this list.
"""

from typing import TYPE_CHECKING, Literal, NamedTuple

REFIT_STEPS = 5
"""Steps in which a method grows its mask, unless a recipe says otherwise."""

MOST_STEPS = 10
"""The most that a recipe may ask for."""

PROFILED = "two-sided"
"""The method whose mask, without anything else, the KL curves of every profile are about."""


class Method(NamedTuple):
    """One entry."""

    name: str
    sentence: str
    """What it does, for planners and in help, without a full stop."""
    changes_survivors: bool = False
    """Whether the weights that stay end as others than the dense model's."""
    refits_in_steps: bool = False
    """Whether its mask grows in `refit_steps` steps, the survivors refitted after each: no refit follows it."""
    ours: bool = False
    """Whether it is Billhook's own; the others, which are baselines, stand before it wherever methods are compared."""
    also_refitted: bool = False
    """Whether `--recipes all` of tools.compare has it with a refit after it, too."""
    lever: bool = True
    """Whether planners are told of it; opponents that only a comparison has a use for are not."""


METHODS = {
    method.name: method
    for method in (
        Method("magnitude", "|W| within the layer"),
        Method("wanda", "|W|*sqrt(a) within each output row"),
        Method("two-sided", "W^2*a*gamma within the layer; usually the best mask", ours=True, also_refitted=True),
        Method("admm", "ADMM-Grad, zeros and survivors by ADMM as the mask grows", changes_survivors=True, lever=False),
        Method("alps", "ALPS, the whole mask by ADMM, then a fit of survivors", changes_survivors=True, lever=False),
        Method("sparsegpt", "survivors corrected column by column", changes_survivors=True),
        Method("two-sided-obs", "survivors corrected column by column", changes_survivors=True, ours=True),
        Method(
            "refit",
            "the two-sided mask grown in steps, survivors refitted between; the best and slowest",
            changes_survivors=True,
            refits_in_steps=True,
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
