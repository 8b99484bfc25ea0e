"""Second moments that the disk has no room for: collected anew whenever layers are pruned, to the same bits."""

import re
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

import tools.workbench.moments
from tests.benches import (
    MASK,
    REFIT,
    SEQUENTIAL,
    artifact_path,
    damage,
    ignore,
    open_bench,
    plan,
    prune,
    same,
    snapshot,
)
from tests.named import name_texts
from tests.team import join_team
from tests.tiny import save_tiny_model, tiny_settings
from tests.tools.workbench.test_prune import artifacts, mix
from tools.base.errors import UserError
from tools.base.settings import TeamSettings
from tools.estimate.memory import Course
from tools.models.disk import list_disk, plan_disk
from tools.plans.recipe import parse_recipe
from tools.plans.work_order import order_allocation
from tools.workbench.bench import Workbench, fit_disk
from tools.workbench.open import close_workbench
from tools.workbench.store import DENSE

BLOCKS = 4
LABELS = ("refit:kappa", "sparsegpt~dense:uniform", "two-sided+refit:kappa-mask")


@pytest.fixture(scope="module")
def deep_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("deep"), num_hidden_layers=BLOCKS)


@pytest.fixture
def kept(deep_llama: Path, tmp_path: Path, workbench_closed: None) -> Workbench:
    return open_bench(tiny_settings(deep_llama), tmp_path / "kept")


def open_small(settings: TeamSettings, bench: Workbench, at_once: int) -> Workbench:
    """A workbench beside another that has room for the second moments of so many blocks."""
    lines = list_disk(bench.model, bench.weights.layers, settings, at_once=at_once)
    told: list[str] = []
    small = open_bench(
        settings.model_copy(update={"disk": sum(line.bytes for line in lines) / 1e9}),
        bench.directory.parent / f"small{at_once}",
        told.append,
    )
    (text,) = told
    assert re.match(r"second moments are not kept, which takes a disk of [\d.]+ MB, and [\d.]+ MB are there: ", text)
    small.warn = pytest.fail
    return small


def count_kept(bench: Workbench) -> int:
    """Second moments among the artifacts."""
    files = bench.store.directory.rglob("*.safetensors")
    return sum("upper" in safe_open(file, "pt").keys() for file in files)  # noqa: SIM118 - no mapping


def make_all(bench: Workbench, labels: tuple[str, ...]) -> dict[str, Any]:
    """The profile's layers, and what each recipe makes of the model: zeros by its own curves, and the weights."""
    profile = bench.profile(ignore)
    made: dict[str, Any] = {"layers": bench.profiles.read(profile).layers}
    for label in labels:
        recipe = parse_recipe(label)
        layers = bench.curves.describe_layers(profile, recipe, ignore)
        made[f"{label} curves"] = [layer.kappa for layer in layers]
        checkpoint = prune(bench, profile, 0.5, recipe)
        made[label] = artifacts(bench, checkpoint), bench.weights.hash_masks()
        assert bench.weights.installed == artifacts(bench, checkpoint), "all are in the model"
    return made


