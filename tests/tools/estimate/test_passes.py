"""How often a streamed model's blocks come from disk, beside what was foreseen."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.benches import ignore, open_bench
from tests.tiny import make_tiny_model, save_tiny_model, tiny_settings
from tools.estimate.course import Course, CutCourse
from tools.estimate.cut_work import list_cut_end, list_cut_work
from tools.estimate.cutting import CUT, find_cutting
from tools.estimate.phases import ASKED_FOR, cut_parts
from tools.estimate.prices import Pricing
from tools.estimate.work import find_shares, list_work
from tools.measure.continuations import PROMPTS, continue_prompts
from tools.models.disk import list_disk
from tools.models.layers import find_layers
from tools.models.streamed import Stream
from tools.plans.allocate import allocate
from tools.plans.cuts import CutOrder
from tools.plans.recipe import Recipe, parse_recipe
from tools.plans.work_order import order_all, order_allocation
from tools.statistics.shards import count_waiting
from tools.workbench.bench import Workbench

BLOCKS = 8
LABELS = ("refit:kappa-mask", "refit:kappa", "refit~sequential:kappa-mask")


@pytest.fixture
def deep(tmp_path: Path) -> Path:
    """A tiny model of so many blocks that the ends of a walk, where it turns, weigh little."""
    return save_tiny_model(tmp_path / "deep", num_hidden_layers=BLOCKS)


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How many blocks were copied from disk, under no name yet."""
    counted, copy = Counter[str](), Stream._copy

    def count(self: Stream, block: int, parameters: Any) -> Any:
        counted[""] += block not in self._copied
        return copy(self, block, parameters)

    monkeypatch.setattr(Stream, "_copy", count)
    return counted


def count_disk(settings: Any, at_once: int) -> int:
    model = make_tiny_model("llama", num_hidden_layers=BLOCKS)
    layers = find_layers(model)
    in_source, waiting = {layer.name for layer in layers}, count_waiting(settings.calibration_windows)
    lines = list_disk(model, layers, settings, at_once=at_once, streamed=True, in_source=in_source, waiting=waiting)
    return sum(line.bytes for line in lines)


def carry_out(bench: Workbench, copied: Counter[str]) -> dict[str, float]:
    """A round by each recipe; how often all blocks were copied, by the name of what was done."""
    found: dict[str, float] = {}

    def tell(name: str) -> None:
        found[name] = copied.pop("", 0) / BLOCKS

    tell("open")
    profile = bench.profile(ignore, masks_only=True)
    tell("profile")
    for label in LABELS:
        recipe = parse_recipe(label)
        layers = bench.describe_layers(profile, recipe, ignore)
        tell(f"curves of {label}")
        checkpoint = bench.prune(profile, order_allocation(recipe, allocate(layers, 0.5, recipe)), ignore)
        tell(label)
        bench.evaluate(checkpoint, "validation", profile, ignore)
        tell("validate")
    bench.evaluate(checkpoint, "test", profile, ignore)
    tell("test")
    continue_prompts(bench.model, bench.tokenizer, PROMPTS)
    tell("prompts")
    return found


@pytest.mark.parametrize("at_once", [None, 3])
def test_what_comes_from_disk_is_foreseen(
    deep: Path, tmp_path: Path, copied: Counter[str], at_once: int | None
) -> None:
    """Second moments are kept, or of so many blocks at a time."""
    settings = tiny_settings(deep, device="stream")
    if at_once:
        settings = settings.model_copy(update={"disk": count_disk(settings, at_once) / 1e9})
    bench = open_bench(settings, tmp_path / "run", warn=lambda text: None)
    found = carry_out(bench, copied)
    course = Course([*map(parse_recipe, LABELS)], tests=1, prompts=len(PROMPTS), continuing=1)
    shares = find_shares(settings, bench.layers, cut_parts(settings, 0)[0])
    out = (math.ceil(BLOCKS / at_once) + 1) / 2 if at_once else 0.0
    work = list_work(settings, len(bench.layers), shares, course, Pricing({}, None), streamed=True, setting_out=out)
    steps = {(step.name, step.how if step.name == "prune" else ""): step.passes for step in work}
    opening, *profile = [passes for (name, _), passes in steps.items() if name[:4] in ("load", "vali", "prof")][:5]
    prune = [passes for (name, _), passes in steps.items() if name == "prune"]
    expected = {
        "open": opening - 2,  # it is laid out from the files that it is loaded from, and exported, too
        "profile": sum(profile) - 1,  # second moments are collected by the round that asks for them
        "curves of refit:kappa": steps[(ASKED_FOR, "")],
        # second moments, in the first of them where they are kept; dense weights are read from where they lie
        "refit:kappa-mask": prune[0] - bool(at_once),
        "refit:kappa": prune[0] - 1,
        "refit~sequential:kappa-mask": prune[1] - 1,
        "validate": steps[("validate", "")],
        "test": steps[("test", "")],
        "prompts": steps[("go on with prompts", "")],
    }
    for name, passes in expected.items():
        assert math.ceil(found[name]) == passes, (name, found[name], passes)
    assert found["curves of refit:kappa-mask"] == 0


def test_of_a_cut_no_more_comes_from_disk_than_foreseen(deep: Path, tmp_path: Path, copied: Counter[str]) -> None:
    bench = open_bench(tiny_settings(deep, device="stream"), tmp_path / "run")
    profile, found = bench.profile_bare(ignore), list[float]()

    def tell() -> None:
        found.append(copied.pop("", 0) / BLOCKS)

    tell()
    target = bench.cuts.find_target(0.7, 0.0, ignore)
    parts = bench.cuts.read(bench.measure_parts(profile, target, ignore))
    tell()
    gone = {"heads": 0, "neurons": 8, "dropped": tuple(sorted(parts.order[:2])), "refit": True}
    layers = bench.read_profile(profile).layers
    order = order_all(Recipe(), {layer.name: layer.weights for layer in layers}, sparsity=0.3, predicted_kl=0.0)
    order = order.model_copy(update={"cut": CutOrder(parts=parts.artifact, **gone)})
    checkpoint = bench.prune(profile, order, ignore)
    tell()
    assert bench.pruner.build_cut(checkpoint) is not None
    tell()

    cutting = find_cutting(bench.model, bench.layers, CutCourse(1, 0.7, 8))
    assert len(parts.order) == cutting.most.blocks
    steps = list_cut_work(bench.settings, cutting, Pricing({}, None))
    measured = sum(step.times * step.passes for step in steps if step.name != CUT)
    [cut] = [step.passes for step in steps if step.name == CUT]
    [built] = [step.passes for step in list_cut_end(Pricing({}, None), streamed=True)]
    assert 0.5 * measured < found[1] <= measured
    assert math.ceil(found[2]) == cut
    assert math.ceil(found[3]) == built - 1, "what is written is read where it lies"
