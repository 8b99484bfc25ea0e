"""Tasks of our own are found by their files."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tasks import ask
from tools.base.errors import UserError
from tools.measure import tasks
from tools.measure.benchmarks import find_own_tasks

SUMS = """
from tools.base.errors import UserError
from tools.measure.benchmarks import OwnTask

def check(settings):
    if settings.limit > 3:
        raise UserError("there are only three sums")

def load(settings):
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    rows = Dataset.from_list([{"sum": f"{i} + 1 =", "total": f" {i + 1}"} for i in range(3)])
    return ConfigurableTask(config={
        "task": "sums", "test_split": "test", "num_fewshot": 0, "output_type": "loglikelihood",
        "doc_to_text": "{{sum}}", "doc_to_target": "{{total}}", "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "custom_dataset": lambda **_: {"test": rows},
    }), "made up"

TASK = OwnTask("sums of one", check, load)
"""


@pytest.fixture
def sums(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One file more among our own tasks."""
    (tmp_path / "sums.py").write_text(SUMS)
    monkeypatch.setattr(tasks, "__path__", [*tasks.__path__, str(tmp_path)])
    find_own_tasks.cache_clear()
    yield
    find_own_tasks.cache_clear()
    sys.modules.pop(f"{tasks.__name__}.sums", None)


def test_they_are_found_without_the_harness_or_torch() -> None:
    assert list(find_own_tasks()) == ["freebaseqa", "mmlu"]
    heavy = "{'torch', 'transformers', 'datasets', 'lm_eval'} & sys.modules.keys()"
    code = f"import sys, tools.measure.benchmarks as b; b.find_own_tasks(); sys.exit(bool({heavy}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.usefixtures("sums")
def test_a_file_is_all_that_a_task_needs(data: Path) -> None:
    assert list(find_own_tasks()) == ["freebaseqa", "mmlu", "sums"]
    task, (accuracy,) = ask(data, "sums")
    assert [instance.args for instance in task.instances] == [(f"{i} + 1 =", f" {i + 1}") for i in range(3)]
    assert (accuracy.score.task, accuracy.score.samples, accuracy.score.protocol["data"]) == ("sums", 3, "made up")
    with pytest.raises(UserError, match="there are only three sums"):
        ask(data, "sums", limit=4)
