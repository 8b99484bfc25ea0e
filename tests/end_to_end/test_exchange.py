"""A run whose planner and reflector answer by files; killed while it waits, and resumed with the answer there."""

from pathlib import Path

from tests.end_to_end.conftest import Command
from tests.end_to_end.helpers import answering, fork, read_events, read_summary, read_trials, wait_for

PLANS = (
    '{"hypothesis": "KL below 0.1.", "sparsity": 0.3, "reason": "A first step."}',
    '{"sparsity": 0.45, "reason": "To the target."}',
)
LESSONS = '{"lessons": []}'


def answer(prompt: str) -> str:
    """No lessons, the first plan, or the second."""
    if "multiplier" in prompt and '"lessons"' in prompt[:8000]:
        return LESSONS
    return PLANS["Plan round 1." not in prompt]


def test_a_run_is_planned_and_reflected_on_by_files(flags: list[str], tmp_path: Path, command: Command) -> None:
    place = tmp_path / "exchange"
    given = [*flags, "--planner", f"exchange:{place}", "--reflector", f"exchange:{place}", "--max-iterations", "2"]
    waiting = fork(tmp_path, *given)
    wait_for(lambda: list(place.glob("001-*.prompt.md")))
    waiting.kill()
    with answering(place, answer):
        assert command("--resume", "run").code == 0
    run = tmp_path / "runs" / "run"
    plans = read_events(run, "plan")
    assert [(event["planner"], event["details"]["sparsity"]) for event in plans] == [
        (f"exchange:{place}", 0.3),
        (f"exchange:{place}", 0.45),
    ]
    assert plans[1]["plan"].startswith("45.0% refit:kappa")
    assert [event["hypothesis"] for event in read_events(run, "trial")[1:2]] == ["KL below 0.1."]
    reflection, second = [path.read_text() for path in sorted(place.glob("*.prompt.md"))][1:3]
    assert "\nexpected: KL below 0.1.\n" in reflection
    assert "; expected: KL below 0.1.\n" in second.split("Trials so far")[1]
    assert '<dt>Expected</dt><dd class="words" dir="auto">KL below 0.1.</dd>' in (run / "report.html").read_text()
    assert read_summary(run)["agents"]["input_tokens"] > 1000
    assert len(list(place.glob("*.prompt.md"))) == len(list(place.glob("*.answer.txt"))) >= 3
    before = read_trials(run)
    assert command("--replay", "run", "--name", "again").code == 0
    assert read_trials(tmp_path / "runs" / "again") == before
