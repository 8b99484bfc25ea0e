"""A run as its directory tells it, finished or not: what `tools.report` shows. No torch in here."""

import json
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, Field, FiniteFloat, TypeAdapter, ValidationError, model_validator

from tools.base.errors import DamagedArtifact, UserError, in_one_line
from tools.base.files import find_artifact
from tools.base.rundir import check_log, read_config_values, read_made, read_result, refuse_lost_result, scan_events
from tools.plans.layer_profile import LayerProfile
from tools.results.schema import Summary, Usage
from tools.results.trial import Measured, Trial

MARKS = ("events.jsonl", "config.yaml", "summary.json")
"""A directory with one of these files holds a run."""


class Plan(BaseModel):
    """What the planner decided."""

    planner: str = ""
    plan: str
    reason: str = ""
    predicted_kl: Measured = None
    details: dict[str, Any] = {}


class Reply(BaseModel):
    """What an agent's model said."""

    agent: str = Field("", description="plan or reflect: the node that asked.")
    planner: str = Field("", description="The model, whichever agent it is.")
    reply: str
    problem: str = Field("", description="Why it was not used; empty when it was.")
    input_tokens: int = 0
    output_tokens: int = 0
    own_count: int = Field(0, description="Of the tokens, those that the endpoint did not tell.")


class ToolCall(BaseModel):
    """A tool that a planner called."""

    tool: str
    arguments: str = ""
    shown: str = ""


class Lesson(BaseModel):
    """What the trial taught."""

    selector: str = "*"
    factor: Measured = None
    text: str
    source: str = "measured"


class Layers(BaseModel):
    """The sparsity of every layer at a checkpoint."""

    checkpoint: str
    names: list[str]
    blocks: list[int]
    kinds: list[str]
    sparsity: list[FiniteFloat]

    @model_validator(mode="after")
    def _check_lengths(self) -> Self:
        if not len(self.names) == len(self.blocks) == len(self.kinds) == len(self.sparsity):
            raise ValueError("a layer lacks its name, block, kind or sparsity")
        return self


class Text(BaseModel):
    """A note or a warning."""

    text: str


class Stopped(BaseModel):
    """Why the process ended before the run did, and the command that goes on."""

    reason: str
    resume: str = ""


class Approval(BaseModel):
    """What a person said to a plan."""

    decision: str
    reason: str = ""


class Round(BaseModel):
    """All that belongs to one iteration, as far as it came."""

    plan: Plan | None = None
    approval: Approval | None = None
    trial: Trial | None = None
    replies: list[Reply] = []
    tools: list[ToolCall] = []
    lessons: list[Lesson] = []
    notes: list[str] = []


class Record(BaseModel):
    """A run."""

    name: str
    config: dict[str, Any] = Field({}, description="config.yaml, without what may change when a run is resumed.")
    summary: Summary | None = Field(None, description="Null until the run is finished.")
    dense: Trial | None = None
    rounds: dict[int, Round] = Field({}, description="By iteration, from 1.")
    layers: Layers | None = Field(None, description="Of the weights that were kept; null while these are dense.")
    profile: list[LayerProfile] = Field([], description="Empty until the model is profiled.")
    usage: Usage = Field(default_factory=Usage)
    node: str = Field("", description="The node at work, or the last that was.")
    stop: str = Field("", description="Why the loop ended; empty while it goes on.")
    stopped: Stopped | None = Field(None, description="Null while a process is at work.")
    warnings: list[str] = []
    unread: int = Field(0, description="Events that are not of the form that is known.")

    @property
    def trials(self) -> list[Trial]:
        """Every trial but the dense model, in order."""
        return [round_.trial for _, round_ in sorted(self.rounds.items()) if round_.trial]

    @property
    def kept(self) -> Trial | None:
        """The trial whose weights were kept; the dense model's before the first."""
        return next((t for t in reversed(self.trials) if t.verdict == "accept"), self.dense)


