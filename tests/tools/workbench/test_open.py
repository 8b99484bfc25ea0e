"""One model at a time in a process."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.benches import open_bench
from tests.tiny import tiny_settings
from tools.base.errors import UserError


def test_one_workbench_at_a_time(tiny_llama: Path, tmp_path: Path, workbench_closed: None) -> None:
    settings = tiny_settings(tiny_llama)
    first = open_bench(settings, tmp_path / "a")
    assert open_bench(tiny_settings(tiny_llama), tmp_path / "a" / ".." / "a") is first
    second = open_bench(settings, tmp_path / "b")
    assert second is not first
    assert open_bench(settings, tmp_path / "b") is second
    assert open_bench(tiny_settings(tiny_llama, seed=1), tmp_path / "b") is not second


def test_a_failed_opening_can_be_tried_again(tiny_llama: Path, tmp_path: Path, workbench_closed: None) -> None:
    with pytest.raises(UserError, match="is too short"):
        open_bench(tiny_settings(tiny_llama, calibration_windows=60000), tmp_path / "run")
    open_bench(tiny_settings(tiny_llama), tmp_path / "run")


def test_how_to_open_and_close_is_known_without_torch() -> None:
    code = "import sys, tools.workbench.open, tools.workbench.store; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])
