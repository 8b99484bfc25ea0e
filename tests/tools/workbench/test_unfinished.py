"""Work that is asked to stop between two layers or windows, and begun again by another process: the same bits."""

from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

import pytest

import tools.measure.losses
import tools.measure.recall
import tools.statistics.gradients
import tools.statistics.moments
import tools.statistics.walks
import tools.workbench.curves
import tools.workbench.layer_pruning
from tests.benches import SEQUENTIAL, ignore, open_bench, plan, prune, snapshot
from tests.team import gather_teams
from tests.tiny import tiny_settings
from tools.base.progress import Stopped, stop_at
from tools.plans.recipe import parse_recipe
from tools.plans.work_order import order_allocation
from tools.workbench.bench import Workbench
from tools.workbench.open import close_workbench

OWN = parse_recipe("refit:kappa")

Count = Callable[..., list[str]]


@pytest.fixture
def stopping(monkeypatch: pytest.MonkeyPatch) -> Count:
    """Counts the calls of a function; at the nth of them the work is asked to stop, and goes on to the next boundary.

    A list that grows with every call, and the event.
    """

    def arm(owner: Any, name: str, event: Event, at: int = 0) -> list[str]:
        calls: list[str] = []
        original = getattr(owner, name)

        def count(*arguments: Any, **options: Any) -> Any:
            calls.append(name)
            if len(calls) == at:
                event.set()
            return original(*arguments, **options)

        monkeypatch.setattr(owner, name, count)
        return calls

    return arm


def again(bench: Workbench) -> Workbench:
    """As another process finds it."""
    settings, directory = bench.settings, bench.directory
    close_workbench()
    return open_bench(settings, directory)


def list_files(bench: Workbench) -> set[str]:
    """All artifacts, and what is kept beside them."""
    places = (bench.store.directory, bench.directory / "evaluations")
    return {path.name for place in places for path in place.rglob("*") if path.is_file()}


WALKS = [
    ("Walks._step", 6, False, 16 + 4 + 16, 14),  # the second window of the second block is not begun
    ("Walks._begin_gradients", 1, False, 32, 14),
    ("squared_loss_changes", 10, False, 32, 10 + 7),
    ("squared_loss_changes", 10, True, 0, 10 + 7),
]
"""Where it is stopped, of which profile, with 4 windows, 2 blocks of 7 layers and 4 inputs of them: sums and curves."""


@pytest.mark.parametrize(("name", "at", "second", "summed", "drawn"), WALKS)
def test_a_profile_goes_on_at_the_block_where_it_was(
    name: str, at: int, second: bool, summed: int, drawn: int, bench: Workbench, stopping: Count, tmp_path: Path
) -> None:
    other = open_bench(bench.settings, tmp_path / "other")
    first = other.profile(ignore)
    checkpoint = prune(other, first, 0.4) if second else "dense"
    expected, files = other.profile(ignore, first) if second else first, list_files(other)
    bench = open_bench(bench.settings, bench.directory)
    if second:
        assert (bench.profile(ignore), prune(bench, first, 0.4)) == (first, checkpoint)
    walks, event = tools.statistics.walks, Event()
    sums = stopping(tools.statistics.moments, "add_second_moment", Event())
    curves = stopping(tools.statistics.gradients, "squared_loss_changes", Event())
    owner, _, function = name.rpartition(".")
    calls = stopping(getattr(walks, owner) if owner else tools.statistics.gradients, function, event, at)
    with stop_at(event), pytest.raises(Stopped):
        bench.profile(ignore, first if second else "")
    assert len(calls) == at, "not one window or layer more was begun"
    bench = again(bench)
    if second:
        bench.pruner.restore(checkpoint)
    assert bench.profile(ignore, first if second else "") == expected
    assert (len(sums), len(curves)) == (summed, drawn), "only the block under way is done again"
    assert list_files(bench) == files, "nothing is left of what was under way"