def read_run(directory: Path) -> Record:
    """What a run's directory says so far. Raises UserError where there is no run, or a file of it cannot be read."""
    if not any((directory / mark).is_file() for mark in MARKS):
        raise UserError(f"{directory} holds no run: it has none of {', '.join(MARKS)}")
    record = Record(
        name=directory.resolve().name,
        config=_read_config(directory),
        summary=read_summary(directory),
    )
    check_log(directory)
    refuse_lost_result(directory)
    reader = _Reader(record)
    for _, event in scan_events(directory, *_Reader.TYPES):
        try:
            reader.take(event)
        except (ValidationError, TypeError, AttributeError, KeyError):
            record.unread += 1
    kept = record.kept
    record.layers = reader.layers.get(kept.checkpoint) if kept else None
    if reader.profile:
        record.profile = _read_profile(directory, reader.profile)
    if record.summary:
        record.name, record.usage = record.summary.run, record.summary.agents
    return record


def read_summary(directory: Path) -> Summary | None:
    """What `summary.json` of a run says; None where there is none. Raises UserError."""
    try:
        result = read_result(directory)
        return None if result is None else Summary.model_validate(result)
    except ValidationError as error:
        raise UserError(f"{directory / 'summary.json'} cannot be read: {in_one_line(error, 200)}") from error


def _read_config(directory: Path) -> dict[str, Any]:
    """`config.yaml`, as far as the run was begun with it."""
    begun = read_made(directory)["config"]
    return {name: value for name, value in read_config_values(directory).items() if name in begun}


_PROFILE = TypeAdapter(list[LayerProfile])


def _read_profile(directory: Path, profile: str) -> list[LayerProfile]:
    """The layers of a profile artifact. Raises UserError when it is not there as it was written."""
    try:
        text = find_artifact(directory / "artifacts", profile, ".json").read_text(encoding="utf-8")
        return _PROFILE.validate_python(json.loads(text)["layers"])
    except (DamagedArtifact, ValueError, TypeError, KeyError) as error:
        raise UserError(f"the profile of {directory} cannot be read: {in_one_line(error)}") from error


class _Profile(BaseModel):
    profile: str = Field(pattern="^[0-9a-f]{64}$")


class _Node(BaseModel):
    node: str
    iteration: int


class _Reader:
    """Sorts events into rounds. A node that was killed did part of its work, and does all of it again."""

    TYPES = (
        *("start", "node", "profile", "plan", "approval", "trial", "layers", "reply", "tool", "lesson", "usage"),
        *("note", "warning", "stopped"),
    )

    def __init__(self, record: Record) -> None:
        self.record, self.present = record, Round()
        self.layers: dict[str, Layers] = {}
        self.profile = ""

    def take(self, event: dict[str, Any]) -> None:
        """Raises ValidationError, and others, for an event of an unknown form."""
        record, type_ = self.record, event["type"]
        match type_:
            case "start":
                record.stopped = None
            case "node":
                self._enter(_Node.model_validate(event))
            case "profile":
                self.profile = _Profile.model_validate(event).profile
            case "plan":
                self.present.plan = Plan.model_validate(event)
            case "approval":
                self.present.approval = Approval.model_validate(event)
            case "trial":
                self._take_trial(Trial.model_validate(event))
            case "layers":
                layers = Layers.model_validate(event)
                self.layers[layers.checkpoint] = layers
            case "reply":
                self.present.replies.append(Reply.model_validate(event | {"agent": record.node}))
            case "tool":
                self.present.tools.append(ToolCall.model_validate(event))
            case "lesson":
                self.present.lessons.append(Lesson.model_validate(event))
            case "usage":
                record.usage = Usage.model_validate(event)
            case "note":
                self.present.notes.append(Text.model_validate(event).text)
            case "warning":
                record.warnings.append(Text.model_validate(event).text)
            case "stopped":
                record.stopped = Stopped.model_validate(event)

    def _enter(self, node: _Node) -> None:
        record = self.record
        if node.node == "finish" and self.present.notes and not record.stop:
            record.stop = self.present.notes[-1]  # the last that the loop said
        record.node = node.node
        if node.iteration:  # the first profile belongs to no round
            self.present = record.rounds.setdefault(node.iteration, Round())
        if node.node in ("plan", "reflect"):
            self.present.lessons.clear()
            self.present.notes.clear()

    def _take_trial(self, trial: Trial) -> None:
        if trial.iteration:
            self.record.rounds.setdefault(trial.iteration, Round()).trial = trial
        else:
            self.record.dense = trial
