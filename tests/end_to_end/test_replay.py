"""`--replay RUN`: the record is enough for the same plans and masks, and what differs is told in one line."""

import io
import json
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from graph.memory.__main__ import main as memory
from tests.end_to_end.conftest import Command
from tests.end_to_end.helpers import (
    TINY,
    Halt,
    Outcome,
    at_home,
    fork,
    read_events,
    read_state,
    read_summary,
    read_trials,
    run_here,
)
from tests.openai_server import OpenAIServer
from tools.base.files import write_json
from tools.base.rundir import LAST, rewrite_log

PLANS: list[dict[str, Any]] = [
    {"sparsity": 0.3, "reason": "a step", "recipe": {"method": "wanda", "refit": False, "allocation": "alphapruning"}},
    {"sparsity": 0.45, "adjustments": [{"selector": "*.v_proj", "action": "factor", "factor": 2}]},
    {
        **{"sparsity": 0.45, "recipe": {"strength": 0.8}},
        "groups": [
            {"selector": "blocks 1 · *.down_proj", "recipe": {"statistics": "sequential"}},
            {"selector": "*.v_proj", "recipe": {"method": "wanda", "refit": False}},
            {"selector": "*.down_proj", "recipe": {"pattern": "2:4"}},
        ],
    },
]


REFLECTIONS: list[dict[str, Any]] = [
    {
        "lessons": [
            {
                **{"selector": "*.v_proj", "direction": "dearer", "multiplier": 2.0, "confidence": 0.9},
                "evidence": "The values took most of the sparsity.",
            }
        ],
        "note": {"text": "Values are dear: leave them more.", "trials": [1]},
        "reprofile": True,
    },
    {"lessons": []},
    {"lessons": [], "stop": True, "reason": "It is enough."},
]


def write_lines(events: list[dict[str, Any]]) -> list[bytes]:
    return [json.dumps(event).encode() for event in events]


@dataclass
class Recorded:
    """A run that chat models planned and reflected on, whose endpoints are gone."""

    home: Path
    run: Path


@pytest.fixture(scope="module")
def recorded(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recorded]:
    home = tmp_path_factory.mktemp("recorded")
    with at_home(home), OpenAIServer(PLANS) as planner, OpenAIServer(REFLECTIONS) as reflector:
        agents = ["--planner", planner.planner("p"), "--reflector", reflector.planner("r")]
        given = ["--name", "run", "--model", str(tiny_llama), *TINY, *agents]
        assert run_here(*given, "--max-iterations", "9", "--patience", "9", "--tau", "9") == 0
    run = home / "runs" / "run"
    assert [event["node"] for event in read_events(run, "node")].count("profile") == 2, "the reflector's wish"
    assert [list(plan["multipliers"]) for plan in plans(run)] == [[], ["self_attn.v_proj"], ["self_attn.v_proj"]]
    return Recorded(home, run)


@pytest.fixture
def copied(recorded: Recorded, tmp_path: Path) -> Path:
    """The record in a runs directory of this test's own: nothing but what a replay needs."""
    run = tmp_path / "runs" / "run"
    run.mkdir(parents=True)
    for name in ("config.yaml", "run.json", "events.jsonl", LAST):
        shutil.copy(recorded.run / name, run / name)
    return run


def plans(run: Path) -> list[dict[str, Any]]:
    return [event["details"] for event in read_events(run, "plan")]


def assert_same(replayed: Path, recorded: Path) -> None:
    assert plans(replayed) == plans(recorded)
    assert read_events(replayed, "parting") == []
    assert read_summary(replayed)["mask_sha256"] == read_summary(recorded)["mask_sha256"]


def edit_event(run: Path, type_: str, number: int, **changes: Any) -> None:
    """Change the nth event of a type."""
    events = read_events(run)
    which = [event for event in events if event["type"] == type_][number]
    which.update(changes)
    rewrite_log(run, write_lines(events))


def test_the_same_plans_and_masks_without_an_endpoint(recorded: Recorded, copied: Path, command: Command) -> None:
    done = command("--replay", "run")
    assert (done.code, done.err) == (0, "")
    again = copied.parent / "run-replay"
    assert done.out.startswith(
        f"started run-replay: {read_summary(recorded.run)['model']} to 45.0% sparsity, planned by "
    )
    assert_same(again, recorded.run)
    assert read_events(again, "trial")[1]["plan"] == "30.0% wanda:alphapruning"
    groups = "refit~sequential in blocks 1 · *.down_proj, wanda~dense in *.v_proj, refit 2:4 in *.down_proj"
    assert read_events(again, "trial")[3]["plan"].startswith(f"45.0% refit:kappa@0.8 · {groups} · lessons x1 (")
    assert "refit 2:4 in " in (again / "report.md").read_text() and len(read_state(again).trials[2].groups) == 3
    assert [trial[1:] for trial in read_trials(again)] == [
        (t["checkpoint"], t["perplexity"], t["kl"], t["verdict"]) for t in read_events(recorded.run, "trial")[1:]
    ]
    masks = read_summary(recorded.run)["mask_sha256"][:12]
    assert done.out.splitlines()[-1] == f"note: the masks are those of run run (mask_sha256 {masks}…)"
    assert not read_events(again, "reply", "prompt", "usage", "lessons")
    (note,) = read_state(again).notes
    assert (note.text, note.run, note.trials) == ("Values are dear: leave them more.", "run-replay", [1])
    assert "note: strategy, by round 1: Values are dear: leave them more.\n" in done.out
    assert "note: at the target, the reflector stops: It is enough." in done.out
    assert [e["node"] for e in read_events(again, "node")] == [e["node"] for e in read_events(recorded.run, "node")]
    assert command("--replay", "run-replay", "--name", "third").code == 0
    assert_same(copied.parent / "third", recorded.run)