@pytest.fixture(scope="module")
def made_of_kept(deep_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a workbench makes that keeps its second moments."""
    bench = open_bench(tiny_settings(deep_llama), tmp_path_factory.mktemp("kept"))
    made = make_all(bench, LABELS)
    assert count_kept(bench) > 0
    close_workbench()
    return made


@pytest.mark.parametrize("workers", [False, True])
@pytest.mark.parametrize("at_once", [1, 3])
def test_they_come_to_the_bits_of_those_that_are_kept(
    made_of_kept: dict[str, Any], kept: Workbench, at_once: int, workers: bool
) -> None:
    small = open_small(kept.settings, kept, at_once)
    if workers:
        join_team(small)
    assert make_all(small, LABELS) == made_of_kept
    assert count_kept(small) == 0


def count_collected(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Fills with the block of which second moments of the dense model are collected."""
    collected: list[int] = []
    collect = tools.workbench.moments.collect_moments

    def record(team: Any, extent: Any, walk: Any, block: int, *given: Any, **more: Any) -> Any:
        collected.append(block)
        return collect(team, extent, walk, block, *given, **more)

    monkeypatch.setattr(tools.workbench.moments, "collect_moments", record)
    return collected


def test_mixtures_are_the_same_sums(deep_llama: Path, tmp_path: Path, workbench_closed: None) -> None:
    labels = ("refit:kappa", "refit~0.75code~0.25prose:kappa", "refit~1prose:kappa-mask")
    settings = tiny_settings(deep_llama, **name_texts(tmp_path, text_weights={}), gradient_windows=4)
    kept = open_bench(settings, tmp_path / "kept")
    expected = make_all(kept, labels)
    assert make_all(open_small(settings, kept, 2), labels) == expected


def test_questions_beside_the_runs_text_are_the_same_sums(
    asking: TeamSettings, deep_llama: Path, tmp_path: Path
) -> None:
    labels = ("refit:kappa-mask", "refit~quarter:kappa", "refit~half:kappa-mask")
    settings = asking.model_copy(update={"model": str(deep_llama)})
    kept = open_bench(settings, tmp_path / "kept")
    expected = make_all(kept, labels)
    assert make_all(open_small(settings, kept, 1), labels) == expected


def test_an_order_of_several_recipes_and_a_kill_in_it(kept: Workbench) -> None:
    """Layers by masks, by second moments, and behind pruned predecessors."""
    settings = kept.settings

    def order(bench: Workbench, profile: str) -> Any:
        allocation = plan(bench, profile, 0.4)
        refit, mask, last = (order_allocation(r, allocation) for r in (REFIT, MASK, SEQUENTIAL))
        return mix(refit, (mask, lambda x: "v_proj" in x), (last, lambda x: ".3." in x))

    profile = kept.profile(ignore)
    whole = kept.pruner.prune(profile, order(kept, profile), ignore)
    expected, bits = artifacts(kept, whole), snapshot(kept)
    small = open_small(settings, kept, 1)
    profile = small.profile(ignore)
    checkpoint = small.pruner.prune(profile, order(small, profile), ignore)
    assert artifacts(small, checkpoint) == expected and same(snapshot(small), bits)
    index = small.store.directory / "index.jsonl"
    for lines in (1, 9, 20):  # as if killed
        index.write_text("\n".join(index.read_text().splitlines()[:-lines]))
        small.pruner.restore(DENSE)
        assert small.pruner.prune(profile, order(small, profile), ignore) == checkpoint
        assert same(snapshot(small), bits)


def test_layers_that_are_gone_are_made_again_in_one_pass(kept: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    small = open_small(kept.settings, kept, 1)
    profile = small.profile(ignore)
    checkpoint, told = prune(small, profile, 0.5), list[str]()
    bits = snapshot(small)
    small.pruner.restore(DENSE)
    names = list(small.weights.by_name)
    for name in (names[3], names[-1]):
        damage(artifact_path(small, checkpoint, name))
    small.warn = told.append
    collected = count_collected(monkeypatch)
    small.pruner.restore(checkpoint)
    assert same(snapshot(small), bits) and collected == [0, 3]
    assert len(told) == 2 and all(text.endswith("is computed again") for text in told)


def test_a_run_may_go_on_with_another_disk(kept: Workbench) -> None:
    settings = kept.settings
    profile = kept.profile(ignore)
    expected = artifacts(kept, prune(kept, profile, 0.5))
    small = open_small(settings, kept, 1)
    first = small.profile(ignore)
    lavish = open_bench(settings, small.directory)
    assert count_kept(lavish) == 0
    assert artifacts(lavish, prune(lavish, first, 0.5)) == expected
    assert count_kept(lavish) > 0, "they are kept as soon as there is room"
    poor = open_bench(small.settings, kept.directory, lambda text: None)
    assert artifacts(poor, prune(poor, profile, 0.4)) == artifacts(poor, prune(poor, poor.profile(ignore), 0.4))


def test_too_little_disk_even_so_is_refused(kept: Workbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = kept.settings.model_copy(update={"disk": 1e-5})
    text = r"^a run of this model may write [\d.]+ MB to .*/refused, but --disk allows 10\.0 kB; allow more$"
    with pytest.raises(UserError, match=text):
        open_bench(settings, tmp_path / "refused")


def test_a_polish_is_asked_room_for_too(kept: Workbench, tmp_path: Path) -> None:
    """Twice values, two means and the best so far of half of the weights, and what the dense model's head reads."""
    weights, course = (
        sum(layer.weight_OI.numel() for layer in kept.weights.layers),
        Course(polish_tokens=64, polished_at=0.5),
    )
    state, windows = 2 * (weights // 2) * (4 + 8 + 4), kept.settings.count_fitted()
    more = state + windows * kept.settings.window * kept.model.config.hidden_size * 4

    def fit(disk: int, asked: Course) -> int | None:
        settings = kept.settings.model_copy(update={"disk": disk / 1e9})
        return fit_disk(kept.model, kept.weights.layers, settings, tmp_path, 0, asked, told.append)

    told: list[str] = []
    needed = sum(line.bytes for line in list_disk(kept.model, kept.weights.layers, kept.settings))
    assert fit(needed, Course()) is None and fit(needed + more, course) is None and not told
    assert fit(needed + more - 1, course) is not None
    assert "second moments are not kept, which takes a disk of " in told[0]
    with pytest.raises(UserError, match=r"^a run of this model may write .* but --disk allows 10\.0 kB; allow more$"):
        fit(10_000, course)


def test_as_many_blocks_as_there_is_room_for(kept: Workbench) -> None:
    def size(at_once: int | None) -> int:
        return sum(x.bytes for x in list_disk(kept.model, kept.weights.layers, kept.settings, at_once=at_once))

    def find(room: float) -> int | None:
        return plan_disk(kept.model, kept.weights.layers, kept.settings, room).at_once

    assert size(None) == size(4), "blocks of one shape"
    assert size(4) - size(3) == size(2) - size(1) > 0
    assert [find(size(None)), find(size(None) - 1), find(size(2)), find(size(2) - 1), find(0)] == [None, 3, 2, 1, 1]
    whole = plan_disk(kept.model, kept.weights.layers, kept.settings, size(3))
    assert (whole.lines[0].what, whole.bytes) == ("second moments, of some blocks at a time", size(3))
