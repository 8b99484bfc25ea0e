"""A round of a tiny model, as instruments have it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from graph.config import RunConfig
from graph.planning.plan import Plan
from tests.situations import ignore, open_orders
from tests.tiny import tiny_settings
from tools.instruments.functions import Draft, Round
from tools.plans.work_order import WorkOrder
from tools.workbench.bench import Workbench
from tools.workbench.open import use_workbench
from tools.workbench.store import DENSE

PROTECT = ["*.v_proj"]


@pytest.fixture
def bench(tmp_path: Path, tiny_llama: Path, workbench_closed: None) -> Workbench:
    with use_workbench(tiny_settings(tiny_llama), tmp_path / "run", pytest.fail, ignore) as bench:
        return bench


def resolver(bench: Workbench, profile: str, present: str = DENSE) -> Callable[[Draft], WorkOrder]:
    """What a draft comes to, as the plan node has it; the weights in the model stay those of `present`."""
    orders = open_orders(bench, profile, RunConfig(protect=PROTECT), present)
    return lambda draft: orders(Plan.model_validate(draft.model_dump()))


@pytest.fixture
def make_round(bench: Workbench) -> Callable[..., Round]:
    def make(accepted: Draft | None = None, **more: Any) -> Round:
        """A round, with the dense weights in the model, or with those of an accepted draft."""
        profile = bench.profile(ignore)
        present = DENSE
        if accepted:
            present = bench.pruner.prune(profile, resolver(bench, profile)(accepted), ignore)
        return Round(bench, profile, resolver(bench, profile, present), ignore, present=present, **more)

    return make
