"""Every shipped config is valid, says only what differs from the defaults, and says why."""

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from graph.config import RunConfig, check_config
from graph.plans import find_recipe
from graph.state import Plan
from tools.errors import UserError
from tools.options import CONFIGS
from tools.recipes import Recipe

FILES = sorted(CONFIGS.glob("*.yaml"))


def read(file: Path) -> dict[str, Any]:
    values = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert isinstance(values, dict), f"{file.name} is not a mapping; an empty config is written {{}}"
    return values


def test_the_four_recipes_are_there() -> None:
    assert {file.stem for file in FILES} >= {"quickstart", "paper", "qwen3-4b", "qwen3-8b"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_config_is_valid(file: Path) -> None:
    RunConfig(**read(file))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_config_holds_only_what_differs(file: Path) -> None:
    defaults = RunConfig().model_dump()
    assert [name for name, value in read(file).items() if value == defaults[name]] == []


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_field_says_why(file: Path) -> None:
    lines = ["", *file.read_text(encoding="utf-8").splitlines()]
    for above, line in pairwise(lines):
        if re.match(r"[a-z_]+:", line):
            assert " #" in line or above.startswith("#"), f"{file.name}: no comment at {line!r}"


def test_quickstart_needs_no_hub_and_no_key() -> None:
    config = RunConfig(**read(CONFIGS / "quickstart.yaml"))
    assert config.model.startswith("package:")
    assert {config.calibration, config.validation, config.test} == {"pydoc"}
    assert (config.planner, config.target_sparsity) == ("heuristic", 0.45)


def test_a_pattern_sets_the_target_and_bounds_it() -> None:
    assert RunConfig(pattern="3:8").target_sparsity == 3 / 8
    assert RunConfig(pattern="2:4", target_sparsity=0.47, protect="*.v_proj").target_sparsity == 0.47
    with pytest.raises(ValidationError, match=r"target_sparsity 0.6 is above the 0.5 of 2:4"):
        RunConfig(pattern="2:4", target_sparsity=0.6)
    with pytest.raises(ValidationError, match=r"pattern '2/4' is not N:M with 0 < N < M, such as 2:4"):
        RunConfig(pattern="2/4")


def test_the_pattern_of_a_plan_is_the_users() -> None:
    plan = Plan(sparsity=0.5, recipe=Recipe(pattern="1:4"))
    assert find_recipe(plan, RunConfig(pattern="2:4")).pattern == "2:4"
    assert find_recipe(plan, RunConfig()).pattern == ""


def test_a_problem_of_several_fields_is_told_by_their_names() -> None:
    with pytest.raises(UserError) as told:
        check_config({"pattern": "2:4", "target_sparsity": 0.7})
    assert str(told.value) == "target_sparsity 0.7 is above the 0.5 of 2:4"
