"""`summary.json`: the result of a run, of which report.md, report.html, the model card and the last lines are made."""

import operator
import platform
from importlib.metadata import version
from typing import Any, Literal

from pydantic import BaseModel, Field

from tools.base.settings import Split, WorkbenchSettings
from tools.plans.costs import Means
from tools.plans.methods import Statistics

PACKAGES = ("torch", "transformers", "langgraph", "numpy")


class Protocol(BaseModel):
    """How perplexity was measured; results with different protocols must not be compared."""

    text: str = Field(description="Source of the text.")
    tokens: int
    window: int = Field(description="Tokens in a window; windows do not overlap and share no context.")
    dtype: str
    versions: dict[str, str]
    bos: bool = Field(
        False,
        description="Whether the tokenizer's beginning-of-sequence token stood before every window; no loss counts it.",
    )

    cut: int = Field(
        0, description="Which windows of the text these are: 0 the first; no two numbers have any in common."
    )
    spread: int = Field(
        1, description="Of so many windows in a row of the text one was taken; 0: of as many as it had room for."
    )

    @property
    def windows(self) -> str:
        """How the text was cut, in words."""
        return f"windows of {self.window}{describe_cut(self.cut, self.spread)}{describe_bos(self.bos)}"


def describe_bos(used: bool) -> str:
    """What is said of windows, after their length, where a beginning-of-sequence token stands before each."""
    return ", a beginning-of-sequence token before every window (not counted)" if used else ""


def describe_cut(cut: int, spread: int = 1) -> str:
    """What is said of windows, after their length, that are not the first of their text, one behind the other."""
    apart = {0: " from all over it", 1: ""}.get(spread, f", one of every {spread} (--text-spread {spread})")
    return f"{apart}{f', cut {cut + 1} of it (--text-cut {cut})' if cut else ''}"


class Perplexities(BaseModel):
    """On the test text; null where the loss was not finite."""

    dense: float | None
    pruned: float | None
    uniform_wanda: float | None


class TextFigures(BaseModel):
    """What weights lose on one of the named texts: its validation windows alone."""

    name: str
    weight: float = Field(description="What it counts beside the others, in sum 1.")
    perplexity: float | None = Field(description="Null where the loss was not finite.")
    kl: float | None = Field(description="KL(dense || pruned), nats per token; null where it was not finite.")
    kl_error: float | None = Field(description="Standard error of kl over the windows.")
    change: float | None = Field(
        None, description="kl minus that of the weights accepted last, paired; null where not comparable."
    )
    change_error: float | None = Field(None, description="Standard error of change over the windows.")


class TextResult(Perplexities):
    """One of the named texts at the end of a run: perplexities on its test windows."""

    name: str
    source: str
    weight: float = Field(description="What it counts beside the others, in sum 1.")
    kl: float | None = Field(description="As in the trial that was kept, on its validation windows.")
    kl_error: float | None = Field(description="Standard error of kl over the windows.")


class Weighting(BaseModel):
    """The kept plan, carried out by some weights of the named texts."""

    weights: dict[str, float] = Field(description="What each text counts, in sum 1.")
    texts: list[TextFigures] = Field(
        description="On their validation windows; change is kl minus that of the model that was kept, paired."
    )


class Goal(BaseModel):
    """What the model is for, in words, and what was made of that."""

    words: str
    line: str = Field(description="What each text counts and may lose.")
    reason: str
    bounds: dict[str, float] = Field(
        description="Largest rise of a text's perplexity above the dense model's on validation windows, as a fraction."
    )


ANSWERS_KEPT = "Answer probability kept: exp of the mean change of the right answers' log-probability per token"
"""How much of what a model knew of questions is left."""


