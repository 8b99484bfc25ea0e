"""`--approve plans`: a person accepts, edits or refuses every plan before it is carried out."""

import io
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.end_to_end.conftest import Command
from tests.end_to_end.helpers import TINY, python_environment, read_events, read_state, read_summary, read_trials
from tests.openai_server import OpenAIServer
from tests.situations import ignore
from tools.plans.allocate import Allocation, allocate
from tools.plans.layer_profile import LayerProfile, predict_kl
from tools.plans.recipe import Recipe
from tools.workbench.open import use_workbench

APPROVE = ("--approve", "plans")
PROMPT = 'accept, refuse WHY, or what to change, such as {"sparsity": 0.3}: '
Say = Callable[..., None]


class Terminal(io.StringIO):
    """A terminal at which a person has typed these lines."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch) -> Say:
    """Type lines at the terminal of the next command; after them comes the end of input."""
    return lambda *lines: monkeypatch.setattr(sys, "stdin", Terminal("".join(f"{line}\n" for line in lines)))


@pytest.fixture(scope="module")
def flags(tiny_llama: Path) -> list[str]:
    """Flags of a run that asks; three rounds, of which two reach the target."""
    return ["--name", "run", "--model", str(tiny_llama), *TINY, *APPROVE]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Path]:
    return tmp_path / "runs" / "run"


def decisions(run: Path) -> list[tuple[int, str, str]]:
    return [(e["iteration"], e["decision"], e["reason"]) for e in read_events(run, "approval")]


def test_accepted_plans_are_those_of_a_run_that_asks_nobody(
    flags: list[str], run: Path, tmp_path: Path, command: Command, say: Say
) -> None:
    say("accept", "a", "YES")
    done = command(*flags)
    assert (done.code, done.err) == (0, "")
    assert done.out.count(PROMPT) == 3
    plan = read_events(run, "plan")[0]
    assert f"plan 1: {plan['plan']}\n" in done.out
    assert f"predicted KL {plan['predicted_kl']:.4f} nats per token\n  because: {plan['reason']}\n" in done.out
    assert decisions(run) == [(1, "accept", ""), (2, "accept", ""), (3, "accept", "")]
    assert command(*flags, "--approve", "none", "--runs-dir", "easy").code == 0
    assert read_trials(run) == read_trials(tmp_path / "easy" / "run")
    assert read_summary(run)["mask_sha256"] == read_summary(tmp_path / "easy" / "run")["mask_sha256"]


def test_without_a_terminal_the_run_stops_and_asks_again_when_it_is_resumed(
    flags: list[str], run: Path, command: Command, say: Say
) -> None:
    stopped = command(*flags)
    assert (stopped.code, stopped.err) == (1, "")
    last = [
        "stopped: plan 1 waits for a person to accept, edit or refuse it: resume in a terminal, or answer in Studio",
        "resume with: python -m graph.run --resume run",
    ]
    assert stopped.out.splitlines()[-2:] == last
    again = command("--resume", "run")
    assert (again.code, again.out.splitlines()[-2:]) == (1, last)
    say("accept")
    left = command("--resume", "run")
    assert left.code == 1
    assert "stopped: plan 2 waits for a person to accept, edit or refuse it\n" in left.out, "as with Ctrl-D"
    say("accept", "accept")
    assert command("--resume", "run").code == 0
    assert [iteration for iteration, *_ in decisions(run)] == [1, 2, 3]
    assert len(read_events(run, "plan")) == 3, "no plan was made twice"


def test_an_edit_changes_what_is_given_and_nothing_else(
    flags: list[str], run: Path, command: Command, say: Say
) -> None:
    say('{"sparsity": 0.25, "recipe": {"strength": 0.5}}', '{"recipe": {"allocation": "alphapruning"}}', "accept")
    assert command(*flags).code == 0
    planned, edited = read_events(run, "plan")[:2]
    assert (planned["planner"], edited["planner"]) == ("heuristic", "you")
    recipe = planned["details"]["recipe"] | {"strength": 0.5}
    assert edited["details"] == planned["details"] | {
        **{"sparsity": 0.25, "recipe": recipe, "reason": "Edited by hand."}
    }
    trial = read_state(run).trials[0]
    assert trial.sparsity == pytest.approx(0.25, abs=5e-4)
    assert trial.plan == "25.0% two-sided:kappa@0.5"
    assert ":alphapruning" in read_state(run).trials[1].plan, "the spectra were measured when they were asked for"


BAD = {
    "": "say accept, refuse WHY, or what to change as JSON",
    "maybe": "say accept, refuse WHY, or what to change as JSON",
    "refuse": "say why it is refused, in a few words: the planner is told",
    '{"sparsity": ': "the plan is not JSON: Expecting value: line 1 column 13 (char 12)",
    '{"sparsity": 45}': "sparsity: Input should be less than 1, not 45; that looks like a percentage: write 0.45",
    '{"sparsity": NaN}': "sparsity: Input should be ",
    '{"sparcity": 0.3}': "sparcity: there is no such field; leave it out",
    '{"sparsity": 0.9}': "sparsity 0.9 is above the target; plan at most 0.45",
    '{"recipe": {"method": "magic"}}': "recipe.method: Input should be 'magnitude', 'wanda'",
    '{"adjustments": [{"selector": "*.nothing", "action": "protect"}]}': "selector '*.nothing' means no layer",
    '{"adjustments": [{"selector": "*", "action": "protect"}]}': "",
}


def test_what_cannot_be_used_is_asked_for_again_with_the_reason(
    flags: list[str], run: Path, command: Command, say: Say
) -> None:
    say(*BAD, "accept")
    asked = command(*flags)
    assert (asked.code, asked.err) == (1, "")
    assert asked.out.count(PROMPT) == len(BAD) + 2, "the last one is for plan 2"
    problems = [line for line in asked.out.splitlines() if line.startswith("  that cannot be used: ")]
    assert len(problems) == len(BAD)
    for problem, expected in zip(problems, BAD.values(), strict=True):
        assert problem.startswith(f"  that cannot be used: {expected}")
    assert decisions(run) == [(1, "accept", "")]


def test_the_rule_moves_on_after_a_refusal(flags: list[str], run: Path, command: Command, say: Say) -> None:
    say("refuse not so fast", *["accept"] * 9)
    done = command(*flags)
    assert (done.code, done.err) == (0, "")
    refused, *others = read_state(run).trials
    assert (refused.verdict, refused.reason, refused.perplexity) == ("refuse", "not so fast", None)
    assert refused.plan not in [trial.plan for trial in others]
    assert "trial 1: refused, 30.0% two-sided:kappa: not so fast" in done.out
    assert read_summary(run)["achieved_sparsity"] == pytest.approx(0.45, abs=5e-4)
    assert read_summary(run)["rollbacks"] == sum(trial.verdict == "rollback" for trial in others)


def test_refusals_end_with_the_iterations(flags: list[str], run: Path, command: Command, say: Say) -> None:
    say(*["n whatever it is"] * 9)
    done = command(*flags, "--max-iterations", "4")
    assert (done.code, done.err) == (0, "")
    assert [trial.verdict for trial in read_state(run).trials] == ["refuse"] * 4
    assert "note: 4 iterations were asked for and done" in done.out
    assert (read_summary(run)["status"], read_summary(run)["iterations"]) == ("short-of-target", 4)


def test_a_planner_is_told_why(tiny_llama: Path, flags: list[str], run: Path, command: Command, say: Say) -> None:
    say("refuse the value projections are precious", "accept")
    with OpenAIServer([{"sparsity": 0.3}, {"sparsity": 0.35}]) as server:
        command(*flags, "--planner", server.planner("m"), "--max-iterations", "2")
    assert [trial.verdict for trial in read_state(run).trials] == ["refuse", "accept"]
    first, second = (str(request.messages[1]["content"]) for request in server.requests)
    assert "precious" not in first
    assert "the value projections are precious" in second


def test_the_kl_shown_is_that_of_the_curves_that_the_plan_goes_by(
    flags: list[str], run: Path, command: Command, say: Say
) -> None:
    say("accept")
    with OpenAIServer([{"sparsity": 0.4, "recipe": {"method": "refit", "curves": "method"}}]) as server:
        done = command(*flags, "--planner", server.planner("m"), "--max-iterations", "1")
    (plan,), state = read_events(run, "plan"), read_state(run)
    trial = state.trials[0]
    recipe = Recipe(method="refit", curves="method")
    with use_workbench(state.config, run, pytest.fail, ignore) as bench:
        assert bench.curves.has_layers(state.profile, recipe), "they were measured before the question"
        curves = bench.curves.describe_layers(state.profile, recipe, ignore)
        masks, shares = bench.profiles.read(state.profile).layers, bench.pruner.planned_sparsity(trial.checkpoint)
    own, by_mask = (predict_kl(x, np.array([shares[layer.name] for layer in x])) for x in (curves, masks))
    assert plan["predicted_kl"] == trial.predicted_kl == own != by_mask
    (lesson,) = state.lessons
    assert lesson.predicted == pytest.approx(by_mask), "what trials by other curves can be set beside"
    assert f"predicted KL {own:.4f} nats per token" in done.out
    assert trial.order == plan["order"] != ""


def test_no_plan_is_shared_out_twice_in_a_round(
    flags: list[str], run: Path, command: Command, say: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared: list[str] = []

    def count(layers: Sequence[LayerProfile], sparsity: float, recipe: Recipe, *more: Any, **bounds: Any) -> Allocation:
        round_ = [event["node"] for event in read_events(run, "node")].count("plan")
        shared.append(repr((round_, sparsity, recipe, more, bounds, [layer.kappa for layer in layers])))
        return allocate(layers, sparsity, recipe, *more, **bounds)

    monkeypatch.setattr("graph.planning.orders.allocate", count)
    say("accept", '{"sparsity": 0.44}', "accept", "refuse it is enough", *["accept"] * 9)
    assert command(*flags, "--max-iterations", "5").code == 0
    assert [trial.verdict == "refuse" for trial in read_state(run).trials] == [False, False, False, True]
    assert len(set(shared)) == len(shared)


def test_a_real_terminal_shows_lines_around_the_question(flags: list[str], run: Path, tmp_path: Path) -> None:
    terminal, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "graph.run", *flags],
        cwd=tmp_path,
        env=python_environment(TERM="xterm", COLUMNS="120", LINES="40", PYTHONIOENCODING="utf-8"),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        close_fds=True,
    )
    os.close(theirs)
    shown, answers = b"", [b'{"sparsity": 0.2}\n', b"accept\n", b"accept\n", b"accept\n"]
    end = time.monotonic() + 120
    while time.monotonic() < end:
        if select.select([terminal], [], [], 0.1)[0]:
            try:
                shown += os.read(terminal, 65536)
            except OSError:  # its other end is closed
                break
        if answers and shown.count(b'such as {"sparsity": 0.3}: ') > 4 - len(answers):
            os.write(terminal, answers.pop(0))
    os.close(terminal)
    assert process.wait(10) == 0, shown.decode(errors="replace")
    text = shown.decode()
    assert "plan 1 by heuristic" in text and "Traceback" not in text
    assert read_state(run).trials[0].sparsity == pytest.approx(0.2, abs=5e-4)
