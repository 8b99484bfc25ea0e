"""The preconditioner against dense matrices in float64."""

import numpy as np
import pytest
import torch
from torch import Tensor

from billhook_kernels import preconditioner
from billhook_kernels.guard import DAMPING
from billhook_kernels.preconditioner import Preconditioner, System, leading_eigenvectors, multiply, prepare_system
from billhook_kernels.refit_steps import refit_survivors
from tests.kernels.layers import Layer, make_layer, true_errors


@pytest.mark.parametrize("columns", [1, 2, 5, 40, 130])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_the_coordinates_are_those_of_the_damped_moment(columns: int, scale: float) -> None:
    moment = make_layer(1, columns).moment * scale
    system = prepare_system(moment)
    assert system is not None
    a = moment.double().numpy()
    mean = np.diag(a).mean()
    s = system.scale_I.double().numpy() * mean**0.5
    h = a + DAMPING * mean * np.eye(columns)
    np.testing.assert_allclose(s[:, None] * system.matrix_II.double().numpy() * s, h, atol=1e-5 * h.max())
    assert 1 <= system.factor_IK.shape[1] <= columns


def make_moving_together() -> tuple[Layer, Tensor]:
    """(layer, mask) whose inputs share a few strong directions, as those of a language model do."""
    layer = make_layer(40, 200)
    generator = torch.Generator().manual_seed(1)
    shared = torch.randn(200, 4, generator=generator) * torch.tensor([8.0, 4.0, 2.0, 1.0])
    keep = torch.rand(40, 200, generator=generator) > 0.5
    return layer._replace(moment=layer.moment + shared @ shared.T), keep


def test_the_model_is_close() -> None:
    moment = make_moving_together()[0].moment
    system = prepare_system(moment)
    assert system is not None
    c, f = system.matrix_II.double().numpy(), system.factor_IK.double().numpy()
    model = np.eye(200) + f @ f.T
    before = np.linalg.cond(c)
    after = np.linalg.eigvals(np.linalg.solve(model, c)).real
    assert after.min() > 0 and after.max() / after.min() < before / 2


def test_every_row_is_solved_for_its_own_survivors() -> None:
    generator = torch.Generator().manual_seed(0)
    factor = torch.randn(30, 4, generator=generator)
    stays = (torch.rand(6, 30, generator=generator) > 0.5).float()
    stays[2], stays[3] = 0, 1
    residual = torch.randn(6, 30, generator=generator) * stays
    solved = Preconditioner(factor, stays)(residual, out=torch.empty_like(residual))
    for row, mask, solution in zip(residual.double().numpy(), stays.bool().numpy(), solved.numpy(), strict=True):
        f = factor.double().numpy()[mask]
        expected = np.zeros(30)
        expected[mask] = np.linalg.solve(np.eye(mask.sum()) + f @ f.T, row[mask])
        np.testing.assert_allclose(solution, expected, atol=1e-5)


def test_the_leading_eigenvectors_of_a_matrix_with_a_gap() -> None:
    vectors = torch.linalg.qr(torch.randn(50, 50, generator=torch.Generator().manual_seed(1))).Q
    matrix = (vectors * torch.tensor([1.0] * 47 + [30.0, 40.0, 50.0])) @ vectors.T
    values, found = leading_eigenvectors(matrix, 3)
    torch.testing.assert_close(values, torch.tensor([30.0, 40.0, 50.0]), rtol=1e-3, atol=0)
    torch.testing.assert_close((found.T @ vectors[:, -3:]).abs(), torch.eye(3), atol=1e-2, rtol=0)


def test_dead_columns_stand_alone() -> None:
    moment = make_layer(1, 40).moment
    moment[[3, 7]], moment[:, [3, 7]] = 0, 0
    system = prepare_system(moment)
    assert system is not None and not system.factor_IK[[3, 7]].any()
    assert int(system.matrix_II[[3, 7]].count_nonzero()) == 2


def test_no_input_at_all_has_no_coordinates() -> None:
    assert prepare_system(torch.zeros(4, 4)) is None


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_moment_that_is_not_finite_is_refused(bad: float) -> None:
    moment = torch.eye(4)
    moment[1, 2] = bad
    with pytest.raises(ValueError, match=r"^the refit is not finite, as the second moment is not$"):
        prepare_system(moment)


