"""Evaluations and walks of a streamed model that are killed between two blocks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tools.base.memory
import tools.models.unfinished
import tools.statistics.kept_passages
import tools.workbench.layer_pruning
from tests.benches import SEQUENTIAL, damage, ignore, open_bench, plan, prune
from tests.team import gather_teams
from tests.tiny import save_tiny_model, tiny_settings
from tools.base.progress import Progress
from tools.models.blocks import Blocks
from tools.models.unfinished import UNFINISHED
from tools.plans.work_order import order_allocation
from tools.results.losses import Evaluation
from tools.workbench.bench import Workbench
from tools.workbench.open import close_workbench


def keep_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is kept, and not once a minute."""
    for module in (tools.models.unfinished, tools.statistics.kept_passages):
        monkeypatch.setattr(module, "KEEP_SECONDS", 0.0)


class Killed(BaseException):
    """Nobody catches it."""


def reopen(settings: Any, directory: Path) -> Workbench:
    """As the next process does."""
    close_workbench()
    return open_bench(settings, directory)


def die_before(block: int, label: str) -> Progress:
    """A progress that ends it all before a block (of two, and of four windows); before the third, at the end."""

    def tell(told: str, done: int, total: int) -> None:
        if told == label and total and done >= block * total // 2 > 0:
            raise Killed

    return tell


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The blocks that were run to the head, one for each window."""
    seen, run = list[int](), Blocks.run_to_head

    def see(self: Blocks, ids_T: Any, block: int, states: Any) -> Any:
        seen.append(block)
        return run(self, ids_T, block, states)

    monkeypatch.setattr(Blocks, "run_to_head", see)
    return seen


def evaluate(bench: Workbench, checkpoint: str, profile: str, progress: Progress = ignore) -> Evaluation:
    return bench.evaluator.evaluate(checkpoint, "validation", profile, progress)


@pytest.mark.parametrize("workers", ["", "2"])
def test_it_goes_on_before_the_block_that_it_had_come_to(
    workers: str, tiny_llama: Path, tmp_path: Path, ran: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_at_once(monkeypatch)
    gather_teams(monkeypatch)
    settings = tiny_settings(tiny_llama, device="stream", workers=workers)
    bench = open_bench(settings, tmp_path / "whole")
    whole = bench.profile(ignore)
    expected = evaluate(bench, prune(bench, whole, 0.5), whole)

    if not workers:  # what passes between the blocks lies on disk
        monkeypatch.setattr(tools.base.memory, "SHARE", 0.0)
    bench = open_bench(settings, tmp_path / "killed")
    with pytest.raises(Killed):
        bench.profile(die_before(1, "dense validation"))
    bench = reopen(settings, tmp_path / "killed")
    ran.clear()
    assert bench.profile(ignore) == whole
    assert 0 not in ran[: settings.validation_windows] and set(ran[: settings.validation_windows]) == {1}
    checkpoint = prune(bench, whole, 0.5)
    with pytest.raises(Killed):
        evaluate(bench, checkpoint, whole, die_before(1, "validation"))
    bench = reopen(settings, tmp_path / "killed")
    ran.clear()
    assert evaluate(bench, checkpoint, whole) == expected and set(ran) == {1}
    assert not (bench.directory / UNFINISHED).exists(), "all that was kept of a pass went with it"


def test_what_other_weights_passed_on_is_of_no_use(
    tiny_llama: Path, tmp_path: Path, ran: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_at_once(monkeypatch)
    settings = tiny_settings(tiny_llama, device="stream")
    bench = open_bench(settings, tmp_path / "run")
    profile = bench.profile(ignore)
    first, second = prune(bench, profile, 0.3), prune(bench, profile, 0.6)
    with pytest.raises(Killed):
        evaluate(bench, first, profile, die_before(1, "validation"))
    ran.clear()
    evaluate(bench, second, profile)
    assert set(ran) == {0, 1}


@pytest.fixture
def walked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The blocks that were passed, up or on the way down, one for each window."""
    seen = list[tuple[str, int]]()

    def watch(name: str, way: str) -> None:
        run = getattr(Blocks, name)

        def see(self: Blocks, ids_T: Any, block: int, states: Any) -> Any:
            seen.append((way, block))
            return run(self, ids_T, block, states)

        monkeypatch.setattr(Blocks, name, see)

    watch("run", "up")  # and below the last block on the way down
    watch("run_to_head", "down")
    return seen


def list_passed(bench: Workbench) -> list[Path]:
    """What is kept of walks."""
    return [*(bench.directory / UNFINISHED).glob("*")]


BACK = [("down", 0), ("up", 0)]

AGAIN = {
    "statistics": [("up", 1)] * 4 + [("down", 1)] * 2 + BACK * 2,  # the second block, and all of the way down
    "gradients": BACK * 2,
}
"""Where a walk of four windows up and two down is killed, once it stands before the last block of its way."""


