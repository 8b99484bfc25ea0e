"""What a run is expected to do, before there is a model."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from tools.base.settings import WorkbenchSettings
from tools.plans.recipe import Recipe


class CutCourse(NamedTuple):
    """What a run is expected to do that takes parts away."""

    rounds: int
    size: float
    """Share of the model's bytes that is to stay; 0 where a speed is asked for."""
    align: int
    """Of what the neurons that stay are a multiple."""


class Course(NamedTuple):
    """What a run is expected to do."""

    rounds: Sequence[Recipe]
    """What the plan of each round asks for."""
    baselines: Sequence[Recipe] = ()
    """By what the model is pruned besides, to be measured on the test text alone."""
    reweighted: Sequence[Recipe] = ()
    """What the kept plan asks for, each time that it is carried out again by other weights of texts."""
    profiles: int = 1
    tests: int = 0
    """Models that are measured on the test text."""
    finalists: int = 0
    """Models that are compared once more on validation text at the end, at most."""
    prompts: int = 0
    """That a model goes on with."""
    continuing: int = 0
    """Models that go on with them."""
    polishes: Sequence[int] = ()
    """Tokens of each polish."""
    polished_at: float = 0.0
    """The least sparsity that is polished."""
    standing: Sequence[Recipe] = ()
    """Those of the rounds that find their pruned model there, to be polished."""
    cut: CutCourse | None = None
    """What is done where parts go, in place of the rounds and profiles."""
    checkpoints: int | None = None
    """Whose layers lie on disk at once, at most; None: as many as `count_checkpoints` has it."""

    @property
    def trials(self) -> int:
        """Rounds of either kind."""
        return len(self.rounds) + (self.cut.rounds if self.cut else 0)

    @property
    def pruned(self) -> list[tuple[Recipe, int]]:
        """What is done inside the layers, and how often."""
        asked = [*self.rounds, *self.reweighted, *self.baselines]
        times = Counter(name_exactly(recipe.exact_label, recipe) for recipe in asked)
        times.subtract(name_exactly(recipe.exact_label, recipe) for recipe in self.standing)
        by_label = {name_exactly(recipe.exact_label, recipe): recipe for recipe in asked}
        return [(recipe, times[label]) for label, recipe in by_label.items()]

    @property
    def curves(self) -> list[Recipe]:
        """The recipes whose own KL curves are measured; those of `refit` where none of them are, but for a cut."""
        plain = {"statistics": "dense"}  # curves are the dense model's whatever comes of the weights
        asked = {x.model_copy(update=plain).exact_label: x for x in self.rounds if x.needs_curves}
        return list(asked.values()) or ([] if self.cut else [Recipe()])

    def count_texts(self, settings: WorkbenchSettings) -> int:
        """Calibration texts that are profiled apart: the run's, and questions where a plan mixes these in."""
        return 1 + any(recipe.mix and settings.mixes_questions for recipe in self.rounds)

    def count_fitted(self, settings: WorkbenchSettings) -> int:
        """Calibration windows that a polish may be on, at most."""
        return settings.count_fitted() * self.count_texts(settings)

    def count_survivors(self, weights: int) -> int:
        """Of so many weights, those that a polish is of, at most."""
        return weights - math.floor(self.polished_at * weights)


def name_recipe(recipe: Recipe) -> str:
    """What is done inside a layer, whatever text and order its statistics come from."""
    asked = {"mix": (), "statistics": "dense", "gamma": "plain"}
    plain = recipe.model_copy(update=asked)
    return name_exactly(plain.exact_label, recipe)


def name_exactly(label: str, recipe: Recipe) -> str:
    """A label of a recipe with its pattern."""
    return f"{label} to {recipe.pattern}" if recipe.pattern else label
