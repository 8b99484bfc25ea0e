"""One model at a time in a process."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import tools.statistics.collect
import tools.workbench.bench
from tests.benches import open_bench
from tests.named import name_texts
from tests.rows import prose, write_rows
from tests.situations import ignore
from tests.tiny import tiny_settings
from tools.base.errors import UserError
from tools.plans.allocate import allocate
from tools.plans.recipe import Recipe
from tools.plans.work_order import order_allocation
from tools.workbench.open import close_workbench

MASK = Recipe(method="two-sided", refit=False)


def test_one_workbench_at_a_time(tiny_llama: Path, tmp_path: Path, workbench_closed: None) -> None:
    settings = tiny_settings(tiny_llama)
    first = open_bench(settings, tmp_path / "a")
    assert open_bench(tiny_settings(tiny_llama), tmp_path / "a" / ".." / "a") is first
    second = open_bench(settings, tmp_path / "b")
    assert second is not first
    assert open_bench(settings, tmp_path / "b") is second
    assert open_bench(tiny_settings(tiny_llama, seed=1), tmp_path / "b") is not second


def test_other_named_texts_go_on_with_the_loaded_model_and_the_same_figures(
    tiny_llama: Path, tmp_path: Path, workbench_closed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[str] = []
    load = tools.workbench.bench.load_model

    def count_load(settings: Any, scratch: Path) -> Any:
        loads.append(settings.model)
        return load(settings, scratch)

    monkeypatch.setattr(tools.workbench.bench, "load_model", count_load)
    named = name_texts(tmp_path)
    first = open_bench(tiny_settings(tiny_llama, **named), tmp_path / "run")
    layers = first.curves.describe_layers(first.profile(ignore), MASK, ignore)
    zeros = allocate(layers, 0.5, MASK)
    first.pruner.prune(first.profile(ignore), order_allocation(MASK, zeros), ignore)
    assert first.weights.count_zeros()[0] > 0
    other = {**named, "text_weights": {"code": 1, "prose": 1}}
    second = open_bench(tiny_settings(tiny_llama, **other), tmp_path / "run")
    assert second is not first and second.model is first.model and len(loads) == 1
    assert second.weights.count_zeros() == (0, first.weights.count_zeros()[1]), "its weights are dense"
    profile = second.profile(ignore)
    fresh = open_bench(tiny_settings(tiny_llama, **other), tmp_path / "fresh")
    assert len(loads) == 2, "another directory is another run"
    assert fresh.profile(ignore) == profile
    open_bench(tiny_settings(tiny_llama, seed=1, **other), tmp_path / "fresh")
    assert len(loads) == 3, "other settings may be another model"


def test_of_texts_beside_another_nothing_walks_up_again_and_figures_are_the_same(
    tiny_llama: Path, tmp_path: Path, workbench_closed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    walks: list[tuple[float, ...]] = []
    begin = tools.statistics.collect.begin_walk

    def watch(*given: Any, **more: Any) -> Any:
        walks.append(tuple(more["shares"]))
        return begin(*given, **more)

    monkeypatch.setattr(tools.statistics.collect, "begin_walk", watch)
    named = name_texts(tmp_path)
    first = open_bench(tiny_settings(tiny_llama, **named), tmp_path / "run")
    first.profile(ignore)
    third = write_rows(tmp_path / "tales.jsonl", [{"text": prose(4000, 2500)}])
    other = {"text": {**named["text"], "tales": third}, "text_weights": {"code": 3, "prose": 1, "tales": 0}}
    walks.clear()
    second = open_bench(tiny_settings(tiny_llama, **other), tmp_path / "run")
    profile, third_of_all = second.profile(ignore), pytest.approx([1 / 3] * 3)
    assert walks[0] == (0, 0, 1) and walks[1] == third_of_all and len(walks) == 2
    fresh = open_bench(tiny_settings(tiny_llama, **other), tmp_path / "fresh")
    assert fresh.profile(ignore) == profile and len(walks) == 2 + 4


def test_a_failed_opening_can_be_tried_again(tiny_llama: Path, tmp_path: Path, workbench_closed: None) -> None:
    with pytest.raises(UserError, match="is too short"):
        open_bench(tiny_settings(tiny_llama, calibration_windows=60000), tmp_path / "run")
    open_bench(tiny_settings(tiny_llama), tmp_path / "run")


def test_how_to_open_and_close_is_known_without_torch() -> None:
    code = "import sys, tools.workbench.open, tools.workbench.store; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])


def test_a_model_or_text_that_is_another_by_the_same_name_is_refused(
    tiny_llama: Path, tmp_path: Path, workbench_closed: None
) -> None:
    model, text = tmp_path / "model", tmp_path / "text.txt"
    shutil.copytree(tiny_llama, model)
    text.write_text(prose(0, 900))
    settings = tiny_settings(model, validation=f"file:{text}")
    open_bench(settings, tmp_path / "run")
    close_workbench()
    open_bench(settings, tmp_path / "run")
    close_workbench()
    text.write_text(prose(5000, 900))
    with pytest.raises(UserError, match=r"^a text is another than when this was begun, by the same name: .*directory$"):
        open_bench(settings, tmp_path / "run")
    text.write_text(prose(0, 900))
    weights = load_file(model / "model.safetensors")
    norm = {name: 2 * weight if name == "model.norm.weight" else weight for name, weight in weights.items()}
    save_file(norm, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"^model .*model is another than when this was begun, by the same name: "):
        open_bench(settings, tmp_path / "run")
    save_file({name: 2 * weight for name, weight in weights.items()}, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"^model .*model is another than when this was begun, by the same name: "):
        open_bench(settings, tmp_path / "run")
    open_bench(settings, tmp_path / "other")


def test_what_a_killed_process_was_writing_is_deleted(tiny_llama: Path, tmp_path: Path, workbench_closed: None) -> None:
    artifacts = tmp_path / "run" / "artifacts"
    (artifacts / ".loading-x").mkdir(parents=True)
    for left in (artifacts / ".loading-x" / "part", artifacts / ".mapped-y", artifacts / ".new.safetensors.z"):
        left.write_text("x")
    open_bench(tiny_settings(tiny_llama), tmp_path / "run")
    assert [*artifacts.rglob(".*")] == []
