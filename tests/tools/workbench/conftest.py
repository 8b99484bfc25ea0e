"""What the tests of the workbench begin with."""

import json
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import tools.statistics.table
from billhook_kernels.guard import Pruned
from billhook_kernels.methods import prune_weight
from tests.benches import open_bench
from tests.tiny import tiny_settings
from tools.workbench.bench import Workbench

WORDS = ["river", "stone", "bright", "engine", "quiet", "seven", "market"]


@pytest.fixture
def bench(tiny_llama: Path, tmp_path: Path, workbench_closed: None) -> Workbench:
    """A fresh workbench whose warnings fail the test."""
    return open_bench(tiny_settings(tiny_llama), tmp_path / "run")


@pytest.fixture
def warnings(bench: Workbench) -> list[str]:
    """The warnings of a workbench, which then fail nothing."""
    seen: list[str] = []
    bench.warn = seen.append
    return seen


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """(method, zeros) of every layer that is really computed."""
    calls: list[tuple[str, int]] = []

    def count(method: str, weight_OI: Tensor, statistics: Any, zeros: int, **options: Any) -> Pruned:
        calls.append((method, zeros))
        return prune_weight(method, weight_OI, statistics, zeros, **options)

    monkeypatch.setattr(tools.statistics.table, "prune_weight", count)
    return calls


@pytest.fixture
def asking(tiny_llama: Path, tmp_path: Path, workbench_closed: None) -> Any:
    """Settings of a run with questions, and text enough for any share of them."""
    rows = [{"question": f"What is number {i} of {WORDS[i % 7]}?", "answer": WORDS[i % 5]} for i in range(300)]
    (tmp_path / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = {}
    for i, split in enumerate(("calibration", "validation", "test")):
        words = (WORDS[(i + j * j + j // 5) % 7] + str((7 * i + j * j) % 1000) for j in range(3000))
        path = tmp_path / f"{split}.txt"
        path.write_text(" ".join(words))
        texts[split] = f"file:{path}"
    return tiny_settings(
        tiny_llama, **texts, questions=f"file:{tmp_path / 'qa.jsonl'}", question_pairs=4, calibration_windows=8
    )
