"""What a reflector answers with, and what becomes of it: a lesson."""

import operator
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, create_model

from tools.plans.layer_profile import MOST_SELECTOR

MAX_LEARNT = 5
"""Lessons that a reflector may draw from one trial."""

MOST = 2.0
"""A lesson corrects a group's KL curves by at most this factor, up or down: one trial is thin evidence."""


MAX_NOTES = 6
"""Notes of strategy that planners are shown, the latest; older ones drop out."""

NEAR = 0.2
"""A lesson weighs in plans whose sparsity is at most so far from its own: as far as a step of the rule."""


class Learnt(BaseModel):
    """What a reflector says that a trial taught of some layers."""

    model_config = ConfigDict(extra="forbid")

    selector: str = Field(
        min_length=1,
        max_length=MOST_SELECTOR,
        description="Which layers: a glob over layer names, optionally after a range of blocks, such as '*.v_proj', "
        "'blocks 0-3' or 'blocks 0-3 · *.v_proj'.",
    )
    direction: Literal["dearer", "cheaper"] = Field(
        description="Whether pruning these layers costs more or less KL than their curves predict."
    )
    multiplier: float = Field(
        ge=1 / MOST,
        le=MOST,
        description="How many times the predicted KL they cost: above 1 when dearer, below 1 when cheaper.",
    )
    confidence: float = Field(ge=0, le=1, description="How sure this is, from 0 to 1.")
    evidence: str = Field(min_length=1, max_length=300, description="The figures that say so, in one sentence.")

    @property
    def contradiction(self) -> str:
        """What is wrong where direction and multiplier contradict each other, in words for the model; else empty."""
        if self.multiplier == 1 or (self.multiplier > 1) == (self.direction == "dearer"):
            return ""
        side, other = ("above", "cheaper") if self.direction == "dearer" else ("below", "dearer")
        return (
            f"{self.direction!r} needs a multiplier {side} 1, not {self.multiplier:g}; write "
            f"{1 / self.multiplier:.3g}, or {other!r} if that is what the figures say"
        )


class Advice(BaseModel):
    """A note of strategy, as a reflector writes it."""

    model_config = ConfigDict(extra="forbid")

    text: Annotated[str, StringConstraints(strip_whitespace=True)] = Field(
        min_length=1, max_length=300, description="What planners of later rounds and runs should know, in a sentence."
    )
    trials: list[int] = Field(
        min_length=1, max_length=8, description="The rounds of this run whose measurements say so, by their numbers."
    )


class Reflection(BaseModel):
    """What a reflector makes of one trial."""

    model_config = ConfigDict(extra="forbid")

    lessons: list[Learnt] = Field(
        default_factory=list,
        max_length=MAX_LEARNT,
        description="What the trial taught of groups of layers; an empty list when it taught nothing.",
    )
    note: Advice | None = Field(
        None,
        exclude_if=lambda note: note is None,
        description="A note of strategy for the planner, where measured rounds bear one out; else null.",
    )
    veto: bool = Field(
        False,
        exclude_if=operator.not_,
        description="The rule's lesson is wrong, as the reason says: its trial is to weigh in no allocation.",
    )
    reprofile: bool = Field(
        False,
        description="Profile again on the weights just kept, before the next round; costs as much as the first "
        "profile. Does nothing after a rollback.",
    )
    stop: bool = Field(
        False, description="End the run here, for nothing more is to be won. Does nothing before the target is reached."
    )
    reason: str = Field(
        "",
        max_length=500,
        description="Whether what was expected came true, and why to stop, to profile again or to go on.",
    )


OF_CUTS = ("note", "stop", "reason")
"""What a reflector says of a trial that took parts away: lessons are factors on the KL curves of weights."""


@cache
def tell_of_cuts() -> type[BaseModel]:
    """The schema of a reflection on such a trial."""
    fields: dict[str, Any] = {
        name: (Reflection.model_fields[name].annotation, Reflection.model_fields[name]) for name in OF_CUTS
    }
    return create_model("Reflection", __config__=Reflection.model_config, __doc__=Reflection.__doc__, **fields)


def drop_schema(answer: BaseModel) -> Reflection:
    """The reflection itself, whichever schema it was answered by."""
    return answer if isinstance(answer, Reflection) else Reflection.model_validate(answer.model_dump())


