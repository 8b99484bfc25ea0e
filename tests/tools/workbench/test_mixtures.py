"""Mixtures of named texts: sums of what is known of each, without walking through a text again."""

from pathlib import Path
from typing import Any

import pytest
import torch

import tools.plans.costs
import tools.workbench.bench
import tools.workbench.mixtures
import tools.workbench.moments
import tools.workbench.profiles
from tests.benches import ignore, open_bench, plan, prune, same, snapshot
from tests.named import name_texts, watch_polish
from tests.team import join_team
from tests.tiny import save_tiny_model, tiny_settings
from tools.base.errors import ImpossiblePlan
from tools.plans.costs import count_polish, schedule_polish
from tools.plans.groups import refuse_two_walks
from tools.plans.recipe import Recipe, parse_recipe
from tools.plans.work_order import order_allocation
from tools.workbench.bench import Workbench

MIX = {"code": 0.75, "prose": 0.25}
SUM = 1e-5
"""Relative difference, at most, of a sum from what is measured at once."""


@pytest.fixture
def named(tiny_llama: Path, tmp_path: Path, workbench_closed: None) -> Workbench:
    texts = name_texts(tmp_path, text_weights={})
    return open_bench(tiny_settings(tiny_llama, **texts, gradient_windows=4), tmp_path / "named")


def masks(bench: Workbench, profile: str, *labels: str) -> list[torch.Tensor]:
    found = []
    for label in labels:
        prune(bench, profile, 0.5, parse_recipe(label))
        found.append(torch.cat([(layer.weight_OI == 0).flatten() for layer in bench.weights.layers]))
    return found


def assert_alike(ours: Workbench, first: tuple[str, Recipe], theirs: Workbench, second: tuple[str, Recipe]) -> None:
    """Means and second moments of two profiles, by recipes."""
    for name in ours.weights.by_name:
        one, other = ours.profiles.find_statistics(first[0], name, first[1]), None
        other = theirs.profiles.find_statistics(second[0], name, second[1])
        torch.testing.assert_close(one.mean_square_I, other.mean_square_I, rtol=SUM, atol=0)
        torch.testing.assert_close(one.gradient_square_O, other.gradient_square_O, rtol=SUM, atol=0)
        scale = float(other.second_moment_II.abs().max())
        torch.testing.assert_close(one.second_moment_II, other.second_moment_II, rtol=SUM, atol=SUM * scale)


LABELS = (
    *("two-sided:kappa", "refit:kappa-mask", "refit:kappa", "refit~damped0.3:kappa", "sparsegpt:uniform"),
    "refit~clipped~sequential:kappa-mask",
)


