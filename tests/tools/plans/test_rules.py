"""The registry of allocations; OWL and AlphaPruning as published; none of it needs torch."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from tests.profiles import KINDS, make_layers
from tools.base.errors import ImpossiblePlan
from tools.plans import rules
from tools.plans.allocate import Allocation, allocate
from tools.plans.layer_profile import LayerProfile
from tools.plans.recipe import Recipe, parse_recipe
from tools.plans.rules import ALLOCATIONS, RULES, UNIFORM, WAYS_OF_PARTS, rank_by_alpha, rank_by_outliers

OWL = Recipe(allocation="owl")
ALPHA = Recipe(allocation="alphapruning")
EVEN = Recipe(allocation=UNIFORM)


def test_every_entry_says_all_that_its_kind_needs() -> None:
    for name, way in (*ALLOCATIONS.items(), *WAYS_OF_PARTS.items()):
        assert name == way.name and way.sentence and not way.sentence.endswith(".")
        assert (way.share is not None) is (way.kind == "rule") is (RULES.get(name) is way)
        assert bool(way.parts) is (way.kind == "parts")
        assert not way.published or way.parts
        assert (WAYS_OF_PARTS.get(name) is way) is (way.kind == "parts")
        assert set(way.needs) <= set(LayerProfile.model_fields)
    assert {way.kind for way in ALLOCATIONS.values()} == {"rule", "search"}


def test_what_is_read_of_a_profile() -> None:
    for name, needs in {"kappa": "kappa", "owl": "outliers", "alphapruning": "alpha"}.items():
        recipe = parse_recipe(f"wanda:{name}")
        assert recipe.needs == (needs,) and recipe.reads_curves is (name == "kappa")
    assert EVEN.needs == () and not EVEN.reads_curves
    patterned = Recipe(pattern="2:4")
    assert patterned.needs == () and not patterned.reads_curves, "a pattern leaves nothing to share out"


def test_owl_keeps_most_where_outliers_are_most() -> None:
    np.testing.assert_allclose(rank_by_outliers(np.array([1.0, 3.0, 2.0])), [0, 0.16, 0.08])
    assert rank_by_outliers(np.array([2.0, 2.0])).tolist() == [0, 0]


def test_alphapruning_ranks_blocks_by_their_mean() -> None:
    alpha = np.array([2.0, 4.0, 5.0, np.nan, 4.0, 4.0])  # means 3, 5 and 4
    np.testing.assert_allclose(rank_by_alpha(alpha, [0, 0, 1, 1, 2, 2]), [0.7, 0.7, 1.3, 1.3, 1.0, 1.0])
    assert len(set(rank_by_alpha(np.array([2.0, 2.0]), [0, 1]))) == 1


def shares_of(allocation: Allocation, layers: Sequence[LayerProfile]) -> np.ndarray:
    return np.array([allocation.zeros[layer.name] / layer.weights for layer in layers])


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7])
def test_owl_is_the_published_formula_where_nothing_is_in_the_way(sparsity: float) -> None:
    layers = make_layers(blocks=6)  # all blocks are of one size, as the published shift has it
    outliers = np.array([layer.outliers for layer in layers[:: len(KINDS)]])
    keep = (outliers - outliers.min()) / (outliers.max() - outliers.min()) * 0.08 * 2
    published = np.repeat(1 - (keep - keep.mean() + 1 - sparsity), len(KINDS))
    np.testing.assert_allclose(shares_of(allocate(layers, sparsity, OWL), layers), published, atol=2e-4)


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7])
def test_alphapruning_is_the_published_formula_where_nothing_is_in_the_way(sparsity: float) -> None:
    layers = make_layers(blocks=6)
    alpha = np.array([layer.alpha for layer in layers]).reshape(6, -1).mean(1).repeat(len(KINDS))
    sizes = np.array([layer.weights for layer in layers])
    published = (alpha - alpha.min()) / (alpha.max() - alpha.min()) * 0.6 + 0.7
    published *= sizes.sum() * sparsity / (sizes * published).sum()
    np.testing.assert_allclose(shares_of(allocate(layers, sparsity, ALPHA), layers), published, atol=2e-4)


@pytest.mark.parametrize("recipe", [OWL, ALPHA])
def test_shares_are_moved_until_clipped_ones_are_made_up_for(recipe: Recipe) -> None:
    layers = make_layers()
    free = shares_of(allocate(layers, 0.65, recipe), layers)
    shares = shares_of(allocate(layers, 0.65, recipe, protect=["block 0"], max_layer_sparsity=0.9), layers)
    others = [i for i, share in enumerate(shares) if layers[i].block and share < 0.9 - 1e-3]
    assert 0 < len(others) < len(layers) - len(KINDS)
    if recipe is OWL:
        np.testing.assert_allclose(np.diff(shares[others]), np.diff(free[others]), atol=3e-4)
    else:
        np.testing.assert_allclose(shares[others] / free[others], (shares[others] / free[others]).mean(), atol=3e-4)


@pytest.mark.parametrize("recipe", [OWL, ALPHA])
def test_equal_blocks_get_equal_shares(recipe: Recipe) -> None:
    layers = [layer.model_copy(update={"outliers": 1.5, "alpha": 3.0}) for layer in make_layers()]
    assert allocate(layers, 0.45, recipe).zeros == allocate(layers, 0.45, EVEN).zeros


@pytest.mark.parametrize(
    ("recipe", "field", "sentence"),
    [
        (OWL, "outliers", "this profile has no shares of outliers, which allocation 'owl' needs; take another"),
        (ALPHA, "alpha", "this profile has no alpha of block 2, which allocation 'alphapruning' needs; take another"),
    ],
)
def test_a_profile_without_the_numbers(recipe: Recipe, field: str, sentence: str) -> None:
    layers = [layer.model_copy(update={field: None}) if layer.block == 2 else layer for layer in make_layers()]
    with pytest.raises(ImpossiblePlan, match=f"^{sentence}$"):
        allocate(layers, 0.45, recipe)


def test_planners_allocate_without_torch() -> None:
    rooms = ", ".join(f"tools.plans.{path.stem}" for path in Path(rules.__file__).parent.glob("[a-z]*.py"))
    code = f"import sys, {rooms}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])
