"""How often a streamed model's blocks come from disk, beside what was foreseen."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.benches import ignore, open_bench
from tests.tiny import make_tiny_config, make_tiny_tokenizer, tiny_settings
from tools.estimate.memory import ASKED_FOR, cut_parts
from tools.estimate.work import Course, find_shares, list_work
from tools.measure.continuations import PROMPTS, continue_prompts
from tools.models.streamed import Stream
from tools.plans.allocate import allocate
from tools.plans.recipe import parse_recipe
from tools.plans.work_order import order_allocation
from tools.workbench.bench import Workbench

BLOCKS = 8
LABELS = ("refit:kappa-mask", "refit:kappa", "refit~sequential:kappa-mask", "refit~stages:kappa-mask")


@pytest.fixture
def deep(tmp_path: Path) -> Path:
    """A tiny model of so many blocks that the ends of a walk, where it turns, weigh little."""
    import transformers

    config = make_tiny_config("llama")
    config.num_hidden_layers = BLOCKS
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "deep")
    make_tiny_tokenizer().save_pretrained(tmp_path / "deep")
    return tmp_path / "deep"


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How many blocks were copied from disk, under no name yet."""
    counted, copy = Counter[str](), Stream._copy

    def count(self: Stream, block: int, parameters: Any) -> Any:
        counted[""] += self._copied is None or self._copied[0] != block
        return copy(self, block, parameters)

    monkeypatch.setattr(Stream, "_copy", count)
    return counted


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


def test_what_comes_from_disk_is_foreseen(deep: Path, tmp_path: Path, copied: Counter[str]) -> None:
    settings = tiny_settings(deep, device="stream")
    bench = open_bench(settings, tmp_path / "run")
    found = carry_out(bench, copied)
    course = Course([*map(parse_recipe, LABELS)], tests=1, prompts=len(PROMPTS), continuing=1)
    shares = find_shares(settings, bench.layers, cut_parts(settings, 0)[0])
    work = list_work(settings, len(bench.layers), shares, course, {}, None, streamed=True)
    steps = {(step.name, step.how if step.name == "prune" else ""): step.passes for step in work}
    opening, *profile = [passes for (name, _), passes in steps.items() if name[:4] in ("load", "vali", "prof")][:5]
    prune = [passes for (name, _), passes in steps.items() if name == "prune"]
    expected = {
        "open": opening - 2,  # it is laid out from the files that it is loaded from, and exported, too
        "profile": sum(profile) - 1,  # second moments are collected by the round that asks for them
        "curves of refit:kappa": steps[(ASKED_FOR, "")],
        "refit:kappa-mask": prune[0],  # the second moments; dense weights are read from where they lie
        "refit~sequential:kappa-mask": prune[1] - 1,
        "refit~stages:kappa-mask": prune[2] - 1,
        "validate": steps[("validate", "")],
        "test": steps[("test", "")],
        "prompts": steps[("go on with prompts", "")],
    }
    for name, passes in expected.items():
        assert math.ceil(found[name]) == passes, (name, found[name], passes)
    assert found["curves of refit:kappa-mask"] == found["refit:kappa"] == 0