def test_a_system_at_hand_is_used() -> None:
    layer = make_layer(5, 30)
    keep = torch.rand(5, 30, generator=torch.Generator().manual_seed(0)) > 0.5
    system = prepare_system(layer.moment)
    fitted = refit_survivors(layer.weight, keep, layer.moment, system=system)
    assert torch.equal(fitted, refit_survivors(layer.weight, keep, layer.moment))


def test_it_saves_iterations() -> None:
    """Three iterations leave less to gain than six with the diagonal alone, which is what F = 0 is."""
    layer, keep = make_moving_together()
    system = prepare_system(layer.moment)
    assert system is not None

    def error(system: System, iterations: int) -> float:
        fitted = refit_survivors(layer.weight, keep, layer.moment, system=system, iterations=iterations, tolerance=0)
        return damped_error(fitted, layer)

    best = error(system, 60)
    assert error(system, 3) - best < error(system._replace(factor_IK=system.factor_IK * 0), 6) - best


def damped_error(fitted: Tensor, layer: Layer) -> float:
    change = (fitted - layer.weight).double()
    damping = DAMPING * float(layer.moment.diagonal().mean())
    return float(((change @ layer.moment.double() + damping * change) * change).sum())


@pytest.mark.parametrize("iterations", [1, 2])
def test_a_coasting_step_is_nearly_as_good_as_an_iteration(iterations: int) -> None:
    layer, keep = make_moving_together()
    none, coasting, one_more = (
        damped_error(refit_survivors(layer.weight, keep, layer.moment, iterations=n, tolerance=0, coast=coast), layer)
        for n, coast in ((iterations, False), (iterations, True), (iterations + 1, False))
    )
    assert none > coasting > one_more
    assert coasting - one_more < 0.5 * (none - one_more)


# --- products in bf16 ------------------------------------------------------------------------------------------


@pytest.fixture
def rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device that multiplies bf16, for layers of any width."""
    monkeypatch.setattr(preconditioner, "multiplies_bf16", lambda _device: True)
    monkeypatch.setattr(preconditioner, "ROUNDED", 1)
    monkeypatch.setattr(preconditioner, "BAND", 16)


def test_what_the_leading_directions_leave_is_rounded_and_they_are_not(rounded: None) -> None:
    layer, _ = make_moving_together()
    system = prepare_system(layer.moment)
    assert system is not None and system.matrix_II.dtype == torch.bfloat16
    a = layer.moment.double().numpy()
    mean = np.diag(a).mean()
    s, f = system.scale_I.double().numpy() * mean**0.5, system.factor_IK.double().numpy()
    c = (a + DAMPING * mean * np.eye(200)) / s[:, None] / s
    rest = c - f @ f.T
    np.testing.assert_allclose(system.matrix_II.double().numpy(), rest, atol=2**-8 * np.abs(rest).max())
    left = torch.randn(40, 200, generator=torch.Generator().manual_seed(2))
    out, scratch = torch.empty_like(left), torch.empty_like(left)
    product = multiply(left, system, out=out, scratch=scratch)
    assert product.data_ptr() == out.data_ptr() and product.dtype == torch.float32
    exact = left.double().numpy() @ c
    assert np.abs(product.numpy() - exact).max() < 0.01 * np.abs(exact).max()


def test_a_refit_by_rounded_products_is_as_good(monkeypatch: pytest.MonkeyPatch, rounded: None) -> None:
    """Of rows that hang on a few strong directions, which bf16 alone would lose."""
    layer, keep = make_moving_together()
    fitted = refit_survivors(layer.weight, keep, layer.moment)
    monkeypatch.setattr(preconditioner, "ROUNDED", 10**9)
    exact = refit_survivors(layer.weight, keep, layer.moment)
    errors = [true_errors(weight.double().numpy(), layer).sum() for weight in (fitted, exact, layer.weight * keep)]
    assert errors[0] == pytest.approx(errors[1], rel=0.01) and errors[1] < errors[2] / 3
    assert not fitted[~keep].any() and fitted.dtype == torch.float32


def test_products_have_the_same_bits_by_any_number_of_threads(monkeypatch: pytest.MonkeyPatch, rounded: None) -> None:
    monkeypatch.setattr("billhook_kernels.dispatch.THREAD_BYTES", 1)
    system = prepare_system(make_layer(1, 96).moment)
    assert system is not None
    left, threads, found = torch.randn(70, 96, generator=torch.Generator().manual_seed(3)), torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(multiply(left, system, out=torch.empty_like(left), scratch=torch.empty_like(left)))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
