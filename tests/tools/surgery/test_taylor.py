"""LLM-Pruner: scores against the loss of transformers itself, and which units of which blocks go."""

import pytest
import torch

from tests.cuts import IDS, compute_logits, make_config, make_model
from tests.tiny import make_tiny_model
from tools.base.errors import UserError
from tools.base.progress import ignore_progress
from tools.surgery.flap import build_narrowed, check_narrowed
from tools.surgery.parts import KINDS, count_weights, find_parts
from tools.surgery.taylor import rank_by_gradient

ROWS = IDS[:, :40]
"""Four runs of fewer than 64 tokens, all of which are examples."""


def score_slowly(model: object, kind: str, block: int) -> torch.Tensor:
    """The sum of |w dL/dw| of each unit, by one backward pass of the model's own loss."""
    copied = make_model(model.config).double()  # type: ignore[attr-defined]
    for parameter in copied.parameters():
        parameter.requires_grad_(True)
    copied(input_ids=ROWS, labels=ROWS).loss.backward()
    part = find_parts(copied, kind)[block]  # type: ignore[arg-type]
    found = torch.zeros(part.units, dtype=torch.float64)
    for layer in (*part.inputs, part.output):
        salience = (layer.module.weight * layer.module.weight.grad).abs().detach()  # type: ignore[operator, union-attr]
        for unit in range(part.units):
            along = salience if layer is not part.output else salience.T
            width = len(along) // part.units
            found[unit] += along[unit * width :][:width].sum()
    return found


@pytest.mark.parametrize(("remove", "gone"), [(0.2, {"heads": 0, "neurons": 18}), (0.45, {"heads": 1, "neurons": 25})])
def test_the_lowest_scored_units_of_the_inner_blocks_go(remove: float, gone: dict[str, int]) -> None:
    model = make_model(make_config("llama", num_hidden_layers=8))
    ranking = rank_by_gradient(model, remove, ROWS, ignore_progress)
    for kind in KINDS:
        found = {entry.part.block: entry.units.tolist() for entry in ranking.narrowed if entry.part.kind == kind}
        assert list(found) == (list(range(1, 8)) if gone[kind] else []), "an eighth of the depth stays whole"
        for block, units in found.items():
            scores = score_slowly(model, kind, block)
            assert units == sorted(scores.argsort()[gone[kind] :].tolist())
    weights = sum((e.part.units - len(e.units)) * e.part.unit_weights for e in ranking.narrowed)
    assert ranking.removed == weights / count_weights(model)
    assert abs(ranking.removed - remove) <= 0.06
    check_narrowed(model, ranking.narrowed, IDS[0])
    assert not torch.equal(compute_logits(build_narrowed(model, ranking.narrowed)), compute_logits(model))
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_blocks_at_both_ends_stay_whole() -> None:
    model = make_model(make_config("llama", num_hidden_layers=16))
    ranking = rank_by_gradient(model, 0.3, ROWS, ignore_progress)
    assert {entry.part.block for entry in ranking.narrowed} == set(range(2, 15))


@pytest.mark.parametrize(
    ("remove", "message"),
    [
        (0.9, r"^0.9 is too much to remove: .* is the most that can go here$"),
        (0.001, r"^0.001 is too little to remove: "),
    ],
)
def test_what_cannot_go_is_refused(remove: float, message: str) -> None:
    with pytest.raises(UserError, match=message):
        rank_by_gradient(make_tiny_model("llama"), remove, ROWS, ignore_progress)


def test_models_without_heads_of_their_own_are_refused() -> None:
    with pytest.raises(UserError, match=r"^the heads of GPT2LMHeadModel cannot be cut: "):
        rank_by_gradient(make_tiny_model("gpt2"), 0.2, ROWS, ignore_progress)
