"""What is to be compared: labels of recipes and sparsities, read into one job for each row of the table."""

import re
from collections.abc import Sequence
from typing import NamedTuple

from tools.base.errors import UserError
from tools.plans.methods import METHODS
from tools.plans.pattern import parse_pattern
from tools.plans.recipe import Recipe, parse_recipe
from tools.plans.rules import ALLOCATIONS, UNIFORM, WAYS_OF_PARTS, Kind, name_allocations


def _list_all_methods() -> list[str]:
    """Every method, some with a refit behind them, too: baselines first, and what ends refitted last."""
    refitted = [(method.ours, True, f"{method.name}+refit") for method in METHODS.values() if method.also_refitted]
    plain = [(method.ours, method.refits_in_steps, method.name) for method in METHODS.values()]
    return [name for _, _, name in sorted([*refitted, *plain], key=lambda entry: entry[:2])]


ALL_METHODS = _list_all_methods()
ALL_ALLOCATIONS = sorted(name_allocations("rule", "search"), key=lambda name: ALLOCATIONS[name].ours)
"""What `all` means: every method with every allocation, baselines before what is Billhook's own."""

STRUCTURED = "structured"
"""What stands in the place of a method where whole parts of the model go."""


LABELS_OF_PARTS = {
    f"{STRUCTURED}{'' if way.published else '[+refit]'}:{name}": way.sentence for name, way in WAYS_OF_PARTS.items()
}
"""How recipes of whole parts are written, and what each does."""


class PartsRecipe(NamedTuple):
    """What is done where whole parts of the model go."""

    name: str
    """How it is chosen which parts go: one of WAYS_OF_PARTS."""
    parts: tuple[str, ...]
    """Kinds of parts: neurons, heads or blocks, or the hidden width."""
    refit: bool
    """Whether what stays is refitted."""


class Job(NamedTuple):
    """One row to be made."""

    label: str
    kind: Kind
    """How it is decided what goes."""
    recipe: Recipe | PartsRecipe
    """Of a search the allocation is the one that it begins from."""
    sparsity: float

    @property
    def key(self) -> tuple[str, float, str]:
        """What tells rows apart."""
        return self.label, self.sparsity, self.pattern

    @property
    def polishes(self) -> tuple[str, float, str] | None:
        """The key of the row whose model this one polishes; None where it polishes none, or searches for its own."""
        if not isinstance(self.recipe, Recipe) or not self.recipe.polish or self.kind == "search":
            return None
        pruned = self.recipe.model_copy(update={"polish": False, "polish_tokens": 0})
        return pruned.label, self.sparsity, self.pattern

    @property
    def pattern(self) -> str:
        """N:M, or empty."""
        return self.recipe.pattern if isinstance(self.recipe, Recipe) else ""

    @property
    def title(self) -> str:
        """For people, such as `refit:kappa at 45%`."""
        return f"{self.label} at {name_target(self.sparsity, self.pattern)}"

    @property
    def method(self) -> str:
        """The label's part before the colon."""
        return self.label.partition(":")[0]

    @property
    def allocation(self) -> str:
        """The label's part behind the colon."""
        return self.label.partition(":")[2]


def list_jobs(recipes: str, sparsities: str, polish_tokens: int = 0) -> list[Job]:
    """The rows asked for, in order; those with `+polish` alone polish on so many tokens, and say so.

    Raises UserError in one line for a recipe or a sparsity that there is not, and for a polish on no tokens.

    With a pattern every layer gets the same, so that allocations make no difference: each method is one row.
    """
    every = [f"{method}:{allocation}" for allocation in ALL_ALLOCATIONS for method in ALL_METHODS]
    labels = [label for part in _split(recipes) for label in (every if part == "all" else [part])]
    if not labels:
        raise UserError("no recipe is given; try --recipes wanda:uniform,refit:kappa")
    targets = [_parse_sparsity(part) for part in _split(sparsities)]
    if not targets:
        raise UserError("no sparsity is given; try --sparsity 0.45")
    jobs: dict[tuple[str, float, str], Job] = {}
    for sparsity, pattern in targets:
        for label in labels:
            job = _make_job(label, sparsity, pattern, polish_tokens)
            if not (job.kind == "parts" and pattern):
                jobs.setdefault(job.key, job)
    if not jobs:
        raise UserError("patterns are not for structured recipes; try --sparsity 0.2")
    return list(jobs.values())


