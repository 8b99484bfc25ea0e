"""The result of a run: `summary.json`, `report.md` and the model card, all from the same figures."""

import platform
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, Field

from tools.base.names import hide_path, is_hub_id, parse_hub
from tools.base.settings import Split, WorkbenchSettings
from tools.base.words import count, escape, show, show_score, show_size

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

SIGMAS = 2.0
"""Differences below this many standard errors are noise: neither an improvement nor a lesson."""

PACKAGES = ("torch", "transformers", "langgraph", "numpy")


class Protocol(BaseModel):
    """How perplexity was measured; results with different protocols must not be compared."""

    text: str = Field(description="Source of the text.")
    tokens: int
    window: int = Field(description="Tokens in a window; windows do not overlap and share no context.")
    dtype: str
    versions: dict[str, str]


class Perplexities(BaseModel):
    """On the test text; null where the loss was not finite."""

    dense: float | None
    pruned: float | None
    uniform_wanda: float | None


class Knowledge(BaseModel):
    """What a model still knows: log-probability of the right answers to questions that no plan was judged by."""

    source: str = Field(description="Where the questions come from.")
    pairs: int = Field(description="Questions asked; each with one answer.")
    dense: float | None = Field(description="Mean log-probability of a gold answer's tokens, nats per token.")
    pruned: float | None = Field(description="The same of the pruned model; null where it was not finite.")
    uniform_wanda: float | None = Field(description="The same of uniform Wanda at the same sparsity.")
    retention: float | None = Field(
        description="exp(pruned - dense): the share of the answers' probability per token that is left."
    )
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


class Usage(BaseModel):
    """Tokens and money spent on agents so far."""

    calls: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cost: float = Field(0.0, description="US dollars, from the prices in the config.")


class Summary(BaseModel):
    """`summary.json`: machine-readable, a stable schema."""

    run: str
    model: str
    status: str = Field(description="finished, or short-of-target when no plan reached the target.")
    target_sparsity: float
    achieved_sparsity: float
    perplexity: Perplexities
    kl: float | None = Field(description="KL(dense || pruned) on the validation text, nats per token.")
    knowledge: Knowledge | None = Field(None, description="Null where the run asked no questions.")
    benchmarks: list[Score] = Field([], description="Tasks of lm-evaluation-harness, where any were asked for.")
    samples: list[Sample] = Field([], description="Prompts continued by the dense and the pruned model.")
    plan: str = Field("", description="The plan that was kept, in one line.")
    iterations: int
    rollbacks: int
    evaluated_tokens: int = Field(0, description="Tokens put through pruned models, by trials and probes.")
    agents: Usage = Field(default_factory=Usage)
    seconds: float
    peak_memory_bytes: int
    mask_sha256: str
    protocol: Protocol


def describe_protocol(settings: WorkbenchSettings, split: Split = "test") -> Protocol:
    """The protocol of figures on a split of the text."""
    versions = {name: version(name) for name in PACKAGES} | {"python": platform.python_version()}
    return Protocol(
        text=getattr(settings, split),
        tokens=getattr(settings, f"{split}_windows") * settings.window,
        window=settings.window,
        dtype=settings.dtype,
        versions=versions,
    )


