"""KL curves between and beyond the sparsities at which they were measured."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from tools.plans.layer_profile import LEVELS, LayerProfile, predict_kl, predict_layer_kl


def make_layer(kappa: list[float]) -> LayerProfile:
    scores = {"wanda": 1.0, "wanda_z": 0.0, "gradient": 1.0, "gradient_z": 0.0}
    return LayerProfile(name="h.0.fc", block=0, kind="fc", weights=200, zeros=10, kappa=kappa, **scores)


def test_curve_goes_through_its_levels_and_through_zero() -> None:
    layer = make_layer([0.001, 0.004, 0.02, 0.08, 0.5])
    np.testing.assert_allclose(predict_layer_kl(layer, np.array(LEVELS)), layer.kappa, rtol=1e-9)
    assert predict_layer_kl(layer, np.array([0.0]))[0] == 0
    between = predict_layer_kl(layer, np.array([0.375, 0.9]))  # log KL is linear in s, and goes on with the last slope
    np.testing.assert_allclose(between, [(0.004 * 0.02) ** 0.5, 0.5 * (0.5 / 0.08)], rtol=1e-9)
    assert predict_layer_kl(layer, np.array([0.075]))[0] == pytest.approx(0.001 / 2**2)  # the power of the first two


@given(st.lists(st.floats(0, 1e3) | st.just(0.0), min_size=len(LEVELS), max_size=len(LEVELS)))
def test_any_curve_is_finite_and_never_falls(kappa: list[float]) -> None:
    curve = predict_layer_kl(make_layer(kappa), np.linspace(0, 1, 101))
    assert np.isfinite(curve).all()
    assert curve[0] == 0
    assert (np.diff(curve) >= -1e-12 * curve[1:]).all()


def test_the_model_costs_the_sum_of_its_layers() -> None:
    layers = [make_layer([0.1, 0.2, 0.3, 0.4, 0.5]), make_layer([1.0, 2.0, 3.0, 4.0, 5.0])]
    assert predict_kl(layers, np.array([0.3, 0.45])) == pytest.approx(0.2 + 3.0)
