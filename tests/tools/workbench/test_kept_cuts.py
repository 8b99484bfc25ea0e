"""Walks of a cut of a streamed model that are killed between two blocks, or two measurements."""

from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from torch import Tensor

import tools.base.memory
import tools.models.unfinished
from tests.benches import damage, ignore, open_bench, same, snapshot
from tests.tiny import save_tiny_model, tiny_settings
from tools.base.progress import Progress, Stopped, stop_at
from tools.models.blocks import Blocks
from tools.models.unfinished import UNFINISHED
from tools.plans.cuts import CutOrder, Parts
from tools.plans.recipe import Recipe
from tools.plans.work_order import WorkOrder, order_all
from tools.surgery.share import find_target
from tools.workbench.bench import Workbench
from tools.workbench.open import close_workbench

BLOCKS = 4


class Killed(BaseException):
    """Nobody catches it."""


def kill(*_: Any) -> None:
    raise Killed


def die_at(step: str, done: int) -> Progress:
    def tell(told: str, now: int, _of: int) -> None:
        if (told, now) == (step, done):
            raise Killed

    return tell


@pytest.fixture
def reopen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Workbench]:
    """A run by its name, opened as after a kill; whatever is kept is, and not once a minute."""
    monkeypatch.setattr(tools.models.unfinished, "KEEP_SECONDS", 0.0)
    model = save_tiny_model(tmp_path / "model", "llama", num_hidden_layers=BLOCKS)

    def begin(name: str) -> Workbench:
        close_workbench()
        return open_bench(tiny_settings(model, device="stream"), tmp_path / name)

    return begin


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The first of the blocks of every forward of some."""
    seen, only = list[int](), Blocks.only

    def see(self: Blocks, first: int, end: int, ids_T: Tensor, hidden_BTD: Tensor | None = None) -> Any:
        seen.append(first)
        return only(self, first, end, ids_T, hidden_BTD)

    monkeypatch.setattr(Blocks, "only", see)
    return seen


def measure(bench: Workbench, progress: Progress = ignore) -> Parts:
    profile, target = bench.profiles.make_bare(ignore), find_target(bench.model, 0.6)
    return bench.cuts.read(bench.cuts.measure(profile, target, progress))


def order(bench: Workbench, parts: Parts, dropped: tuple[int, ...]) -> WorkOrder:
    cut = CutOrder(parts=parts.artifact, **{"heads": 0, "neurons": 8, "dropped": dropped, "refit": True})
    zeros = {layer.name: layer.weight_OI.numel() // 2 for layer in bench.weights.layers}
    return order_all(Recipe(), zeros, sparsity=0.5, predicted_kl=0.0).model_copy(update={"cut": cut})


def test_a_seed_draws_other_labels_for_the_curves(tmp_path: Path, workbench_closed: None) -> None:
    model = save_tiny_model(tmp_path / "model", "llama", num_hidden_layers=BLOCKS)
    first, same_again, other = (
        measure(open_bench(tiny_settings(model, seed=seed), tmp_path / f"run-{number}"))
        for number, seed in enumerate((0, 0, 1))
    )
    assert first.neurons == same_again.neurons != other.neurons
    assert first.order == other.order, "whole blocks are measured, and no label is drawn"


@pytest.mark.parametrize("at", [2, BLOCKS + 1])
def test_curves_go_on_before_the_block_that_they_had_come_to(
    at: int, reopen: Callable[[str], Workbench], ran: list[int], workbench_closed: None
) -> None:
    expected = measure(reopen("whole"))
    with pytest.raises(Killed):
        measure(reopen("killed"), die_at("curves of units", at))
    bench, told = reopen("killed"), list[int]()
    bench.profiles.make_bare(ignore)
    ran.clear()

    def tell(step: str, done: int, of: int) -> None:
        told.extend([done] if step == "curves of units" and of > 1 else [])

    assert measure(bench, tell) == expected
    assert told == list(range(at, 2 * BLOCKS))
    walk = [*range(BLOCKS), *reversed(range(BLOCKS))][at:]
    windows = bench.settings.calibration_windows
    looked, walked = ran[:2], ran[2:]
    assert looked == [0, 0], "whether a block of zeros passes on what it reads"
    assert walked[: len(walk) * windows] == [block for block in walk for _ in range(windows)]
    assert not (bench.directory / UNFINISHED).exists(), "all that was kept of a walk went with it"


def test_what_was_kept_of_curves_and_is_damaged_is_measured_again(
    reopen: Callable[[str], Workbench], workbench_closed: None
) -> None:
    expected = measure(reopen("whole"))
    bench = reopen("killed")
    with pytest.raises(Killed):
        measure(bench, die_at("curves of units", BLOCKS + 1))
    [kept] = (bench.directory / UNFINISHED).glob("curves-*")
    damage(kept / "inputs" / "0.safetensors")
    steps = list[str]()
    assert measure(reopen("killed"), lambda step, done, _of: steps.append(f"{step} {done}")) == expected
    assert "curves of units 0" in steps


def test_what_a_block_costs_is_not_measured_again(
    reopen: Callable[[str], Workbench], ran: list[int], workbench_closed: None
) -> None:
    expected, at = measure(reopen("whole")), 2
    with pytest.raises(Killed):
        measure(reopen("killed"), die_at("search block 1 to drop", at))
    bench = reopen("killed")
    bench.profiles.make_bare(ignore)
    again, known = list[int](), dict[str, int]()

    def count(step: str, done: int, of: int) -> None:
        if step == "search block 1 to drop" and of > 1:
            again.append(len(ran) - known.get("ran", 0))
            known["ran"] = len(ran)

    assert measure(bench, count) == expected
    assert again[1 : at + 1] == [0] * at, "those that were measured"
    assert all(again[at + 1 :])


@pytest.mark.parametrize(("dropped", "at"), [((1,), 3), ((2,), 1)])
def test_a_cut_is_fitted_on_from_the_block_that_it_had_come_to(
    dropped: tuple[int, ...],
    at: int,
    reopen: Callable[[str], Workbench],
    workbench_closed: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = reopen("whole")
    parts, profile = measure(bench), bench.profiles.make_bare(ignore)
    expected, made = bench.pruner.prune(profile, order(bench, parts, dropped), ignore), snapshot(bench)

    monkeypatch.setattr(tools.base.memory, "SHARE", 0.0)  # what passes between the blocks lies on disk
    bench = reopen("killed")
    assert measure(bench) == parts
    with pytest.raises(Killed):
        bench.pruner.prune(profile, order(bench, parts, dropped), die_at("fold and fit", at))
    told, bench = list[int](), reopen("killed")

    def tell(step: str, done: int, of: int) -> None:
        told.extend([done] if step == "fold and fit" else [])

    assert bench.pruner.prune(profile, order(bench, parts, dropped), tell) == expected
    assert told == [block for block in range(at, BLOCKS + 1) if block not in dropped]
    assert same(snapshot(bench), made)
    assert not (bench.directory / UNFINISHED).exists(), "all that was kept of a walk went with it"


def test_whoever_stops_a_cut_waits_for_no_block(reopen: Callable[[str], Workbench], workbench_closed: None) -> None:
    bench, event = reopen("stopped"), Event()
    told: list[tuple[str, int]] = []

    def ask_at(step: str, done: int) -> Progress:
        def tell(at: str, now: int, _of: int) -> None:
            told.append((at, now))
            if (at, now) == (step, done):
                event.set()

        return tell

    for step, done in (("curves of units", 1), ("curves of units", BLOCKS + 1)):
        with stop_at(event), pytest.raises(Stopped):
            measure(bench, ask_at(step, done))
        assert told[-1] == (step, done)
        event.clear()
    parts, profile = measure(bench), bench.profiles.make_bare(ignore)
    with stop_at(event), pytest.raises(Stopped):
        bench.pruner.prune(profile, order(bench, parts, ()), ask_at("fold and fit", 2))
    assert told[-1] == ("fold and fit", 2)
    event.clear()
    assert bench.pruner.prune(profile, order(bench, parts, ()), ignore)
