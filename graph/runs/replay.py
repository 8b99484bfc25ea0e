"""Replay a run from its record: `python -m graph.run --replay RUN`.

`events.jsonl` holds every plan, every reflection, and every decision of a person, so a new run can take them from
there: no agent is asked, and no key or endpoint is needed. What was measured is compared with the record, and the
first figure that differs is told: then code, data or machine are others than they were.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from graph.goals.schema import Brief
from graph.planning.plan import Plan
from graph.reflecting.schema import Reflection
from graph.state import State
from tools.base.errors import BrokenPlan, ImpossiblePlan, UserError
from tools.base.rundir import check_log, read_log, runs_directory, scan_events
from tools.plans.cuts import Target
from tools.plans.work_order import WorkOrder

Event = dict[str, Any]
Model = TypeVar("Model", bound=BaseModel)

FIGURES = {"perplexity": "perplexity", "kl": "KL", "verdict": "verdict", "checkpoint": "checkpoint"}
"""What is compared of a trial, in this order, and what people call it."""


@dataclass
class Record:
    """What a run left in `events.jsonl`: by iteration, the last word where a crash had one said twice."""

    run: str
    brief: Brief | None = None
    """What was made of its goal."""
    target: Target | None = None
    """What its size or speed came to in the model's parts, where it had one."""
    plans: dict[int, Plan] = field(default_factory=dict)
    orders: dict[int, str] = field(default_factory=dict)
    """Ids of their work orders."""
    decisions: dict[int, Event] = field(default_factory=dict)
    """What a person said to a plan, where the run asked one."""
    reflections: dict[int, Reflection] = field(default_factory=dict)
    """What a reflector's model said; nothing where the reflections are worked out from figures."""
    trials: dict[int, Event] = field(default_factory=dict)
    profiled: set[int] = field(default_factory=set)
    """Iterations that another profile came behind."""
    mask_sha256: str = ""
    """Of the result; empty when the run did not finish."""
    stop: str = ""
    """Why its loop ended."""
    finishing: bool = False
    """Whether it was at its end already, whose notes are about other things."""


def read_record(run: str) -> Record:
    """The record of a run. Raises UserError in one line when there is none, or it is damaged or of another form."""
    record, path = Record(run), runs_directory() / run / "events.jsonl"
    if not path.is_file():
        raise UserError(f"run {run!r} left no record in {path.parent.parent}; see --list")
    check_log(path.parent)
    for event in _read_events(record.run, path):
        try:
            _take(record, event)
        except ValidationError as error:
            problem = error.errors()[0]
            place = ".".join(str(part) for part in problem["loc"])
            what = f"{event['type']} of iteration {event.get('iteration')}: {place}: {problem['msg'].lower()}"
            raise UserError(f"the record of run {run!r} is of another version: {what}") from error
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            what = f"{event.get('type')} event without a proper {error}" if isinstance(error, KeyError) else str(error)
            raise UserError(f"the record of run {run!r} is of another version: {what}") from error
    return record


def _read_events(run: str, path: Path) -> list[Event]:
    """All events; a line that a kill left unfinished is left out, and the event that was written behind it read."""
    events = []
    lines = list(read_log(path.parent))
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            events.append(_read_line(line))
        except ValueError as error:
            if number == len(lines):
                continue
            raise UserError(f"the record of run {run!r} is damaged: line {number} of {path} is no event") from error
    return events


def _read_line(line: bytes) -> Event:
    """One event; the last one of a line whose beginning is torn. Raises ValueError."""
    try:
        event = json.loads(line)
    except ValueError:
        event = json.loads(line[line.rindex(b'{"time": ', 1) :])
    if not isinstance(event, dict):
        raise ValueError("not an object")
    return event


def _take(record: Record, event: Event) -> None:
    match event.get("type"):
        case "brief":
            record.brief = Brief.model_validate(event["details"])
        case "target":
            record.target = Target.model_validate({name: event[name] for name in Target.model_fields})
        case "plan":
            record.plans[int(event["iteration"])] = Plan.model_validate(event["details"])
            record.orders[int(event["iteration"])] = event["order"]
        case "approval":
            record.decisions[int(event["iteration"])] = {"decision": event["decision"], "reason": event["reason"]}
        case "reflection":
            record.reflections[int(event["iteration"])] = Reflection.model_validate(event["details"])
        case "trial":
            record.trials[int(event["iteration"])] = {
                **{name: event[name] for name in FIGURES},
                "broken": event["broken"],
                "reason": event["reason"],
                "order": event["order"],
            }
        case "profile":
            record.profiled |= {max(record.trials)} if record.trials else set()
        case "node":
            record.finishing = event.get("node") == "finish"
        case "note" if not record.mask_sha256 and not record.finishing:
            record.stop = str(event["text"])  # the last that the loop said
        case "result":
            record.mask_sha256 = str(event["mask_sha256"])