def test_workers_or_others_go_on_with_what_is_known_of_blocks(
    bench: Workbench, stopping: Count, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = bench.profile(ignore)
    gather_teams(monkeypatch)
    shared = open_bench(tiny_settings(bench.settings.model, workers="2"), tmp_path / "shared")
    event = Event()
    curves = stopping(tools.statistics.gradients, "squared_loss_changes", event, 2 * 7)
    with stop_at(event), pytest.raises(Stopped):  # a worker knows of no stop, and ends with the block
        shared.profile(ignore)
    close_workbench()
    alone = open_bench(bench.settings, tmp_path / "shared")
    assert alone.profile(ignore) == expected
    assert len(curves) == 14 + 7, "both workers' block, and the one below it by this process alone"


def test_what_is_known_of_other_settings_or_damaged_is_not_taken(bench: Workbench, stopping: Count) -> None:
    other = bench.settings.model_copy(update={"seed": 1})
    event = Event()
    stopping(tools.statistics.gradients, "squared_loss_changes", event, 10)
    with stop_at(event), pytest.raises(Stopped):
        bench.profile(ignore)
    close_workbench()
    fresh = open_bench(other, bench.directory.parent / "fresh").profile(ignore)
    assert open_bench(other, bench.directory).profile(ignore) == fresh
    expected = open_bench(bench.settings, bench.directory.parent / "expected").profile(ignore)
    for path in bench.store.directory.rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    assert open_bench(bench.settings, bench.directory).profile(ignore) == expected


def test_curves_go_on_at_the_block_where_they_were(bench: Workbench, stopping: Count) -> None:
    profile = bench.profile(ignore)
    event = Event()
    cuts = stopping(tools.workbench.curves, "cut_to_levels", event, 9)
    with stop_at(event), pytest.raises(Stopped):
        bench.curves.describe_layers(profile, OWN, ignore)
    assert len(cuts) == 9, "the layer under way was the last"
    bench = again(bench)
    layers = bench.curves.describe_layers(profile, OWN, ignore)
    assert len(cuts) == 9 + 7, "the upper block was read back"
    alone = open_bench(bench.settings, bench.directory.parent / "alone")
    assert layers == alone.curves.describe_layers(alone.profile(ignore), OWN, ignore)


def test_second_moments_go_on_at_the_block_where_they_were(bench: Workbench, stopping: Count) -> None:
    profile = bench.profile(ignore, masks_only=True)
    event = Event()
    sums = stopping(tools.statistics.moments, "add_second_moment", event, 4 * 4 + 5)
    with stop_at(event), pytest.raises(Stopped):
        bench.profiles.find_moments(profile, ignore)
    begun = len(sums)
    bench = again(bench)
    found = bench.profiles.find_moments(profile, ignore)
    assert len(sums) - begun == 4 * 4, "those of the second block alone"
    alone = open_bench(bench.settings, bench.directory.parent / "alone")
    assert found == alone.profiles.read(alone.profile(ignore)).moments


@pytest.mark.parametrize("recipe", [OWN, SEQUENTIAL], ids=lambda recipe: recipe.label)
def test_pruning_goes_on_at_the_layer_where_it_was(recipe: Any, bench: Workbench, stopping: Count) -> None:
    profile = bench.profile(ignore)
    order = order_allocation(recipe, plan(bench, profile, 0.4, recipe))
    event = Event()
    pruned = stopping(tools.workbench.layer_pruning, "prune_layer", event, 9)
    with stop_at(event), pytest.raises(Stopped):
        bench.pruner.prune(profile, order, ignore)
    assert len(pruned) == 9
    bench = again(bench)
    checkpoint = bench.pruner.prune(profile, order, ignore)
    assert len(pruned) == 14, "every layer was pruned once"
    bits = snapshot(bench)
    alone = open_bench(bench.settings, bench.directory.parent / "alone")
    assert alone.pruner.prune(alone.profile(ignore), order, ignore) == checkpoint
    assert all((bits[name] == value).all() for name, value in snapshot(alone).items())


@pytest.mark.parametrize("split", ["dense", "validation", "test"])
def test_every_window_is_measured_once(split: Any, bench: Workbench, stopping: Count) -> None:
    alone = open_bench(bench.settings, bench.directory.parent / "alone")
    profile = alone.profile(ignore)
    checkpoint = prune(alone, profile, 0.4)
    expected = (
        alone.profiles.read(profile).dense
        if split == "dense"
        else alone.evaluator.evaluate(checkpoint, split, profile, ignore)
    )
    files = list_files(alone)
    bench, count = open_bench(bench.settings, bench.directory), 2 if split == "test" else 3
    if split != "dense":
        bench.profile(ignore)
        prune(bench, profile, 0.4)
    event = Event()
    windows = stopping(tools.measure.losses, "measure_losses", event, count - 1)

    def measure() -> Any:
        if split == "dense":
            return bench.profiles.read(bench.profile(ignore)).dense
        return bench.evaluator.evaluate(checkpoint, split, profile, ignore)

    with stop_at(event), pytest.raises(Stopped):
        measure()
    assert len(windows) == count - 1
    bench = again(bench)
    assert measure() == expected and len(windows) == count
    if split != "dense":
        assert list_files(bench) == files
    else:
        assert bench.profile(ignore) == profile


def test_every_batch_of_questions_is_asked_once(
    asking: Any, tmp_path: Path, stopping: Count, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tools.measure.recall, "BATCH", 1)
    alone = open_bench(asking, tmp_path / "alone")
    expected = alone.evaluator.ask("dense", "validation", ignore)
    bench = open_bench(asking, tmp_path / "run")
    event = Event()
    batches = stopping(tools.measure.recall, "read_answers", event, 3)
    with stop_at(event), pytest.raises(Stopped):
        bench.evaluator.ask("dense", "validation", ignore)
    bench = again(bench)
    assert bench.evaluator.ask("dense", "validation", ignore) == expected and len(batches) == 4
    assert list_files(bench) == list_files(alone)
