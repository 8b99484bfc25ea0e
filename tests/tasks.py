"""Tasks of lm-evaluation-harness on tiny models: their questions, their settings, and how one is asked."""

from pathlib import Path
from typing import Any

from tests.rows import write_rows
from tests.tiny import make_tiny_model, make_tiny_tokenizer
from tools.base.progress import ignore_progress
from tools.base.settings import TaskSettings
from tools.measure.benchmarks import load_benchmarks
from tools.measure.harness import run_benchmark
from tools.results.losses import Result

SUBJECTS = ("abstract_algebra", "us_foreign_policy")


def write_data(home: Path) -> None:
    """Eight questions with answers, and an MMLU of two subjects with three exemplars and four questions each."""
    write_rows(home / "qa.jsonl", [{"question": f"Who is {i}?", "answers": [f"the {i}", str(i)]} for i in range(8)])
    write_rows(home / "mmlu" / "dev.jsonl", [make_choice(s, f"dev {i}") for s in SUBJECTS for i in range(3)])
    write_rows(home / "mmlu" / "test_4.jsonl", [make_choice(s, f"test {i}") for s in SUBJECTS for i in range(4)])


def make_choice(subject: str, question: str) -> dict[str, Any]:
    """A line of MMLU whose right answer is the question's last digit."""
    return {"subject": subject, "question": f" {question}? ", "choices": list("wxyz"), "answer": int(question[-1])}


def settings_of(data: Path, tasks: str, **changes: Any) -> TaskSettings:
    """Two exemplars before each question of the data."""
    options = {"tasks": tasks, "shots": 2, "freebaseqa": f"file:{data / 'qa.jsonl'}", "mmlu": f"file:{data / 'mmlu'}"}
    return TaskSettings.model_validate({**options, **changes})


def ask(data: Path, tasks: str, seed: int = 0, **changes: Any) -> tuple[Any, list[Result]]:
    """(the harness' task, its figures) of a tiny Llama."""
    (benchmark,) = load_benchmarks(settings_of(data, tasks, **changes), "fp32")
    results = run_benchmark(benchmark, make_tiny_model("llama", seed), make_tiny_tokenizer(), "tiny", ignore_progress)
    return benchmark.task, results