def write_report(summary: Summary, trials: list[dict[str, Any]], sparsity: dict[str, float], stop: str) -> str:
    """`report.md`: the result, every trial with its reason, and the sparsity of every layer."""
    perplexity = summary.perplexity
    lines = [
        f"# {summary.run}: {summary.model} at {summary.achieved_sparsity:.2%} sparsity",
        "",
        describe_result(summary),
        "",
        f"The loop ended because {stop}." if stop else "",
        "",
        "| | perplexity on test |",
        "|---|---|",
        f"| dense | {show(perplexity.dense)} |",
        f"| **Billhook** | **{show(perplexity.pruned)}** |",
        f"| uniform Wanda, same sparsity | {show(perplexity.uniform_wanda)} |",
        "",
        *(_list_knowledge(summary.knowledge) if summary.knowledge else []),
        *list_benchmarks(summary.benchmarks),
        "## Trials",
        "Measured on the validation text; KL in nats per token against the dense model.",
        "",
        "| # | sparsity | perplexity | KL | predicted KL | verdict | plan | why |",
        "|---|---|---|---|---|---|---|---|",
        *(_trial_row(trial) for trial in trials),
        "",
        "## Sparsity by layer",
        "",
        "| layer | sparsity |",
        "|---|---|",
        *(f"| {escape(name)} | {value:.2%} |" for name, value in sparsity.items()),
        "",
        "## Protocol",
        f"- test text: `{summary.protocol.text}`, {summary.protocol.tokens} tokens in windows of "
        f"{summary.protocol.window}, {summary.protocol.dtype}; seen once, by no agent",
        "- versions: " + ", ".join(f"{name} {number}" for name, number in summary.protocol.versions.items()),
        f"- {summary.seconds:.0f} s, peak memory {show_size(summary.peak_memory_bytes, 'GB', 2)}, "
        f"mask_sha256 `{summary.mask_sha256}`",
        "",
        "## Load it",
        "```python",
        *list_loading("model"),
        "```",
    ]
    return "\n".join(lines) + "\n"


def write_card(summary: Summary, settings: WorkbenchSettings) -> str:
    """The model card, `model/README.md`, with nothing in it of where files lie on this machine."""
    name, text = hide_path(summary.model), hide_path(summary.protocol.text)
    perplexity = summary.perplexity
    return "\n".join(
        [
            "---",
            _card_data(summary, settings).to_yaml(),
            "---",
            f"# {escape(name)}, pruned to {summary.achieved_sparsity:.2%}",
            "",
            describe_result(summary),
            "",
            "The zeros are stored as ordinary numbers: the file loads with stock `transformers`, and is neither "
            "smaller nor faster than the dense one by itself.",
            "",
            f"| | perplexity on {escape(text)} |",
            "|---|---|",
            f"| dense | {show(perplexity.dense)} |",
            f"| **this model** | **{show(perplexity.pruned)}** |",
            f"| uniform Wanda, same sparsity | {show(perplexity.uniform_wanda)} |",
            "",
            f"Perplexity was measured on `{text}` ({summary.protocol.tokens} tokens, windows of "
            f"{summary.protocol.window}, {summary.protocol.dtype}). `mask_sha256`: `{summary.mask_sha256}`.",
            "",
            *list_benchmarks(summary.benchmarks),
            f"What the licence of {escape(name)} says of derived models holds for this one.",
            "",
        ]
    )


def _list_knowledge(knowledge: Knowledge) -> list[str]:
    rows = {"dense": knowledge.dense, "**Billhook**": knowledge.pruned, "uniform Wanda": knowledge.uniform_wanda}
    left = ""
    if knowledge.retention is not None:
        error = knowledge.retention_error or 0.0
        left = f" {knowledge.retention:.3f} ± {error:.3f} of the answers' probability per token is left."
    return [
        "## Knowledge",
        f"{knowledge.pairs} questions of `{knowledge.source}` that no plan was judged by, closed-book and without "
        f"examples: mean log-probability of the gold answer, nats per token.{left}",
        "",
        "| | log-probability |",
        "|---|---|",
        *(f"| {name} | {show(value, 3)} |" for name, value in rows.items()),
        "",
    ]


def list_benchmarks(scores: list[Score]) -> list[str]:
    """A section with a row for each figure of a task, and what they were measured by; nothing without any."""
    if not scores:
        return []
    models = list(dict.fromkeys(score.model for score in scores))
    rows: dict[tuple[str, str], dict[str, Score]] = {}
    for score in scores:
        rows.setdefault((score.task, score.metric), {})[score.model] = score
    lines = [
        "## Tasks",
        "Asked by lm-evaluation-harness; ± one standard error.",
        "",
        f"| task | metric | {' | '.join(escape(model) for model in models)} | questions |",
        f"|---|---|{'---:|' * (len(models) + 1)}",
    ]
    for (task, metric), row in rows.items():
        cells = [show_score(row[model].value, row[model].error) if model in row else "" for model in models]
        count = next(iter(row.values())).samples
        lines.append(f"| {escape(task)} | {escape(metric)} | {' | '.join(cells)} | {count} |")
    return [*lines, "", *list_task_protocols(scores), ""]


