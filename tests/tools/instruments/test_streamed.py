"""Instruments on a model that comes block by block: the figures of one that is held."""

from pathlib import Path
from typing import Any

from tests.benches import open_bench
from tests.situations import ignore
from tests.tiny import tiny_settings
from tests.tools.instruments.conftest import resolver
from tools.instruments.functions import Draft, Round, probe
from tools.models.streamed import find_stream
from tools.plans.recipe import parse_recipe

KEPT = Draft(sparsity=0.3, recipe=parse_recipe("two-sided:kappa-mask"))
PLANS = [Draft(sparsity=0.4, recipe=parse_recipe(label)) for label in ("refit:kappa-mask", "wanda:uniform")]


def measure(model: Path, device: str, directory: Path) -> list[Any]:
    """What a probe of two plans tells of a model."""
    bench = open_bench(tiny_settings(model, device=device), directory / device)
    assert (find_stream(bench.model) is not None) == (device == "stream")
    profile = bench.profile(ignore)
    present = bench.pruner.prune(profile, resolver(bench, profile)(KEPT), ignore)
    round_ = Round(bench, profile, resolver(bench, profile, present), ignore, present=present)
    alone = PLANS[0].model_copy(update={"alone": "blocks 1"})
    return probe(round_, [*PLANS, alone], 128)


def test_probes_are_the_same(tiny_llama: Path, tmp_path: Path, workbench_closed: None) -> None:
    held, streamed = (measure(tiny_llama, device, tmp_path) for device in ("cpu", "stream"))
    assert streamed == held