class Lesson(BaseModel):
    """What trials taught: for these layers the KL curves were off by this factor."""

    run: str = Field(description="The run that taught it, or the last of those that did.")
    iteration: int
    recipe: str = Field(
        "",
        description="Mask method and refit the lesson was learnt with, such as two-sided+refit: `Recipe.work_label`, "
        "and what groups had (`name_work`).",
    )
    curves: Literal["mask", "method"] = Field(
        "mask", description="The KL curves that it corrects: the profile's, or those of its method itself."
    )
    calibration: str | None = Field(None, description="The calibration text it was learnt on.")
    pattern: str | None = Field(None, description="The run's pattern; empty for zeros anywhere.")
    sparsity: float | None = Field(None, description="Sparsity of the trial, or of the last of them, that taught it.")
    selector: str = Field(description="The layers it is about; * is the model as a whole.")
    factor: float = Field(
        description="Measured over predicted; for a group, 2 = twice as precious as its KL curves say."
    )
    predicted: float
    measured: float | None = Field(description="Null where it was not finite.")
    moved: dict[str, float] = Field(
        {},
        exclude_if=operator.not_,
        description="Of a trial that moved weights at the same sparsity and work: by how much that was predicted to "
        "change each group's KL, in nats per token, for the groups that moved most. Factors are fitted to all such "
        "trials together, so that `factor` is what this one alone says.",
    )
    error: float | None = Field(
        None, exclude_if=lambda error: error is None, description="Standard error of measured in such a trial."
    )
    text: str
    source: Literal["measured", "reflector"] = Field(
        "measured", description="Worked out from the trial's figures, or said by the reflector's model."
    )
    confidence: float = Field(
        1.0, ge=0, le=1, description="Weight of an observation in a mean; 0 for words that nothing is computed with."
    )
    count: int = Field(1, ge=1, description="Observations that it is the mean of.")
    model: str = Field("", description="The model it is about, where that is another than the run's.")
    same_config: bool = Field(
        False, description="The lesson comes from a run of the same trials, so a repeat would count it twice."
    )

    def knows(self, calibration: str, pattern: str) -> bool:
        """Whether it was learnt on this text and pattern, as far as that was noted."""
        return self.calibration in (None, calibration) and self.pattern in (None, pattern)

    def fits(self, calibration: str, pattern: str, sparsity: float) -> bool:
        """Whether it says something of the KL curves of a plan: learnt on its text and pattern, near its sparsity."""
        near = self.sparsity is None or round(abs(self.sparsity - sparsity), 3) <= NEAR
        return near and self.knows(calibration, pattern)

    @property
    def ground(self) -> str:
        """Where it was learnt, such as `at 45.0% on pydoc`, or `at 50.0% as 2:4 on pydoc`; empty if not noted."""
        at = "" if self.sparsity is None else f"at {self.sparsity:.1%}"
        form = f"as {self.pattern}" if self.pattern else ""
        on = f"on {self.calibration}" if self.calibration else ""
        return " ".join(part for part in (at, form, on) if part)


class Note(BaseModel):
    """A note of strategy as runs keep it."""

    run: str
    iteration: int = Field(description="The round after which it was written.")
    sparsity: float = Field(description="Of that round's trial.")
    pattern: str = Field(description="The run's pattern; empty for zeros anywhere.")
    cuts: bool = Field(False, exclude_if=operator.not_, description="Whether it is about whole parts that go.")
    text: str
    trials: list[int] = Field(description="The rounds that are its evidence.")


class Tried(BaseModel):
    """What a trial's levers did to KL, beside the last kept trial of its run at the same sparsity."""

    run: str
    iteration: int
    levers: str = Field(description="The method, and what the plan did otherwise than the kept one's.")
    sparsity: float
    pattern: str = Field(description="The run's pattern; empty for zeros anywhere.")
    change: float = Field(description="KL over that of the kept trial, minus 1, on the same windows.")
    error: float = Field(description="Standard error of the change, paired.")


class Experience(BaseModel):
    """What the same levers did in trials of earlier runs at one sparsity: a row of the planner's table."""

    levers: str
    sparsity: float
    change: float = Field(description="Mean of the trials' changes.")
    error: float = Field(description="Its standard error.")
    trials: int
    runs: int
    model: str = Field("", description="The model, where that is a relative of the run's.")