def find_breakage(run: str, iteration: int, *, planned: bool = False) -> str:
    """How the plan of an iteration broke in the record, where another machine may have less memory; empty for none.

    With `planned` only where it broke before it came to a work order. It is taken as it was, so that all that follows
    is what followed then.
    """
    trial = read_record(run).trials.get(iteration, {})
    return trial["reason"] if trial.get("broken") and not (planned and trial["order"]) else ""


def find_plan(state: State, resolve: Callable[[Plan], WorkOrder]) -> tuple[Plan | None, str]:
    """The recorded plan of the state's iteration; without one that can be carried out, why the replay ends there.

    Where the run asked a person, a plan counts once there was an answer. `resolve` raises ImpossiblePlan.
    """
    record, iteration = read_record(state.replay), state.iteration
    plan = record.plans.get(iteration)
    if plan is None or (state.config.approves_plans and iteration not in record.decisions):
        if record.mask_sha256:
            return None, record.stop or f"run {record.run} planned no more rounds"
        return None, f"the record of run {record.run} ends here, unfinished"
    try:
        if not find_breakage(record.run, iteration, planned=True):
            resolve(plan)
    except BrokenPlan:
        return plan, ""  # a round of its own, as it would be in any run
    except ImpossiblePlan as error:
        return None, f"plan {iteration} of run {record.run} cannot be carried out here: {error}"
    return plan, ""


def find_brief(run: str) -> Brief:
    """What was made of the goal of a run. Raises UserError where it did not come so far."""
    brief = read_record(run).brief
    if brief is None:
        raise UserError(f"the record of run {run} ends before anything was made of its goal")
    return brief


def read_target(run: str) -> Target | None:
    """What the size or speed of a run came to in the model's parts; None where the record does not say."""
    return read_record(run).target


def find_reflection(run: str, iteration: int) -> Reflection:
    """What the reflector's model said of an iteration; nothing where there was none, or the rule stood in for it."""
    return read_record(run).reflections.get(iteration, Reflection())


def find_decision(run: str, iteration: int) -> Event:
    """What a person said to the plan of an iteration."""
    return read_record(run).decisions[iteration]


def find_refusal(run: str, iteration: int) -> str:
    """Why a person refused the plan of an iteration, whoever asked; empty where nobody did."""
    decision = read_record(run).decisions.get(iteration, {})
    return str(decision["reason"]) if decision.get("decision") == "refuse" else ""


def compare(run: str, event: Event, directory: Path) -> tuple[str, str] | None:
    """What to tell, as (type, text) of an event, of a plan, a trial or the result beside the record of `run`.

    Of plans and trials only the first that differs is told; the log in `directory` says whether one was.
    """
    if event["type"] in ("plan", "trial"):
        parting = _compare_plan(run, event) if event["type"] == "plan" else _compare_trial(run, event)
        return ("parting", parting) if parting and not _has_parted(directory) else None
    if event["type"] == "result" and (masks := read_record(run).mask_sha256):
        if masks == event["mask_sha256"]:
            return "note", f"the masks are those of run {run} (mask_sha256 {masks[:12]}…)"
        return "parting", f"the masks: mask_sha256 {_show_both(masks, event['mask_sha256'])}"
    return None


def _compare_plan(run: str, event: Event) -> str:
    """How a plan comes to another work order than in the record; empty where it does not, or the record has none."""
    iteration, here = event["iteration"], event["order"]
    there = read_record(run).orders.get(iteration, here)
    return f"plan {iteration}: work order {_show_both(there, here)}" if there != here else ""


def _compare_trial(run: str, event: Event) -> str:
    """The first figure of a trial that differs from the record's; empty where none does."""
    record, iteration = read_record(run), event["iteration"]
    there = record.trials.get(iteration, event)
    if there["broken"] != event["broken"]:
        where = "in the record" if there["broken"] else "here"
        reason = there["reason"] if there["broken"] else event["reason"]
        return f"trial {iteration}: it broke {where} only ({reason})"
    for name, word in FIGURES.items():
        if there[name] != event[name]:
            where = f"trial {iteration}" if iteration else "the dense model"
            return f"{where}: {word} {_show_both(there[name], event[name])}"
    return ""


def _has_parted(directory: Path) -> bool:
    return bool(scan_events(directory, "parting"))


def _show_both(there: Any, here: Any) -> str:
    """Both values, with as many digits as tell them apart."""
    if isinstance(there, float) and isinstance(here, float):
        pairs = ([f"{value:#.{digits}g}".rstrip(".") for value in (there, here)] for digits in range(4, 18))
        shown = next(pair for pair in pairs if pair[0] != pair[1])
        return f"{shown[0]} in the record, {shown[1]} here"
    shown = ["not finite" if value is None else str(value)[:12] for value in (there, here)]
    return f"{shown[0]} in the record, {shown[1]} here"
