"""MMLU from local files: asked as the harness asks it."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.rows import write_rows
from tests.tasks import SUBJECTS, ask, make_choice, settings_of
from tools.base.errors import UserError
from tools.measure.benchmarks import load_benchmarks
from tools.measure.tasks.mmlu import find_templates


def test_mmlu_from_files_asks_as_the_harness_does(data: Path) -> None:
    group, _ = ask(data, "mmlu")
    template = yaml.safe_load((find_templates() / "_default_template_yaml").read_text())
    for task, subject in zip(group.get_all_tasks(), SUBJECTS, strict=True):
        theirs = yaml.safe_load((find_templates() / f"mmlu_{subject}.yaml").read_text())
        assert (task.task_name, task.config.description) == (theirs["task"], theirs["description"])
        for field in ("doc_to_text", "doc_to_choice", "doc_to_target", "output_type"):
            assert getattr(task.config, field) == template[field]
    assert task.instances[0].args == (
        "The following are multiple choice questions (with answers) about us foreign policy.\n\n"
        "dev 0?\nA. w\nB. x\nC. y\nD. z\nAnswer: A\n\n"
        "dev 1?\nA. w\nB. x\nC. y\nD. z\nAnswer: B\n\n"
        "test 0?\nA. w\nB. x\nC. y\nD. z\nAnswer:",
        " A",
    )


def test_every_subject_has_a_description_made_of_its_name() -> None:
    files = sorted(find_templates().glob("mmlu_*.yaml"))
    assert len(files) == 57
    for file in files:
        theirs, name = yaml.safe_load(file.read_text()), file.stem.removeprefix("mmlu_").replace("_", " ")
        assert theirs["description"] == f"The following are multiple choice questions (with answers) about {name}.\n\n"


def test_mmlu_is_the_mean_over_all_questions(data: Path) -> None:
    _, (acc,) = ask(data, "mmlu")
    assert (acc.score.task, acc.score.metric, acc.score.samples) == ("mmlu", "acc", 8)
    assert set(acc.values) <= {0.0, 1.0} and acc.score.value == sum(acc.values) / 8
    assert acc.score.error is not None


@pytest.mark.parametrize(
    ("rows", "error"),
    [
        ([{**make_choice("anatomy", "test 0"), "answer": 4}], "test.jsonl, line 1: answer: Input should be less than"),
        ([make_choice("anatomy", "test 0"), {"subject": "anatomy"}], "test.jsonl, line 2: question: Field required"),
        ([make_choice("law", "test 0")], "dev.jsonl has no exemplar of the subject law, which test.jsonl asks about"),
        ([], "test.jsonl is empty"),
    ],
)
def test_lines_of_mmlu_are_checked(tmp_path: Path, rows: list[Any], error: str) -> None:
    write_rows(tmp_path / "mmlu" / "dev.jsonl", [make_choice("anatomy", "dev 0")])
    write_rows(tmp_path / "mmlu" / "test.jsonl", rows)
    with pytest.raises(UserError) as told:
        load_benchmarks(settings_of(tmp_path, "mmlu", shots=1), "fp32")
    assert error in str(told.value)


def test_one_file_of_mmlu_is_the_test(data: Path, tmp_path: Path) -> None:
    for name in ("dev", "test_a", "test_b"):
        write_rows(tmp_path / "mmlu" / f"{name}.jsonl", [make_choice("anatomy", "dev 0")])
    with pytest.raises(UserError, match=r"has 2 files test\*\.jsonl, but exactly one is needed"):
        load_benchmarks(settings_of(tmp_path, "mmlu"), "fp32")
