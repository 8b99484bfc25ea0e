"""MMLU as lm-evaluation-harness asks it, its questions from the hub or from local files."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, Field, ValidationError

from tools.base.errors import UserError
from tools.base.hub import look_at_hub
from tools.base.named import path_of
from tools.base.settings import TaskSettings
from tools.measure.benchmarks import OwnTask, hash_files


def check(settings: TaskSettings) -> None:
    """Refuse a directory without exemplars or test. Raises UserError."""
    if settings.mmlu != "hub":
        _find_files(settings.mmlu)


def load(settings: TaskSettings) -> tuple[Any, Any]:
    """(the harness' own group of subjects, where its questions come from).

    Raises UserError for lines of another form, and whatever datasets raises where the hub's data cannot be had.
    """
    if settings.mmlu == "hub":
        return load_hub_mmlu(), "hub"
    files = _find_files(settings.mmlu)
    return load_local_mmlu(*files), hash_files(*files)


TASK = OwnTask("four choices in 57 subjects, as the harness asks them; from the hub, or --mmlu file:DIR", check, load)


def _find_files(source: str) -> tuple[Path, Path]:
    """(exemplars, test)."""
    if not source.startswith("file:"):
        raise UserError(f"source of MMLU {source!r} is neither hub nor file:DIR")
    directory = path_of(source)
    exemplars, tests = directory / "dev.jsonl", sorted(directory.glob("test*.jsonl"))
    if not exemplars.is_file():
        raise UserError(f"directory of MMLU {directory} has no dev.jsonl")
    if len(tests) != 1:
        raise UserError(f"directory of MMLU {directory} has {len(tests)} files test*.jsonl, but exactly one is needed")
    return exemplars, tests[0]


def find_templates() -> Path:
    """The harness' own files of the task: prompts, metrics and how subjects are averaged come from them alone."""
    import lm_eval.tasks

    return Path(lm_eval.tasks.__file__).parent / "mmlu" / "default"


class Choice(BaseModel):
    """A line of a local file."""

    subject: str = Field(pattern=r"^[a-z0-9_]+$")
    question: str = Field(min_length=1)
    choices: Annotated[list[str], Field(min_length=4, max_length=4)]
    answer: int = Field(ge=0, le=3, description="Index of the right choice.")


def load_hub_mmlu() -> Any:
    """The harness' own group of subjects. Raises whatever datasets raises where its data cannot be had."""
    from lm_eval.tasks import TaskManager

    look_at_hub()
    return TaskManager(include_path=str(find_templates()), include_defaults=False).load(["mmlu"])["groups"]["mmlu"]


def load_local_mmlu(exemplars: Path, test: Path) -> Any:
    """The same group with a subject for each that the test file has. Raises UserError for lines of another form."""
    from lm_eval.api.group import Group

    template = yaml.safe_load((find_templates() / "_default_template_yaml").read_text(encoding="utf-8"))
    whole = yaml.safe_load((find_templates() / "_mmlu.yaml").read_text(encoding="utf-8"))
    group = Group.from_config({**whole, "task": []})
    shown, asked = _group_by_subject(exemplars), _group_by_subject(test)
    for subject, rows in asked.items():
        if subject not in shown:
            raise UserError(f"{exemplars} has no exemplar of the subject {subject}, which {test.name} asks about")
        group.add(_make_subject(subject, template, shown[subject], rows))
    return group


def _make_subject(subject: str, template: dict[str, Any], shown: list[dict[str, Any]], asked: list[Any]) -> Any:
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    splits = {"dev": Dataset.from_list(shown), "test": Dataset.from_list(asked)}
    name = subject.replace("_", " ")
    return ConfigurableTask(
        config={
            **template,
            "task": f"mmlu_{subject}",
            "description": f"The following are multiple choice questions (with answers) about {name}.\n\n",
            "custom_dataset": lambda **_: splits,
        }
    )


def _group_by_subject(path: Path) -> dict[str, list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in _read_lines(path):
        groups.setdefault(row.subject, []).append(row.model_dump())
    if not groups:
        raise UserError(f"file of questions {path} is empty")
    return groups


def _read_lines(path: Path) -> Iterator[Choice]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # splitlines would also cut inside a question
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"file of questions {path} cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield Choice.model_validate_json(line)
            except ValidationError as error:
                problem = error.errors()[0]
                where = ".".join(str(part) for part in problem["loc"]) or "the line"
                raise UserError(f"{path}, line {number}: {where}: {problem['msg']}") from error
