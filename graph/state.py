"""What is checkpointed between nodes: JSON-sized, ids of artifacts, never a tensor."""

import operator
from collections.abc import Sequence
from typing import Annotated, Any, Self

from pydantic import BaseModel, Field, ModelWrapValidatorHandler, ValidationError, model_validator

from graph.config import RunConfig
from graph.goals.schema import Brief, NewText
from graph.planning.plan import Plan
from graph.reflecting.schema import Experience, Lesson, Note
from tools.base.named import RUN_NAME
from tools.base.options import describe_problem
from tools.base.settings import KEPT
from tools.instruments.probed import PastProbe
from tools.results.schema import Usage
from tools.results.trial import Trial

SIGMAS = 2.0
"""Differences below this many standard errors are noise: neither an improvement nor a lesson."""


class Input(BaseModel):
    """What a run is started with in Studio; everything else is its context (the config)."""

    run: str = Field(
        "",
        pattern=rf"^$|^{RUN_NAME}$",
        description="Name of the run's directory; empty makes one from the thread.",
    )
    replay: str = Field(
        "",
        pattern=rf"^$|^{RUN_NAME}$",
        description="Name of a recorded run whose plans and reflections are taken, so that no agent is asked; empty "
        "for a run of its own.",
    )


def last_accepted(trials: Sequence[Trial]) -> Trial | None:
    """The last trial that was kept; None before the first."""
    return next((trial for trial in reversed(trials) if trial.verdict == "accept"), None)


def pair_with_kept(trials: Sequence[Trial]) -> list[tuple[Trial, Trial | None]]:
    """Each trial with the last that was kept before it."""
    return [(trial, last_accepted(trials[:place])) for place, trial in enumerate(trials)]


class UnreadableState(RuntimeError):
    """A run's state is none, because a person edited it to what cannot be; the message says what, in one line."""


class State(Input):
    """The whole state of a run between two nodes."""

    came_from: str = Field("", description="The checkpoint that the last node worked from; it tells a fork.")
    config: RunConfig = Field(default_factory=RunConfig)
    profile: str = Field("", description="Hash of the profile artifact.")
    parts: str = Field("", description="Artifact of what is known of the model's parts, where some are to go.")
    dense: Trial | None = Field(None, description="The dense model on the validation text, as iteration 0.")
    brief: Brief | None = Field(None, description="What was made of the config's goal, which the config follows.")
    written: list[NewText] = Field(
        [],
        description="Texts that plans had the model write, which the config has, too; the brief's are not among them.",
    )
    iteration: int = 0
    plan: Plan | None = None
    order: str = Field("", description="Hash of the artifact with the plan's work order.")
    current: str = Field("dense", description="Manifest of the weights that are in the model now.")
    accepted: str = Field("dense", description="Manifest of the last accepted weights.")
    accepted_plan: Plan | None = Field(None, description="The plan that made them.")
    trials: Annotated[list[Trial], operator.add] = []
    lessons: list[Lesson] = []
    notes: list[Note] = Field([], description="A reflector's notes of strategy, of this and earlier runs, the latest.")
    judged: dict[int, str] = Field({}, description="What the reflector said of rounds, by their numbers.")
    probes: list[PastProbe] = Field([], description="What probes of earlier rounds measured, the latest.")
    experience: list[Experience] = Field([], description="What levers did in earlier runs, as the run began.")
    reprofile: bool = Field(False, description="The reflector asked for a new profile after the last trial.")
    usage: Usage = Field(default_factory=Usage)
    evaluated_tokens: int = Field(
        0,
        description="Tokens put through the model since the first profile: by trials, probes, KL curves of methods, "
        "statistics behind pruned predecessors and further profiles; a backward pass counts as two forwards.",
    )
    counted: list[str] = Field([], description="Names of the costs beside trials and probes that are in them.")
    probed: dict[str, int] = Field(
        {}, description="Tokens of validation text that probes of the round measured orders on, by the orders' ids."
    )
    stop: str = Field("", description="Why the loop ended; empty while it goes on.")
    seconds: float = Field(0.0, description="Time spent inside nodes, over all processes that worked on the run.")

    @model_validator(mode="wrap")
    @classmethod
    def _explain(cls, values: Any, validate: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return validate(values)
        except ValidationError as error:
            problems = "; ".join(describe_problem(problem) for problem in error.errors()[:3])
            raise UnreadableState(
                f"the run's state was edited to what it cannot be ({problems}); edit it again"
            ) from error

    @property
    def kept(self) -> list[str]:
        """Checkpoints whose layers stay on disk: the accepted one, and beside it those of the last trials.

        Planners like to come back to what was just rolled back; what is not kept can be made again.
        """
        recent = reversed([trial.checkpoint for trial in self.trials])
        return list(dict.fromkeys([self.accepted, *recent]))[:KEPT]

    @property
    def trial_tokens(self) -> int:
        """Tokens that one trial puts through the model, at most."""
        return self.dense.tokens if self.dense and self.dense.tokens else self.config.validation_tokens
