"""An opened workbench of a tiny model, as benchmarks of speed have it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tiny import tiny_settings
from tools.base.progress import ignore_progress
from tools.base.settings import TEAM
from tools.experiments.speed import BenchSettings, Site
from tools.workbench.open import use_workbench


@pytest.fixture
def site(tiny_llama: Path, tmp_path: Path, workbench_closed: None) -> Iterator[Site]:
    """An opened workbench of a tiny model."""
    settings = BenchSettings(**tiny_settings(tiny_llama).model_dump(exclude=set(TEAM)), rounds=2)
    with use_workbench(settings, tmp_path / "work", pytest.fail, ignore_progress) as bench:
        yield Site(bench, settings)
