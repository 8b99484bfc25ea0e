"""What flows back in fp16: nothing is lost below or above what it holds."""

import tempfile
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.tiny import BLOCKS, VOCABULARY, make_tiny_model
from tools.base.errors import UnknownStatistics
from tools.models.blocks import Blocks
from tools.models.layers import find_layers
from tools.statistics import walks
from tools.statistics.gradients import LARGEST, Gradient, bring_near, flow_back, scale_losses
from tools.statistics.passage import Walk
from tools.statistics.shards import Sums
from tools.statistics.walks import Walks

LENGTH = 2048


def walk_down(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, head: float, embedding: float) -> tuple[float, Sums]:
    """(share of zeros in what flows back of the mean loss, all sums) of a window through a model of weights of fp16."""
    model = make_tiny_model("qwen3")
    model.get_output_embeddings().weight.mul_(head)
    model.get_input_embeddings().weight.mul_(embedding)
    model.half().to(dtype)
    ids_BT = torch.randint(0, VOCABULARY, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    counts: list[tuple[int, int]] = []
    mean = walks.mean_absolute_gradient

    def count(g_TO: Tensor, x_TI: Tensor) -> float:
        counts.append((int((g_TO == 0).sum()), g_TO.numel()))
        return mean(g_TO, x_TI)

    monkeypatch.setattr(walks, "mean_absolute_gradient", count)
    walked, sums = Walks(Blocks(model), find_layers(model), ids_BT, 1, 0, Path(tempfile.gettempdir())), Sums()
    for block in reversed(range(BLOCKS)):
        sums |= walked.gradients((0, 1), Walk(0, "run"), block)[0][1]
    monkeypatch.undo()
    zeros, numbers = (sum(column) for column in zip(*counts, strict=True))
    return zeros / numbers, sums


# Small weights of the head make for small gradients; a small embedding, behind a norm, for gradients that overflow.
@pytest.mark.parametrize(("head", "embedding"), [(2.0**-6, 1.0), (1.0, 2.0**-12)])
def test_fp16_holds_the_gradient_of_a_mean_loss(head: float, embedding: float, monkeypatch: pytest.MonkeyPatch) -> None:
    zeros, exact = walk_down(monkeypatch, torch.float32, head, embedding)
    half_zeros, half = walk_down(monkeypatch, torch.float16, head, embedding)
    assert half_zeros < zeros + 0.001
    scores = [name for name in exact if name.startswith("language/")]
    assert len(scores) == 7 * BLOCKS
    for name in scores:
        assert float(half[name]) == pytest.approx(float(exact[name]), rel=0.01)


def test_what_overflows_is_tried_again_on_a_smaller_scale() -> None:
    given = torch.tensor([1.0, 2.0**-5], dtype=torch.float16, requires_grad=True)
    forgotten: list[bool] = []
    above = Gradient(torch.full((2,), LARGEST, dtype=torch.float16), 4.0)
    found = flow_back(given * 2.0**10, given, above, lambda: forgotten.append(True), scaled=True)
    assert forgotten == [True]
    assert found.scale == 4.0 * 2.0**-8 and found.values.tolist() == [2.0**10, 2.0**10]


def test_what_is_never_finite_is_refused() -> None:
    given = torch.ones(1, dtype=torch.float16, requires_grad=True)
    with pytest.raises(
        UnknownStatistics, match=r"^what flows back through a block is not finite in fp16; use --dtype bf16 or fp"
    ):
        flow_back(given * torch.inf, given, Gradient(torch.ones(1, dtype=torch.float16)), lambda: None, scaled=True)


@pytest.mark.parametrize("largest", [6e-8, 1.0, LARGEST, 6e4])
def test_the_largest_entry_is_brought_near_by_a_power_of_two(largest: float) -> None:
    values = torch.tensor([largest, -largest / 2, 0.0], dtype=torch.float16)
    near = bring_near(Gradient(values, 2.0), scaled=True)
    assert LARGEST / 2 <= float(near.values[0]) < LARGEST
    assert torch.equal(near.values.double() / near.scale, values.double() / 2)
    nothing = Gradient(torch.zeros(3, dtype=torch.float16), 2.0)
    assert bring_near(nothing, scaled=True) == nothing


def test_other_dtypes_keep_their_bits() -> None:
    given = torch.full((1,), 2.0**-5, requires_grad=True)
    found = flow_back(given * torch.inf, given, Gradient(torch.ones(1)), pytest.fail, scaled=False)
    assert found.scale == 1.0 and found.values.tolist() == [torch.inf]
    assert torch.equal(bring_near(found, scaled=False).values, found.values)


@pytest.mark.parametrize(("tokens", "scale"), [(2, 1.0), (3, 2.0), (2048, 1024.0), (2049, 2048.0)])
def test_the_mean_loss_is_multiplied_by_nearly_the_number_of_its_tokens(tokens: int, scale: float) -> None:
    assert scale_losses(tokens) == (LARGEST, scale * LARGEST)