def test_a_sum_is_a_profile_of_the_mixed_text(named: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of both texts, one behind the other, as one text."""
    profile = named.profile(ignore)
    ours, found = named.profiles.read(profile), masks(named, profile, *LABELS)
    both = named.windows._replace(texts=())
    monkeypatch.setattr(tools.workbench.bench, "cut_windows", lambda *given: both)
    settings = named.settings.model_copy(update={"text": {}, "calibration_windows": 8, "gradient_windows": 8})
    mixed = open_bench(settings, named.directory.parent / "mixed")
    whole = mixed.profile(ignore)
    for one, other in zip(ours.layers, mixed.profiles.read(whole).layers, strict=True):
        assert one.kappa == pytest.approx(other.kappa, rel=SUM)
        assert (one.wanda, one.gradient) == pytest.approx((other.wanda, other.gradient), rel=SUM)
        assert (one.wanda_z, one.gradient_z) == pytest.approx((other.wanda_z, other.gradient_z), rel=1e-3, abs=1e-4)
    assert_alike(named, (profile, Recipe()), mixed, (whole, Recipe()))
    for label, mask, other in zip(LABELS, found, masks(mixed, whole, *LABELS), strict=True):
        assert torch.equal(mask, other), label


def test_another_mixture_is_a_sum_and_walks_through_no_text(named: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    profile = named.profile(ignore)
    recipe = Recipe.model_validate({"mix": MIX, "curves": "mask"})
    with monkeypatch.context() as patch:
        for module in (tools.workbench.profiles, tools.workbench.mixtures, tools.workbench.moments):
            for name in ("collect_texts", "collect_statistics", "begin_walk"):
                patch.setattr(module, name, refuse, raising=False)
        assert named.curves.has_layers(profile, recipe)
        prune(named, profile, 0.5, recipe)
        mixture = named.profiles.find(profile, recipe, ignore)
    assert mixture == named.profiles.find(profile, recipe, refuse) != profile, "added up once"
    read = named.profiles.read(mixture)
    assert (read.mix, read.hidden) == (MIX, named.profiles.read(profile).hidden)
    weights = named.settings.model_copy(update={"text_weights": {"code": 3.0, "prose": 1.0}})
    weighed = open_bench(weights, named.directory.parent / "weighed")
    own = weighed.profile(ignore)
    assert_alike(named, (mixture, Recipe()), weighed, (own, Recipe()))
    for one, other in zip(read.layers, weighed.profiles.read(own).layers, strict=True):
        assert one.kappa == pytest.approx(other.kappa, rel=0.5), "of the masks of equal weights"
    labels = (
        "refit~0.75code~0.25prose:uniform",
        "wanda~0.75code~0.25prose:uniform",
        "refit~0.75code~0.25prose~sequential:uniform",
    )
    plain = [label.replace("~0.75code~0.25prose", "") for label in labels]
    for label, mask, other in zip(labels, masks(named, profile, *labels), masks(weighed, own, *plain), strict=True):
        assert torch.equal(mask, other), label


def refuse(*_given: Any, **_more: Any) -> Any:
    raise AssertionError("a text is walked through")


def test_the_runs_own_mixture_is_its_profile(named: Workbench) -> None:
    profile = named.profile(ignore)
    assert named.profiles.find(profile, Recipe.model_validate({"mix": {"code": 1, "prose": 1}}), ignore) == profile
    alone = named.profiles.find(profile, Recipe.model_validate({"mix": {"prose": 1}}), ignore)
    assert named.profiles.read(alone).mix == {"code": 0.0, "prose": 1.0}


@pytest.mark.parametrize("masks_only", [False, True])
def test_texts_count_by_their_names_in_whatever_order_they_are_given(named: Workbench, masks_only: bool) -> None:
    """Labels are drawn by the number of a window: what does without them comes out the same."""
    text = dict(reversed(named.settings.text.items()))
    other = open_bench(named.settings.model_copy(update={"text": text}), named.directory.parent / "other")
    labels, found = (
        [f"{name}~0.9code~0.1prose" for name in ("wanda~dense", "wanda", "sparsegpt", "sparsegpt~dense")],
        [],
    )
    for bench in (named, other):
        profile = bench.profile(ignore, masks_only=masks_only)
        assert list(bench.profiles.read(profile).mix) == list(bench.settings.text)
        found.append(masks(bench, profile, *labels))
        again = open_bench(bench.settings, bench.directory)
        assert again.profile(ignore, masks_only=masks_only) == profile, "read back"
    for label, mask, theirs in zip(labels, *found, strict=True):
        assert torch.equal(mask, theirs), label


@pytest.mark.parametrize("masks_only", [False, True])
def test_workers_and_interruptions_come_to_the_same_bits(named: Workbench, masks_only: bool) -> None:
    profile = named.profile(ignore, masks_only=masks_only)
    labels = ("refit~0.75code~0.25prose:kappa", "refit~1prose~sequential:kappa-mask", "refit~sequential:kappa-mask")
    made = [prune(named, profile, 0.5, parse_recipe(label)) for label in labels]
    bits = snapshot(named)
    shared = open_bench(named.settings, named.directory.parent / "shared")
    join_team(shared)
    assert shared.profile(ignore, masks_only=masks_only) == profile
    assert [prune(shared, profile, 0.5, parse_recipe(label)) for label in labels] == made
    assert same(snapshot(shared), bits)


def test_a_profile_of_pruned_weights_is_of_all_texts_too(named: Workbench) -> None:
    profile = named.profile(ignore)
    prune(named, profile, 0.5)
    again = named.profile(ignore, first=profile)
    ours, theirs = named.profiles.read(again), named.profiles.read(profile)
    assert (ours.means, ours.parts, ours.mix) == (theirs.means, theirs.parts, theirs.mix)
    assert [layer.kappa for layer in ours.layers] != [layer.kappa for layer in theirs.layers]


def test_what_cannot_be_mixed_is_refused_in_one_line(named: Workbench, tiny_llama: Path, tmp_path: Path) -> None:
    profile = named.profile(ignore)
    with pytest.raises(ImpossiblePlan, match=r"^mix weighs 'sql', which is none of the texts code, prose$"):
        prune(named, profile, 0.5, parse_recipe("refit~0.5code~0.5sql:kappa-mask"))
    line = (
        "statistics behind pruned predecessors in one round are of one calibration text, and not of '~1code' and 'run'"
    )
    with pytest.raises(ImpossiblePlan, match=f"^{line}$"):
        refuse_two_walks([parse_recipe("refit~1code~sequential"), parse_recipe("refit~sequential")])
    plain = open_bench(tiny_settings(tiny_llama), tmp_path / "plain")
    with pytest.raises(
        ImpossiblePlan, match=r"^mix weighs 'code', and this run has neither named texts nor questions; leave it out$"
    ):
        plain.curves.describe_layers(plain.profile(ignore), parse_recipe("refit~1code:kappa-mask"), ignore)


def test_experts_are_mixed_too(tmp_path: Path, workbench_closed: None) -> None:
    """Of each text by itself: those that one text sends few tokens to are filled up there."""
    model = save_tiny_model(tmp_path / "model", "qwen3_moe")
    texts = name_texts(tmp_path, text_weights={})
    bench = open_bench(tiny_settings(model, **texts), tmp_path / "named", lambda _: None)
    profile = bench.profile(ignore)
    labels = ("refit~0.75code~0.25prose:kappa", "refit~1prose~sequential:kappa-mask", "two-sided:kappa")
    made = [prune(bench, profile, 0.5, parse_recipe(label)) for label in labels]
    bits = snapshot(bench)
    shared = open_bench(bench.settings, tmp_path / "shared", lambda _: None)
    join_team(shared)
    assert shared.profile(ignore) == profile
    assert [prune(shared, profile, 0.5, parse_recipe(label)) for label in labels] == made
    assert same(snapshot(shared), bits)


def test_a_polish_goes_by_the_mixture_of_its_plan(named: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools.plans.costs, "STEP_TOKENS", 128)
    read = watch_polish(monkeypatch)
    profile = named.profile(ignore)
    named.warn = lambda _: None
    recipe = parse_recipe("refit~1prose:kappa-mask")
    named.pruner.prune(profile, order_allocation(recipe, plan(named, profile, 0.4, recipe), 64 * 6), ignore)
    assert set(read) == {4, 5, 6, 7}
    settings = named.settings
    assert count_polish(settings, 64 * 6, 1) == schedule_polish(4, 64, 64 * 6, settings.seed).count_tokens(64)
    assert count_polish(settings, 64 * 6) == schedule_polish(8, 64, 64 * 6, settings.seed).count_tokens(64)


def test_with_other_weights_curves_alone_are_measured_anew(named: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a goal says what texts count, once the model was profiled."""
    named.profile(ignore)
    settings = named.settings.model_copy(update={"text_weights": {"code": 3.0, "prose": 1.0}})
    fresh = open_bench(settings, named.directory.parent / "fresh").profile(ignore)
    again = open_bench(settings, named.directory)
    monkeypatch.setattr(tools.workbench.mixtures, "collect_texts", refuse)
    assert again.profile(ignore) == fresh, "the same to the bit"
    assert again.profiles.read(fresh).mix == MIX
    alike = named.settings.model_copy(update={"text_weights": {"code": 2.0, "prose": 2.0}})
    monkeypatch.setattr(tools.workbench.mixtures, "measure_text_curves", refuse)
    assert open_bench(alike, named.directory).profile(ignore), "nothing is measured for the same shares"
