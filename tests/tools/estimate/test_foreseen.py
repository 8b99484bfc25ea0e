"""What pruning will take is foreseen from a few rows of each form; no second is asserted that a clock gave."""

import torch

from tests.tools.estimate.test_block import make_empty
from tools.estimate.foreseen import foresee_paces
from tools.models.layers import find_layers
from tools.plans.recipe import Recipe, parse_recipe

CPU = torch.device("cpu")
MASKS, REFIT = Recipe(method="two-sided", refit=False), parse_recipe("refit:kappa")


def test_each_layer_counts_and_what_layers_share_once_for_those_that_read_the_same(a_second_each: list[str]) -> None:
    layers = find_layers(make_empty("llama"))
    group = {layer.name: layer.name for layer in layers}
    for one, other in (("q_proj", "k_proj"), ("q_proj", "v_proj"), ("gate_proj", "up_proj")):
        group |= {name.replace(one, other): name for name in group if name.endswith(one)}
    assert foresee_paces(layers, group, CPU, [MASKS, REFIT]) == {
        "pruning by two-sided": 14,
        "pruning by refit": 14 + 2 * 4,
        "measuring curves of refit": 14 + 2 * 4,
    }
    alone = foresee_paces(layers, {}, CPU, [REFIT])
    assert alone["pruning by refit"] == 14 + 14, "each reads a tensor of its own"


def test_curves_that_are_known_or_not_asked_for_take_nothing(a_second_each: list[str]) -> None:
    layers = find_layers(make_empty("llama"))
    known = [parse_recipe("refit:kappa-mask"), REFIT.model_copy(update={"pattern": "2:4"})]
    assert list(foresee_paces(layers, {}, CPU, known)) == ["pruning by refit"]