def test_a_replay_teaches_nothing_new(copied: Path, command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--replay", "run").code == 0
    assert read_events(copied.parent / "run-replay", "lesson")
    assert memory(["list", "--runs-dir", "runs"]) == 0
    assert "no lessons" in capsys.readouterr().out


def test_a_replay_is_killed_and_resumed(recorded: Recorded, copied: Path, tmp_path: Path, command: Command) -> None:
    for halt in (
        Halt("profile", "langgraph.checkpoint.sqlite:SqliteSaver.put"),
        Halt("validate", "tools.workbench.losses:evaluate_windows", 2),
    ):
        shutil.rmtree(copied.parent / "run-replay", ignore_errors=True)
        killed = fork(tmp_path, "--replay", "run", "--name", "run-replay", halt=halt).finish()
        assert killed.code == -signal.SIGKILL
        assert command("--resume", "run-replay").code == 0
        assert_same(copied.parent / "run-replay", recorded.run)


# Where it parts


def partings(outcome: Outcome) -> list[str]:
    return [line for line in outcome.out.splitlines() if line.startswith("parts from the record at ")]


def test_other_data_part_at_the_dense_model(copied: Path, command: Command) -> None:
    done = command("--replay", "run", "--validation-windows", "2")
    assert done.code == 0
    first = partings(done)[0]
    there, here = (read_events(run, "trial")[0]["perplexity"] for run in (copied, copied.parent / "run-replay"))
    assert first.startswith("parts from the record at the dense model: perplexity ")
    told = re.fullmatch(r"parts from .* perplexity ([\d.]+) in the record, ([\d.]+) here", first)
    assert told is not None
    assert [float(figure) for figure in told.groups()] == pytest.approx([there, here], rel=1e-3)
    assert not [line for line in partings(done)[1:] if "the masks" not in line], "of the figures only the first"
    assert plans(copied.parent / "run-replay") == plans(copied)


@pytest.mark.parametrize(
    ("number", "changes", "told"),
    [
        (2, {"kl": 0.5}, r"trial 2: KL 0.5000 in the record, "),
        (3, {"verdict": "refuse"}, r"trial 3: verdict refuse in the record, "),
        (1, {"perplexity": None}, r"trial 1: perplexity not finite in the record, "),
        (1, {"checkpoint": "0123456789abcdef"}, r"trial 1: checkpoint 0123456789ab in the record, "),
    ],
)
def test_the_first_figure_that_differs_is_told(
    number: int, changes: dict[str, Any], told: str, copied: Path, command: Command
) -> None:
    edit_event(copied, "trial", number, **changes)
    done = command("--replay", "run")
    (line,) = partings(done)
    assert line.startswith(f"parts from the record at {told}")
    assert done.code == 0 and "note: the masks are those of run run" in done.out


def test_an_order_that_differs_is_told(copied: Path, command: Command) -> None:
    there = read_events(copied, "plan")[1]["order"]
    edit_event(copied, "plan", 1, order="0" * 64)
    edit_event(copied, "trial", 3, kl=0.5)
    done = command("--replay", "run")
    told = f"parts from the record at plan 2: work order 000000000000 in the record, {there[:12]} here"
    assert partings(done) == [told], "and only the first"


def test_other_masks_are_told_at_the_end(copied: Path, command: Command) -> None:
    edit_event(copied, "result", 0, mask_sha256="0" * 64)
    done = command("--replay", "run")
    assert partings(done) == [done.out.splitlines()[-1]]
    assert done.out.splitlines()[-1].startswith("parts from the record at the masks: mask_sha256 000000000000 in the ")


# Records that end early


def test_an_unfinished_run_is_replayed_as_far_as_its_record_goes(copied: Path, command: Command) -> None:
    events = read_events(copied)
    cut = next(i for i, event in enumerate(events) if event["type"] == "plan" and event["iteration"] == 3)
    rewrite_log(copied, write_lines(events[:cut]))
    with (copied / "events.jsonl").open("a") as log:
        log.write('{"time": 1, "ty')
    done = command("--replay", "run")
    assert (done.code, done.err) == (0, "")
    assert "note: the record of run run ends here, unfinished" in done.out
    assert [trial.iteration for trial in read_state(copied.parent / "run-replay").trials] == [1, 2]
    assert partings(done) == []


def test_a_plan_that_cannot_be_carried_out_is_an_end(copied: Path, command: Command) -> None:
    adjustments = [{"selector": "*.nothing", "action": "protect"}]
    edit_event(copied, "plan", 1, details={"sparsity": 0.45, "adjustments": adjustments})
    done = command("--replay", "run")
    assert (done.code, done.err) == (0, "")
    assert "note: plan 2 of run run cannot be carried out here: selector '*.nothing' means no layer; " in done.out
    assert [trial.iteration for trial in read_state(copied.parent / "run-replay").trials] == [1]


def test_the_end_of_the_rules_levers_is_an_end(tiny_llama: Path, tmp_path: Path, command: Command) -> None:
    given = ["--name", "run", "--model", str(tiny_llama), *TINY, "--pattern", "2:4", "--patience", "1"]
    assert command(*given).code == 0
    assert command("--replay", "run").code == 0
    ours, theirs = (read_state(tmp_path / "runs" / name) for name in ("run-replay", "run"))
    assert (ours.stop, ours.iteration) == (theirs.stop, theirs.iteration)


def test_what_a_person_said_is_repeated(
    tiny_llama: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    said = Terminal('refuse too bold\n{"sparsity": 0.3}\naccept\naccept\n')
    given = ["--name", "run", "--model", str(tiny_llama), *TINY, "--approve", "plans", "--max-iterations", "4"]
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdin", said)
        assert command(*given).code == 0
    done = command("--replay", "run")
    assert (done.code, done.err) == (0, "")
    ours, theirs = tmp_path / "runs" / "run-replay", tmp_path / "runs" / "run"
    assert read_trials(ours) == read_trials(theirs)
    assert read_trials(ours)[0][-1] == "refuse"
    assert read_summary(ours)["mask_sha256"] == read_summary(theirs)["mask_sha256"]


# Refusals


def break_json(run: Path) -> None:
    lines = (run / "events.jsonl").read_text().splitlines(keepends=True)
    (run / "events.jsonl").write_text("".join([*lines[:2], "{ nonsense\n", *lines[2:]]))


def cut_log(run: Path) -> None:
    lines = (run / "events.jsonl").read_bytes().splitlines(keepends=True)
    (run / "events.jsonl").write_bytes(b"".join(lines[:-1]))


REFUSED: dict[str, tuple[Callable[[Path], object], list[str], str]] = {
    "no such run": (shutil.rmtree, [], "there is no run 'run' in runs; see --list"),
    "no record": (lambda run: (run / "events.jsonl").unlink(), [], "run 'run' left no record in runs; see --list"),
    "an empty record": (lambda run: rewrite_log(run, [b"{}"]), [], "holds no plan to repeat"),
    "a record that was cut": (cut_log, [], "runs/run/events.jsonl is damaged: what was written last is missing; "),
    "a damaged record": (
        break_json,
        [],
        "the record of run 'run' is damaged: line 3 of runs/run/events.jsonl is no event",
    ),
    "no event": (lambda run: rewrite_log(run, [b"[1]", b"{}"]), [], "line 1 of runs/run/events.jsonl is "),
    "of another version": (
        lambda run: write_json(run / "run.json", {"thread_id": "1"}),
        [],
        "run 'run' is of another version of Billhook; begin it again",
    ),
    "another plan": (
        lambda run: edit_event(run, "plan", 1, details={"sparsity": 0.3, "magic": 1}),
        [],
        "the record of run 'run' is of another version: plan of iteration 2: magic: extra inputs are not permitted",
    ),
    "a plan without details": (
        lambda run: edit_event(run, "plan", 0, details=None),
        [],
        "the record of run 'run' is of another version: plan of iteration 1: ",
    ),
    "another trial": (
        lambda run: edit_event(run, "trial", 0, iteration="dense"),
        [],
        "the record of run 'run' is of another version: invalid literal for int()",
    ),
    "another config": (
        lambda run: (run / "config.yaml").write_text("target: 0.4\n"),
        [],
        "run 'run' cannot be read: its config.yaml is not what the run was begun with (",
    ),
    "a config beside it": (lambda run: None, ["--config", "x.yaml"], "--replay takes the config of the run itself"),
    "approval beside it": (lambda run: None, ["--approve", "plans"], "--replay repeats what a person said"),
    "resume beside it": (lambda run: None, ["--resume", "run"], "--resume goes on with a replay as well"),
}


@pytest.mark.parametrize(("harm", "more", "expected"), REFUSED.values(), ids=REFUSED)
def test_refused_in_one_line(
    harm: Callable[[Path], object], more: list[str], expected: str, copied: Path, command: Command
) -> None:
    harm(copied)
    outcome = command("--replay", "run", *more)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("error: ") and outcome.err.count("\n") == 1
    assert expected in outcome.err
    assert not (copied.parent / "run-replay").exists()
