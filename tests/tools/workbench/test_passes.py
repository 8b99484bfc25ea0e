"""Evaluations of a streamed model that are killed between two blocks."""

from pathlib import Path
from typing import Any

import pytest

import tools.workbench.unfinished
from tests.benches import ignore, open_bench, prune
from tests.tiny import tiny_settings
from tools.base.progress import Progress
from tools.measure.losses import Evaluation
from tools.models.blocks import Blocks
from tools.workbench.bench import Workbench


class Killed(BaseException):
    """Nobody catches it."""


def die_before(block: int, label: str) -> Progress:
    """A progress that ends it all before a block (of two, and of four windows)."""

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
    return bench.evaluate(checkpoint, "validation", profile, progress)


def test_it_goes_on_before_the_block_that_it_had_come_to(
    tiny_llama: Path, tmp_path: Path, ran: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tools.workbench.unfinished, "KEEP_SECONDS", 0.0)
    settings = tiny_settings(tiny_llama, device="stream")
    bench = open_bench(settings, tmp_path / "whole")
    whole = bench.profile(ignore)
    expected = evaluate(bench, prune(bench, whole, 0.5), whole)

    bench = open_bench(settings, tmp_path / "killed")
    with pytest.raises(Killed):
        bench.profile(die_before(1, "dense validation"))
    bench = open_bench(settings, tmp_path / "killed")
    ran.clear()
    assert bench.profile(ignore) == whole
    assert 0 not in ran[: settings.validation_windows] and set(ran[: settings.validation_windows]) == {1}
    checkpoint = prune(bench, whole, 0.5)
    with pytest.raises(Killed):
        evaluate(bench, checkpoint, whole, die_before(1, "validation"))
    bench = open_bench(settings, tmp_path / "killed")
    ran.clear()
    assert evaluate(bench, checkpoint, whole) == expected and set(ran) == {1}
    files = [path for path in bench.store.directory.rglob("*.safetensors") if b'"states"' in path.read_bytes()[:400]]
    assert files == [], "all that was kept of a pass went with it"


def test_what_other_weights_passed_on_is_of_no_use(
    tiny_llama: Path, tmp_path: Path, ran: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tools.workbench.unfinished, "KEEP_SECONDS", 0.0)
    settings = tiny_settings(tiny_llama, device="stream")
    bench = open_bench(settings, tmp_path / "run")
    profile = bench.profile(ignore)
    first, second = prune(bench, profile, 0.3), prune(bench, profile, 0.6)
    with pytest.raises(Killed):
        evaluate(bench, first, profile, die_before(1, "validation"))
    ran.clear()
    evaluate(bench, second, profile)
    assert set(ran) == {0, 1}