class Knowledge(BaseModel):
    """What a model still knows: log-probability of the right answers to questions that no plan was judged by."""

    source: str = Field(description="Where the questions come from.")
    pairs: int = Field(description="Questions asked; each with one answer.")
    dense: float | None = Field(description="Mean log-probability of a gold answer's tokens, nats per token.")
    pruned: float | None = Field(description="The same of the pruned model; null where it was not finite.")
    uniform_wanda: float | None = Field(description="The same of uniform Wanda at the same sparsity.")
    dense_right: int | None = Field(
        None, description="Questions that the dense model's own answer gets right: exact match after normalising."
    )
    pruned_right: int | None = Field(None, description="The same of the pruned model; null where dense had none right.")
    retention: float | None = Field(description="Answer probability kept: exp(pruned - dense), per token.")
    retention_error: float | None = Field(description="Its standard error, from the paired differences.")


class Score(BaseModel):
    """One figure of a model on a task of lm-evaluation-harness."""

    model: str = Field(description="dense, pruned, or where the model is.")
    task: str
    metric: str
    value: float | None = Field(description="Null where it was not finite.")
    error: float | None = Field(description="Standard error; null where the harness gives none.")
    samples: int = Field(description="Questions that the figure is a mean of.")
    protocol: dict[str, Any] = Field(
        description="All that two figures must share to be comparable: shots, limit, data, versions, number format, …"
    )


class Sample(BaseModel):
    """The same prompt, continued by the dense and by the pruned model, greedily."""

    prompt: str
    dense: str
    pruned: str


class Reach(BaseModel):
    """How much of a model is prunable: what shares of zeros are shares of."""

    of_blocks: float = Field(description="Prunable weights, as a share of those of all matrices in the decoder blocks.")
    of_model: float = Field(description="The same as a share of all the model's weights, embeddings included.")
    prunable: int = Field(description="Prunable weights.")

    @property
    def is_nearly_all(self) -> bool:
        """Whether so little in the blocks stays dense (routers of experts) that nobody needs to be told."""
        return self.of_blocks >= 0.99


class Polished(BaseModel):
    """What a polish did: a global refit of all survivors against KL(dense || pruned) on calibration text."""

    tokens: int = Field(description="Tokens of calibration text that it was allowed to be trained on.")
    passes: int = Field(description="Passes through the calibration text that they are, the last of which may be part.")
    steps: int = Field(description="Steps behind the weights that were kept; 0 where none was better than before.")
    planned_steps: int = Field(description="Steps of all the tokens; fewer are taken where nothing gets better.")
    before: float = Field(description="KL on the windows held out before the first step, nats per token.")
    after: float = Field(description="The lowest KL on them, that of the weights that were kept.")
    seconds: float = Field(description="Over interruptions, without the dense model's part.")
    means: Means = Field(
        "fp32",
        description="What the optimiser held its running means in: bf16 where fp32 fitted neither the GPU nor CPU "
        "memory.",
    )

    @property
    def helped(self) -> bool:
        """Whether it was ever better than before."""
        return self.steps > 0


class Usage(BaseModel):
    """Tokens and money spent on agents so far."""

    calls: int = Field(0, description="Answers, used or not.")
    input_tokens: int = 0
    output_tokens: int = 0
    cost: float = Field(0.0, description="US dollars, from the prices in the config.")
    own_count: int = Field(
        0,
        description="Of the tokens, those that no endpoint told and Billhook counted itself, one for every "
        "digit and every two other bytes: of endpoints that report none, and of requests that failed.",
    )
    failed_requests: int = Field(
        0,
        description="Requests without an answer. Of one that passes (429, 5xx) the prompt is among the tokens; of one "
        "that timed out or was cut off, the longest answer allowed too.",
    )


class CutResult(BaseModel):
    """What was taken away whole, and what that made of the model."""

    size: float = Field(description="Share of the model's bytes that was to stay.")
    heads: int = Field(description="Groups of attention heads that went from every block that stays.")
    neurons: int = Field(description="Neurons that went from every block that stays.")
    blocks: list[int] = Field(description="Blocks that went whole, counted from 0 in the dense model.")
    dense_parameters: int
    parameters: int
    dense_bytes: int = Field(description="Of all weights, in the number format of the run.")
    bytes: int
    dense_decoded_per_second: float | None = Field(
        description="Tokens a second of greedy decoding, one sequence, in stock transformers on this machine; median "
        "of timings by turns; null where the model was streamed, which decodes as fast as its disk is read."
    )
    decoded_per_second: float | None

    @property
    def share(self) -> float:
        """Of the bytes that stays."""
        return self.bytes / self.dense_bytes

    @property
    def gain(self) -> float | None:
        """How many times as many tokens a second are decoded; None where that was not timed."""
        found, dense = self.decoded_per_second, self.dense_decoded_per_second
        return found / dense if found is not None and dense else None