def is_ours(label: str) -> bool:
    """Whether a row is no baseline: its method, or how the zeros or the parts are shared out, is Billhook's own."""
    done, _, shared = label.partition(":")
    method = re.split("[+~]", done)[0]
    if method == STRUCTURED:
        return WAYS_OF_PARTS[shared].ours
    return METHODS[method.rstrip("0123456789")].ours or ALLOCATIONS[re.split("@|-mask", shared)[0]].ours


def list_standing(jobs: Sequence[Job]) -> list[Job]:
    """Those whose model was pruned for a row before them, with nothing but other polishes of it in between."""
    standing: list[Job] = []
    under: Job | None = None
    for job in jobs:
        if under and job.polishes == under.key:
            standing.append(job)
        else:
            under = job
    return standing


def name_target(sparsity: float, pattern: str) -> str:
    """For people: the pattern, or the sparsity in percent."""
    return pattern or f"{100 * sparsity:g}%"


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _parse_sparsity(text: str) -> tuple[float, str]:
    """(fraction, pattern or "")."""
    try:
        if ":" in text:
            pruned, group = parse_pattern(text)
            return pruned / group, f"{pruned}:{group}"
        sparsity = float(text)
    except ValueError as error:
        raise UserError(f"sparsity {text!r} is neither a fraction such as 0.45 nor a pattern such as 2:4") from error
    if not 0 < sparsity < 1:
        raise UserError(f"sparsity {text!r} must lie between 0 and 1, such as 0.45")
    return sparsity, ""


def _make_job(label: str, sparsity: float, pattern: str, polish_tokens: int) -> Job:
    method, _, allocation = label.partition(":")
    if method.partition("+")[0] == STRUCTURED:
        return Job(label, "parts", _parse_parts_recipe(label), sparsity)
    searches = allocation in name_allocations("search")
    shared = allocation.partition("@")[0].removesuffix("-mask")
    if shared and shared not in (known := name_allocations("rule", "search")):
        raise UserError(f"recipe {label!r}: there is no allocation {shared!r}; there are {', '.join(known)}")
    try:
        recipe = parse_recipe(f"{method}:{UNIFORM}" if searches else label)
        recipe = recipe.model_copy(update={"polish_tokens": recipe.count_polish(polish_tokens)})
    except ValueError as error:
        raise UserError(str(error)) from error
    if pattern:
        recipe = recipe.model_copy(update={"pattern": pattern, "allocation": UNIFORM, "strength": 1.0})
    elif searches:
        recipe = _take_search_statistics(label, recipe)
        return Job(f"{recipe.mask_label}{recipe.polish_label}:{allocation}", "search", recipe, sparsity)
    return Job(recipe.label, "rule", recipe, sparsity)


def _take_search_statistics(label: str, recipe: Recipe) -> Recipe:
    """The recipe with dense statistics, whatever its method's own: a search has these, and its row is named by them.

    EvoPress searches among layers that were pruned once, each to several sparsities, behind dense predecessors:
    FastOBCPruner (src/pruner.py of IST-DASLab/EvoPress) saves them and leaves the weights that the next block's inputs
    pass through as they are. Raises UserError for other statistics.
    """
    if "~sequential" in label:
        raise UserError(
            f"recipe {label!r}: a search prunes layers by dense statistics, as EvoPress does; leave ~sequential out"
        )
    return recipe.model_copy(update={"statistics": "dense"})


def _parse_parts_recipe(label: str) -> PartsRecipe:
    method, _, allocation = label.partition(":")
    refit = method == f"{STRUCTURED}+refit"
    way = WAYS_OF_PARTS.get(allocation)
    if (method != STRUCTURED and not refit) or way is None or (way.published and refit):
        raise UserError(f"recipe {label!r} is none of {', '.join(LABELS_OF_PARTS)}")
    return PartsRecipe(allocation, way.parts, refit)
