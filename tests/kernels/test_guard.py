"""What is left after an update, against errors on explicit inputs in float64."""

import pytest
import torch

from billhook_kernels.guard import bound_rounding, damp_inputs, finish_update, is_finite, keep_better_rows, row_errors
from billhook_kernels.refit_steps import refit_survivors
from tests.kernels.layers import make_layer


def test_rows_are_judged_one_by_one() -> None:
    layer = make_layer(5, 12)
    keep = torch.rand(5, 12, generator=torch.Generator().manual_seed(2)) > 0.4
    updated = layer.weight * keep
    updated[1] *= 3
    updated[4] *= -2
    better = keep_better_rows(updated, layer.weight, keep, layer.moment)
    assert torch.equal(better, layer.weight * keep)
    good = refit_survivors(layer.weight, keep, layer.moment)
    assert keep_better_rows(good, layer.weight, keep, layer.moment) is good
    spoilt = good.clone()
    spoilt[3] *= 5
    better = keep_better_rows(spoilt, layer.weight, keep, layer.moment)
    assert torch.equal(better[3], (layer.weight * keep)[3])
    assert torch.equal(better[[0, 1, 2, 4]], good[[0, 1, 2, 4]])


def test_row_errors_are_the_mean_square_of_the_output_change() -> None:
    generator = torch.Generator().manual_seed(0)
    x, change = torch.randn(50, 7, generator=generator), torch.randn(3, 7, generator=generator)
    torch.testing.assert_close(row_errors(change, x.T @ x / 50), (x @ change.T).square().mean(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_survivor_is_lost_in_rounding(dtype: torch.dtype) -> None:
    weight = torch.tensor([[0.5, 0.0, 0.5, -0.5]]).to(dtype)
    keep = torch.tensor([[True, True, False, True]])
    # The second and third inputs say the same, and the first and the last nothing that the second does not.
    moment = torch.ones(4, 4)
    finished = finish_update(torch.tensor([[1e-46, 0.5, 0.0, 0.0]]), weight, keep, moment)
    assert finished.dtype == dtype
    tiny = torch.finfo(dtype).tiny
    assert finished.tolist() == [[tiny, 0.5, 0.0, tiny]]
    assert float(finish_update(torch.tensor([[0.5, 0.0, 0.0, 0.0]]), weight, keep, moment)[0, 1]) == 0  # as it was


def test_a_bound_before_the_rounding_hides_no_row_that_the_rounding_spoils() -> None:
    weight, keep = torch.tensor([[1.0, 1.0, 1e-4]]).bfloat16(), torch.tensor([[True, True, False]])
    fitted = torch.tensor([[1.0042, 0.9959, 0.0]])  # all inputs are the same: as good as the dense row
    finished = finish_update(fitted, weight, keep, torch.ones(3, 3), bound_O=torch.full((1,), 1e-12))
    assert finished.tolist() == [[1.0, 1.0, 0.0]]
    assert torch.equal(finish_update(fitted, weight.float(), keep, torch.ones(3, 3)), fitted)


def test_what_overflows_is_refused() -> None:
    weight, keep = torch.ones(1, 2, dtype=torch.float16), torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"^the updated weights are not finite$"):
        finish_update(torch.tensor([[1e5, -1e5]]), weight, keep, torch.eye(2))
    finish_update(torch.tensor([[6e4, 6e4]]), weight, keep, torch.eye(2))  # their sum may leave fp16's range


def test_rounding_is_bounded() -> None:
    layer = make_layer(20, 30)
    exact = layer.weight * 1.01
    before = row_errors(layer.weight - exact, layer.moment)
    bound = bound_rounding(exact, exact.bfloat16(), before, layer.moment.diagonal())
    after = row_errors(layer.weight - exact.bfloat16().float(), layer.moment)
    assert (after <= bound).all() and (bound < 4 * after).all()


def test_errors_by_a_damped_moment_need_no_such_moment() -> None:
    layer = make_layer(rows=8, columns=200)
    change = layer.weight * 0.1
    damped = damp_inputs(layer.moment, 0.3)
    assert torch.equal(row_errors(change, layer.moment, 0.3), row_errors(change, damped))
    assert torch.equal(row_errors(change, layer.moment, 0.0), row_errors(change, layer.moment))
    updated, keep = layer.weight + change, torch.ones_like(layer.weight, dtype=torch.bool)
    told = [finish_update(updated, layer.weight, keep, A, damping=d) for A, d in ((layer.moment, 0.3), (damped, 0.0))]
    assert torch.equal(*told)


def test_whatever_is_infinite_or_no_number_is_found() -> None:
    for size in (1, 7, 8, 100):
        matrix = torch.ones(size, size)
        assert is_finite(matrix)
        for row in (0, size - 1):
            for value in (torch.nan, torch.inf, -torch.inf):
                assert not is_finite(matrix.index_fill(0, torch.tensor([row]), value))