@pytest.mark.parametrize("workers", ["", "2"])
@pytest.mark.parametrize(("label", "again"), AGAIN.items())
def test_a_walk_goes_on_at_the_block_that_it_had_come_to(
    label: str,
    again: list[tuple[str, int]],
    workers: str,
    tiny_llama: Path,
    tmp_path: Path,
    walked: list[tuple[str, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keep_at_once(monkeypatch)
    gather_teams(monkeypatch)
    sizes = {"calibration_windows": 4, "gradient_windows": 2}
    settings = tiny_settings(tiny_llama, device="stream", workers=workers, **sizes)
    bench = open_bench(settings, tmp_path / "whole")
    expected = bench.profile(ignore)
    assert list_passed(bench) == [], "all that was kept of a walk went with it"

    if not workers:  # what passes between the blocks lies on disk
        monkeypatch.setattr(tools.base.memory, "SHARE", 0.0)
    bench = open_bench(settings, tmp_path / "killed")
    with pytest.raises(Killed):
        bench.profile(die_before(2, label))
    assert len(list_passed(bench)) == 1
    bench = reopen(settings, tmp_path / "killed")
    walked.clear()
    assert bench.profile(ignore) == expected
    assert sorted(walked) == sorted(again), "the dense model's losses were known, too"
    assert list_passed(bench) == []


def test_pruning_goes_on_before_the_block_that_it_was_in(
    tiny_llama: Path, tmp_path: Path, walked: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_at_once(monkeypatch)
    settings = tiny_settings(tiny_llama, device="stream", calibration_windows=4)
    bench = open_bench(settings, tmp_path / "whole")
    profile = bench.profile(ignore)
    expected = prune(bench, profile, 0.4, SEQUENTIAL)

    pruned, prune_layer = list[int](), tools.workbench.layer_pruning.prune_layer

    def die(*arguments: Any) -> Any:
        pruned.append(len(pruned))
        if len(pruned) == 10:  # of seven layers of each of two blocks
            raise Killed
        return prune_layer(*arguments)

    bench = open_bench(settings, tmp_path / "killed")
    assert bench.profile(ignore) == profile
    order = order_allocation(SEQUENTIAL, plan(bench, profile, 0.4, SEQUENTIAL))
    monkeypatch.setattr(tools.workbench.layer_pruning, "prune_layer", die)
    with pytest.raises(Killed):
        bench.pruner.prune(profile, order, ignore)
    bench = reopen(settings, tmp_path / "killed")
    walked.clear()
    assert bench.pruner.prune(profile, order, ignore) == expected and {block for _, block in walked} == {1}
    assert list_passed(bench) == []


@pytest.mark.parametrize("hurt", [damage, Path.unlink])
def test_of_a_walk_that_was_damaged_nothing_is_taken(
    hurt: Callable[[Path], None], tiny_llama: Path, tmp_path: Path, walked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_at_once(monkeypatch)
    settings = tiny_settings(tiny_llama, device="stream", calibration_windows=4, gradient_windows=2)
    expected = open_bench(settings, tmp_path / "whole").profile(ignore)

    bench = open_bench(settings, tmp_path / "killed")
    with pytest.raises(Killed):
        bench.profile(die_before(2, "gradients"))
    [lowest] = list_passed(bench)[0].rglob("inputs/0.safetensors")
    hurt(lowest)
    bench = reopen(settings, tmp_path / "killed")
    walked.clear()
    assert bench.profile(ignore) == expected
    assert [way for way, _ in walked].count("down") == 4, "the gradient windows passed both blocks once more"


def test_gradients_in_other_weights_are_of_no_use(tiny_llama: Path, tmp_path: Path, monkeypatch: Any) -> None:
    keep_at_once(monkeypatch)
    settings = tiny_settings(tiny_llama, device="stream", calibration_windows=4, gradient_windows=2)
    bench = open_bench(settings, tmp_path / "run")
    first = bench.profile(ignore)
    checkpoints = [prune(bench, first, sparsity) for sparsity in (0.3, 0.6)]
    expected = bench.profile(ignore, first)  # the model is as the second left it

    bench = open_bench(settings, tmp_path / "killed")
    assert bench.profile(ignore) == first
    assert [prune(bench, first, sparsity) for sparsity in (0.3, 0.6)] == checkpoints
    bench.pruner.restore(checkpoints[0])
    with pytest.raises(Killed):
        bench.profile(die_before(2, "gradients"), first)
    bench.pruner.restore(checkpoints[1])
    assert bench.profile(ignore, first) == expected


@pytest.mark.parametrize("label", ["dense validation", *AGAIN])
def test_of_rows_that_only_who_packed_them_can_take_apart_nothing_is_kept(
    label: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of Gemma 3n, whose later blocks read keys and values of earlier ones."""
    keep_at_once(monkeypatch)
    model = save_tiny_model(tmp_path / "model", "gemma3n")
    settings = tiny_settings(model, device="stream", calibration_windows=4, gradient_windows=2)
    expected = open_bench(settings, tmp_path / "whole").profile(ignore)
    with pytest.raises(Killed):
        open_bench(settings, tmp_path / "killed").profile(die_before(1 if label == "dense validation" else 2, label))
    assert reopen(settings, tmp_path / "killed").profile(ignore) == expected


def test_what_a_killed_process_left_goes_with_the_next_one(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_at_once(monkeypatch)
    streamed = tiny_settings(tiny_llama, device="stream", calibration_windows=4, gradient_windows=2)
    bench = open_bench(streamed, tmp_path / "run")
    with pytest.raises(Killed):
        bench.profile(die_before(2, "statistics"))
    (tmp_path / "run" / ".loading-1").mkdir()
    assert len(list_passed(bench)) == 1
    bench = reopen(streamed.model_copy(update={"device": "cpu"}), tmp_path / "run")
    assert list_passed(bench) == [], "a model that is held has no use of it"
    assert not (tmp_path / "run" / ".loading-1").exists()