def list_task_protocols(scores: list[Score]) -> list[str]:
    """A line for each task: all that its figures share."""
    protocols = {score.protocol["task"]: score.protocol for score in scores}
    return [
        "- " + ", ".join(f"{name} {escape(_flatten(value))}" for name, value in protocol.items())
        for protocol in protocols.values()
    ]


def _flatten(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{key} {_flatten(part)}" for key, part in value.items())
    text = str(value)
    return f"{text[:12]}…" if len(text) == 64 else text  # a hash; the whole of it is in the JSON


def _card_data(summary: Summary, settings: WorkbenchSettings) -> "ModelCardData":
    """The card's front matter: what the model was made of, and its own results as the hub reads them."""
    from huggingface_hub import EvalResult, ModelCardData

    name, found = hide_path(summary.model), []
    if summary.perplexity.pruned is not None:
        text = parse_hub(settings.test) if settings.test.startswith("hub:") else None
        place = hide_path(settings.test)
        found.append(
            EvalResult(
                task_type="text-generation",
                dataset_type=text.name if text else place,
                dataset_name=text.name if text else place,
                dataset_config=text.config if text else None,
                dataset_split=text.split if text else None,
                metric_type="perplexity",
                metric_name="Perplexity",
                metric_value=round(summary.perplexity.pruned, 4),
            )
        )
    found += [
        EvalResult(
            task_type="text-generation",
            dataset_type=score.task,
            dataset_name=score.task,
            metric_type=score.metric,
            metric_value=round(score.value, 4),
        )
        for score in summary.benchmarks
        if score.model == "pruned" and score.value is not None
    ]
    calibration = settings.calibration
    return ModelCardData(
        base_model=summary.model if is_hub_id(summary.model) else None,
        datasets=[parse_hub(calibration).name] if calibration.startswith("hub:") else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["pruned", "sparse", "billhook"],
        model_name=f"{name}-pruned",
        eval_results=found or None,
    )


def describe_result(summary: Summary) -> str:
    """The result in two sentences."""
    p = summary.perplexity
    rounds, undone = count(summary.iterations, "iteration"), count(summary.rollbacks, "rollback")
    text = (
        f"{summary.achieved_sparsity:.2%} of the prunable weights are zero (target {summary.target_sparsity:.2%}), "
        f"after {rounds} with {undone}. Test perplexity is {show(p.pruned)}; dense {show(p.dense)}, uniform Wanda at "
        f"the same sparsity {show(p.uniform_wanda)}"
    )
    if p.dense and p.pruned and p.uniform_wanda and p.uniform_wanda > p.dense:
        share = (p.pruned - p.dense) / (p.uniform_wanda - p.dense)
        text += f", so the degradation is {share:.2f} times uniform Wanda's"
    if summary.knowledge and summary.knowledge.retention is not None:
        text += f". Of its factual recall {summary.knowledge.retention:.1%} is left"
    return text + "."


def list_loading(directory: str) -> list[str]:
    """Lines of Python that load the model from a directory."""
    return [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        f'model = AutoModelForCausalLM.from_pretrained("{directory}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{directory}")',
    ]


def _trial_row(trial: dict[str, Any]) -> str:
    error = None if trial["kl_error"] == float("inf") else trial["kl_error"]
    kl = show_score(trial["kl"], error)
    figures = f"{show(trial['perplexity'])} | {kl}"
    if trial["verdict"] == "refuse":  # nothing was measured
        figures = " | "
    return (
        f"| {trial['iteration']} | {trial['sparsity']:.2%} | {figures} "
        f"| {trial['predicted_kl']:.4f} | {trial['verdict']} | {escape(trial['plan'])} | {escape(trial['reason'])} |"
    )
