"""What allocations read of the layers beyond the profile."""

import pytest

import tools.workbench.curves
from tests.benches import MASK, ignore, prune
from tools.plans.recipe import Recipe, parse_recipe
from tools.workbench.bench import Workbench


def test_curves_of_a_method_are_measured_once_with_what_it_leaves(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = bench.profile(ignore)
    masks = bench.profiles.read(profile).layers
    prune(bench, profile, 0.4)
    layers = bench.curves.describe_layers(profile, Recipe(), ignore)
    assert {x.name: x.kappa for x in layers} != {x.name: x.kappa for x in masks}
    assert [x.model_copy(update={"kappa": []}) for x in layers] == [x.model_copy(update={"kappa": []}) for x in masks]
    own = bench.curves.describe_layers(profile, parse_recipe("two-sided+refit:kappa"), ignore)
    assert sum(x.kappa[2] for x in own) < sum(x.kappa[2] for x in masks), "a refit repairs"
    monkeypatch.setattr(tools.workbench.curves, "measure_kappa", pytest.fail)
    assert bench.curves.describe_layers(profile, Recipe(strength=0.5), ignore) == layers
    for label in ("two-sided:kappa", "refit:kappa-mask", "refit:uniform", "refit:owl"):
        assert bench.curves.describe_layers(profile, parse_recipe(label), ignore) == masks


def test_curves_of_the_mask_by_the_long_way_are_those_of_the_profile(bench: Workbench) -> None:
    profile = bench.profile(ignore)
    measured = bench.curves.measure_kappa(profile, MASK, ignore)
    for layer in bench.profiles.read(profile).layers:
        assert measured[layer.name] == pytest.approx(layer.kappa, rel=1e-3)


def test_alphas_are_added_for_alphapruning(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    profile, spectra = bench.profile(ignore), Recipe(allocation="alphapruning")
    assert not bench.curves.has_layers(profile, spectra)
    layers = bench.curves.describe_layers(profile, spectra, ignore)
    assert all(layer.alpha and layer.alpha > 1 for layer in layers) and bench.curves.has_layers(profile, spectra)
    monkeypatch.setattr(tools.workbench.curves, "measure_alpha", pytest.fail)
    assert bench.curves.describe_layers(profile, spectra, ignore) == layers

    # of an allocation that reads both
    curves = bench.curves.describe_layers(profile, Recipe(), ignore)
    monkeypatch.setattr(Recipe, "needs", ("kappa", "alpha"))
    both = bench.curves.describe_layers(profile, Recipe(), ignore)
    assert [layer.alpha for layer in both] == [layer.alpha for layer in layers]
    assert [layer.kappa for layer in both] == [layer.kappa for layer in curves]
