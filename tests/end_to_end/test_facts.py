"""Runs that ask questions: what a plan loses of them, and what comes of it."""

from pathlib import Path

import pytest

from tests.end_to_end.conftest import Command
from tests.end_to_end.helpers import TINY, read_events, read_state, read_summary
from tests.openai_server import OpenAIServer
from tests.rows import write_questions, write_rows
from tests.tiny import save_tiny_model

PAIRS = 8


@pytest.fixture
def questions(tmp_path: Path) -> str:
    """The flag's value: a file of made-up questions."""
    rows = [{"question": f"Which statement is number {i}?", "answer": ("class", "import")[i % 2]} for i in range(40)]
    return write_rows(tmp_path / "questions.jsonl", rows)


def test_a_question_longer_than_the_model_is_refused(command: Command, tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "gpt2", "gpt2")
    rows = [{"question": "word " * (4000 if i == 5 else 1) + f"{i}?", "answer": "class"} for i in range(10)]
    source = write_rows(tmp_path / "long.jsonl", rows)
    done = command("--model", str(model), "--questions", source, "--question-pairs", "3", *TINY)
    assert done.code == 2 and done.err.startswith(f"error: question 'word {'word ' * 11}' takes ")
    assert done.err.endswith(" positions; leave it out\n")


@pytest.mark.usefixtures("raw_gamma")
def test_a_plan_that_loses_facts_is_rolled_back(command: Command, trained_llama: Path, questions: str) -> None:
    """Perplexity alone would have kept it: the very same run without the bound does."""
    flags = [
        *("--model", str(trained_llama), "--questions", questions, "--question-pairs", str(PAIRS), *TINY),
        *("--tau", "10", "--target-sparsity", "0.8", "--max-iterations", "1"),
    ]
    assert command("--name", "free", *flags).code == 0
    assert command("--name", "bound", "--min-fact-retention", "1", *flags).code == 0
    free, bound = (read_events(Path("runs") / name, "trial")[-1] for name in ("free", "bound"))
    assert free["verdict"] == "accept" and free["fact_retention"] < 1
    figures = f"answer probability kept {free['fact_retention']:.3f} ± {free['fact_error']:.3f}"
    assert bound["verdict"] == "rollback"
    assert bound["reason"] == f"{figures}, below 1, although {free['reason']}"
    for key in ("checkpoint", "perplexity", "kl", "fact_retention", "fact_error", "tokens"):
        assert bound[key] == free[key], key

    summary = read_summary(Path("runs/bound"))
    assert (summary["status"], summary["achieved_sparsity"]) == ("short-of-target", 0.0)
    assert (summary["knowledge"]["retention"], summary["knowledge"]["pairs"]) == (1.0, PAIRS)

    knowledge = read_summary(Path("runs/free"))["knowledge"]
    assert knowledge["source"] == questions
    assert knowledge["pruned"] < knowledge["dense"]
    report = Path("runs/free/report.md").read_text()
    assert f"| **Billhook** | {knowledge['pruned']:.3f} |" in report
    assert f"Answer probability kept: {knowledge['retention']:.1%}." in report
    (lesson,) = read_events(Path("runs/bound"), "lesson")
    assert lesson["text"].endswith(f"Answer probability kept: {free['fact_retention']:.3f}, less than 1.")
    tokens = read_summary(Path("runs/free"))["evaluated_tokens"]
    assert tokens == free["tokens"] > 3 * 64


def test_what_cannot_be_asked_is_told_before_anything_is_loaded(command: Command, questions: str) -> None:
    said = command("--min-fact-retention", "0.9")
    assert (said.code, said.out) == (2, "")
    assert "min_fact_retention needs questions to ask; name their source with questions" in said.err
    said = command("--questions", "file:nowhere.jsonl")
    assert (said.code, said.err) == (2, "error: file of questions nowhere.jsonl does not exist\n")


def test_too_few_questions(command: Command, tiny_llama: Path, questions: str) -> None:
    said = command("--model", str(tiny_llama), "--questions", questions, "--question-pairs", "30", *TINY)
    assert said.code == 2
    assert "has 40 questions with answers, but 30 for the trials and 30 for the report were asked for" in said.err


def test_plans_choose_the_text_that_statistics_come_from(command: Command, tiny_llama: Path, tmp_path: Path) -> None:
    questions = write_questions(tmp_path / "many.jsonl", 200)
    plans = [
        {"sparsity": 0.3, "recipe": {"mix": {"run": 3, "questions": 1}, "curves": "mask"}},
        {"sparsity": 0.45, "recipe": {"mix": {"run": 1, "questions": 1}}},
    ]
    flags = ["--model", str(tiny_llama), *TINY, "--max-iterations", "2", "--no-memory"]
    asking = ["--questions", questions, "--question-pairs", str(PAIRS)]
    with OpenAIServer(plans) as server:
        planned = [*flags, "--planner", server.planner("fine")]
        assert command("--name", "run", *planned, *asking).code == 0
    with OpenAIServer(plans[:1]) as server:
        assert command("--name", "alone", *flags, "--planner", server.planner("fine")).code == 1
        replies = [reply["problem"] for reply in read_events(tmp_path / "runs" / "alone", "reply")]
    assert set(replies) == {"mix weighs 'questions', and this run has neither named texts nor questions; leave it out"}

    run = tmp_path / "runs" / "run"
    assert [trial.plan for trial in read_state(run).trials] == [
        "30.0% refit~quarter:kappa-mask",
        "45.0% refit~half:kappa",
    ]
    assert command("--replay", "run", "--name", "again").code == 0
    summaries = [read_summary(tmp_path / "runs" / name) for name in ("run", "again")]
    assert summaries[0]["mask_sha256"] == summaries[1]["mask_sha256"]
    assert summaries[0]["achieved_sparsity"] == pytest.approx(0.45, abs=5e-4)


def test_questions_are_weighed_where_they_are_a_text_and_asked_as_well(
    command: Command, tiny_llama: Path, tmp_path: Path
) -> None:
    """The text is of those that are not asked; the verdict is on the sum, and what is asked stays a bound."""
    questions = write_questions(tmp_path / "many.jsonl", 200)
    texts = ["--text", f"facts={questions}", "--text", "manual=pydoc", "--text-weights", "facts=3,manual=1"]
    asking = ["--questions", questions, "--question-pairs", str(PAIRS), "--min-fact-retention", "0.01"]
    flags = ["--model", str(tiny_llama), *TINY, "--tau", "10", "--max-iterations", "1", "--no-memory"]
    assert command("--name", "run", *flags, *texts, *asking).code == 0
    trial = read_events(tmp_path / "runs" / "run", "trial")[-1]
    facts, manual = (text["kl"] for text in trial["texts"])
    assert trial["kl"] == pytest.approx(0.75 * facts + 0.25 * manual, rel=1e-9)
    assert 0 < trial["fact_retention"] and read_summary(tmp_path / "runs" / "run")["knowledge"]["pairs"] == PAIRS
