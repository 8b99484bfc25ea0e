"""FLAP: scores, ranking and compensation against NumPy in float64, and masked models against narrow arithmetic."""

from typing import Any

import numpy as np
import pytest
import torch

from tests.cuts import IDS, compute_logits, make_config, make_model, read_inputs
from tests.tiny import make_tiny_model
from tools.base.errors import UserError
from tools.base.progress import ignore_progress
from tools.surgery.flap import Narrowed, build_narrowed, check_narrowed, rank_units, score_units
from tools.surgery.parts import KINDS, Part, count_weights, find_parts


def list_parts(model: Any) -> list[Part]:
    return [part for kind in KINDS for part in find_parts(model, kind)]


def score_slowly(part: Part, x: Any) -> Any:
    """The authors' metric WIFV of each unit, standardised within the layer; x is (tokens, channels), float64."""
    weight = part.output.weight_OI.double().numpy()
    metric = np.array([x[:, j].var() * (weight[:, j] ** 2).sum() for j in range(x.shape[1])])
    metric = metric**2 if part.kind == "heads" else metric
    standard = (metric - metric.mean()) / metric.std(ddof=1)
    return standard.reshape(part.units, -1).mean(axis=1)


def rank_slowly(parts: list[Part], scores: list[Any], remove: float) -> list[list[int]]:
    """The units of each part that stay: from the highest down until the weights are nearest to the share that stays."""
    ranked = sorted(
        ((-score, place, unit) for place, own in enumerate(scores) for unit, score in enumerate(own)),
    )
    total = sum(part.unit_weights * part.units for part in parts)
    spent, best, kept = 0, abs(total * (1 - remove)), 0
    for count, (_, place, _) in enumerate(ranked, 1):
        spent += parts[place].unit_weights
        if abs(spent - total * (1 - remove)) < best:
            best, kept = abs(spent - total * (1 - remove)), count
    return [sorted(unit for _, where, unit in ranked[:kept] if where == place) for place in range(len(parts))]


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("remove", [0.1, 0.45])
def test_scores_ranking_and_shifts_are_those_of_float64(architecture: str, remove: float) -> None:
    model = make_tiny_model(architecture)
    parts = list_parts(model)
    inputs = [read_inputs(model, part.output.module) for part in parts]
    scores = [score_slowly(part, x) for part, x in zip(parts, inputs, strict=True)]
    for part, x, slow in zip(parts, inputs, scores, strict=True):
        found = score_units(part, torch.from_numpy(x.var(axis=0)))
        np.testing.assert_allclose(found, slow, rtol=1e-9, atol=1e-12)
    stays = rank_slowly(parts, scores, remove)
    ranking = rank_units(model, remove, IDS, ignore_progress)
    found_units = {id(entry.part.output.module): entry.units.tolist() for entry in ranking.narrowed}
    for part, x, units in zip(parts, inputs, stays, strict=True):
        assert found_units.get(id(part.output.module), list(range(part.units))) == units
        for entry in (n for n in ranking.narrowed if n.part.output.module is part.output.module):
            gone = np.repeat(~np.isin(np.arange(part.units), units), x.shape[1] // part.units)
            shift = part.output.weight_OI.double().numpy()[:, gone] @ x[:, gone].mean(axis=0)
            np.testing.assert_allclose(entry.shift_O, shift, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("remove", [0.05, 0.2, 0.45, 0.7])
def test_the_share_that_goes_is_as_asked_as_nearly_as_units_allow(remove: float) -> None:
    model = make_tiny_model("llama")
    ranking = rank_units(model, remove, IDS, ignore_progress)
    gone = sum((entry.part.units - len(entry.units)) * entry.part.unit_weights for entry in ranking.narrowed)
    assert ranking.removed == pytest.approx(gone / count_weights(model), abs=1e-15)
    largest = max(part.unit_weights for part in list_parts(model))
    assert abs(gone - remove * count_weights(model)) <= largest / 2


def test_blocks_end_with_widths_of_their_own() -> None:
    ranking = rank_units(make_tiny_model("llama"), 0.3, IDS, ignore_progress)
    widths = [(part.kind, part.block, len(units)) for part, units, _ in ranking.narrowed]
    assert widths == [("heads", 1, 1), ("neurons", 0, 29), ("neurons", 1, 31)]


def test_with_nothing_removed_the_model_is_the_same_to_the_bit() -> None:
    model = make_tiny_model("llama")
    ranking = rank_units(model, 0.0, IDS, ignore_progress)
    assert (ranking.narrowed, ranking.removed) == ([], 0.0)
    built = build_narrowed(model, ranking.narrowed)
    assert built is not model and torch.equal(compute_logits(built), compute_logits(model))


@pytest.mark.parametrize(("architecture", "options"), [("llama", {"attention_bias": True}), ("qwen3", {})])
def test_the_model_computes_what_narrow_layers_with_a_bias_would(architecture: str, options: dict[str, Any]) -> None:
    model = make_model(make_config(architecture, **options))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    dense = compute_logits(model)
    ranking = rank_units(model, 0.4, IDS, ignore_progress)
    assert {entry.part.kind for entry in ranking.narrowed} == {"heads", "neurons"}
    found = compute_logits(build_narrowed(model, ranking.narrowed))
    check_narrowed(model, ranking.narrowed, IDS[0])
    assert torch.equal(compute_logits(model), dense), "the dense model has no hooks"
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        for part, units, shift_O in ranking.narrowed:  # as the authors' masks: rows are zero, and a bias is added
            gone = torch.ones(part.units, dtype=torch.bool).scatter_(0, units, False)
            for layer in part.inputs:
                for parameter in layer.module.parameters():
                    parameter.unflatten(0, (part.units, -1))[gone] = 0
            own = part.bias
            part.output.module.bias = torch.nn.Parameter(shift_O if own is None else own + shift_O)
    torch.testing.assert_close(found, compute_logits(model), rtol=1e-4, atol=1e-4)
    assert not torch.equal(found, dense)


def test_where_all_units_of_a_part_go_its_mean_output_stays() -> None:
    model = make_tiny_model("llama")
    part = find_parts(model, "neurons")[0]
    mean = torch.from_numpy(read_inputs(model, part.output.module).mean(axis=0))
    shift = (part.output.weight_OI.double() @ mean).float()
    built = build_narrowed(model, [Narrowed(part, torch.arange(0), shift)])
    seen: list[torch.Tensor] = []
    built.get_submodule(part.output.name).register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    compute_logits(built)
    torch.testing.assert_close(seen[0], shift.expand_as(seen[0]), rtol=0, atol=0)


def test_rows_in_another_order_are_refused() -> None:
    model = make_tiny_model("llama")
    part = find_parts(model, "heads")[0]
    swapped = (*part.inputs[:2], find_parts(model, "heads")[1].inputs[2])
    wrong = Narrowed(Part("heads", 0, part.units, swapped, part.output), torch.tensor([0]), torch.zeros(32))
    with pytest.raises(UserError, match=r"^the heads or neurons of LlamaForCausalLM lie in an order that is not supp"):
        check_narrowed(model, [wrong], IDS[0])


def test_models_without_heads_of_their_own_are_refused() -> None:
    with pytest.raises(UserError, match=r"^the heads of GPT2LMHeadModel cannot be cut: "):
        rank_units(make_tiny_model("gpt2"), 0.2, IDS, ignore_progress)