class Origin(BaseModel):
    """The run that cut the dense model of another, and the model that it was cut from."""

    run: str
    model: str = Field(description="Before that cut, and before the cuts of earlier runs that it went on from.")
    cut: CutResult
    left: float = Field(
        1.0,
        exclude_if=lambda left: left == 1,
        description="Share of the model's bytes that the cuts of those earlier runs left; left out without any.",
    )
    perplexity: float | None = Field(
        description="Of that model, on the same test text; null where a run measured on another, or "
        "otherwise, or the loss was not finite."
    )

    @property
    def share(self) -> float:
        """Of the model's bytes that stays after all cuts."""
        return self.left * self.cut.share


class Summary(BaseModel):
    """`summary.json`: machine-readable, a stable schema."""

    run: str
    model: str
    status: str = Field(description="finished, or short-of-target when no plan reached the target.")
    asked: Literal["sparsity", "size"] = Field(
        "sparsity",
        exclude_if=lambda asked: asked == "sparsity",
        description="What the target is of: zeros, or parts that go for a size.",
    )
    target_sparsity: float
    achieved_sparsity: float
    reach: Reach
    perplexity: Perplexities
    wanda_statistics: Statistics = Field(
        description="Uniform Wanda's. sequential: taken block by block, behind the pruned predecessors, as its authors "
        "do; dense: of the dense model, where that broke.",
    )
    kl: float | None = Field(description="KL(dense || pruned) on the validation text, nats per token.")
    texts: list[TextResult] = Field(
        [],
        exclude_if=operator.not_,
        description="Each of the named texts, whose means by weight the figures above are; none without names.",
    )
    weightings: list[Weighting] = Field(
        [],
        exclude_if=operator.not_,
        description="The run's weights of texts, then others that they are compared with; none where nobody asked.",
    )
    goal: Goal | None = Field(None, exclude_if=operator.not_, description="Null where the run had none.")
    knowledge: Knowledge | None = Field(None, description="Null where the run asked no questions.")
    benchmarks: list[Score] = Field([], description="Tasks of lm-evaluation-harness, where any were asked for.")
    polished: Polished | None = Field(
        None, description="What the polish of the weights did; null where there was none, and nothing was trained."
    )
    cut: CutResult | None = Field(
        None,
        exclude_if=lambda cut: cut is None,
        description="Null where weights were set to zero, and nothing was taken away.",
    )
    origin: Origin | None = Field(
        None,
        exclude_if=lambda origin: origin is None,
        description="Where the dense model came of a run that cut it; null elsewhere.",
    )
    samples: list[Sample] = Field([], description="Prompts continued by the dense and the pruned model.")
    plan: str = Field("", description="The plan that was kept, in one line.")
    kept: int = Field(description="Iteration of that plan, 0 for the dense model.")
    iterations: int
    rollbacks: int
    evaluated_tokens: int = Field(
        0,
        description="Tokens put through the model once it was profiled, a backward pass as two forwards; of earlier "
        "versions, those of trials and probes.",
    )
    agents: Usage = Field(default_factory=Usage)
    seconds: float
    peak_memory_bytes: int
    mask_sha256: str
    protocol: Protocol


def describe_protocol(settings: WorkbenchSettings, split: Split = "test", *, bos: bool = False) -> Protocol:
    """The protocol of figures on a split of the text; `bos` as in it."""
    versions = {name: version(name) for name in PACKAGES} | {"python": platform.python_version()}
    return Protocol(
        text=settings.name_texts(split),
        tokens=settings.count_all(split) * settings.window,
        window=settings.window,
        dtype=settings.dtype,
        versions=versions,
        bos=bos,
        cut=settings.text_cut,
        spread=settings.text_spread,
    )
