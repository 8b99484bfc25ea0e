"""Every shipped config is valid, says only what differs from the defaults, and says why."""

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from graph.config import RunConfig, check_config, read_prompt
from graph.planning.plan import Plan
from graph.planning.recipes import find_recipe
from tools.base.errors import UserError
from tools.base.options import CONFIGS
from tools.plans.recipe import Recipe

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


def test_prompts_are_text_or_files(tmp_path: Path) -> None:
    file = tmp_path / "mine.md"
    file.write_text("Plan well. {tools}\n{schema}", encoding="utf-8")
    config = check_config({"planner_prompt": f"file:{file}", "reflector_prompt": "Reflect. {schema}"})
    assert (config.planner_prompt, config.reflector_prompt) == ("Plan well. {tools}\n{schema}", "Reflect. {schema}")
    own = {f"{name}_prompt": read_prompt(name) + "\n" for name in ("planner", "reflector")}
    assert check_config(own) == RunConfig(), "Billhook's own prompt, as Studio sends it back, is no change"


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("planner_prompt", "file:{here}/none.md", "the prompt cannot be read (No such file or directory)"),
        ("reflector_prompt", "file:{here}/latin.md", "the prompt cannot be read (it is not UTF-8 text)"),
        ("planner_prompt", "{schema}", "the prompt has no {tools}, in whose place"),
        ("planner_prompt", "Plan well.", "the prompt has no {tools} and no {schema}, in whose place"),
        ("reflector_prompt", "Reflect.", "the prompt has no {schema}, in whose place"),
    ],
)
def test_prompts_that_no_agent_can_work_with(field: str, value: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "latin.md").write_bytes("é".encode("latin-1"))
    with pytest.raises(UserError) as told:
        check_config({field: value.replace("{here}", str(tmp_path))})
    assert str(told.value).startswith(f"{field}: {problem}")
    assert "\n" not in str(told.value)


def test_the_pattern_of_a_plan_is_the_users() -> None:
    plan = Plan(sparsity=0.5, recipe=Recipe(pattern="1:4"))
    assert find_recipe(plan, RunConfig(pattern="2:4")).pattern == "2:4"
    assert find_recipe(plan, RunConfig()).pattern == ""


def test_a_problem_of_several_fields_is_told_by_their_names() -> None:
    with pytest.raises(UserError) as told:
        check_config({"pattern": "2:4", "target_sparsity": 0.7})
    assert str(told.value) == "target_sparsity 0.7 is above the 0.5 of 2:4"
