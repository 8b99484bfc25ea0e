"""Markdown: tables of figures, and `report.md`."""

from collections.abc import Iterable, Sequence
from typing import Any

from tools.base.named import hide_path
from tools.base.words import escape, show, show_score, show_size
from tools.plans.methods import Statistics
from tools.results.schema import Goal, Knowledge, Perplexities, Score, Summary, TextResult, Weighting
from tools.results.sentences import (
    BEHIND,
    compare_weightings,
    describe_reach,
    describe_result,
    list_loading,
    name_cut,
    name_sparsity,
    name_verdict,
    tell_spending,
)


def list_table(heads: Sequence[str], rows: Iterable[Sequence[str]], *, left: int) -> list[str]:
    """The lines of a table whose first columns, `left` of them, stand to the left and all others to the right."""
    marks = f"|{'---|' * left}{'---:|' * (len(heads) - left)}"
    return [_join_cells(heads), marks, *map(_join_cells, rows)]


def _join_cells(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def write_report(summary: Summary, trials: list[dict[str, Any]], sparsity: dict[str, float], stop: str) -> str:
    """`report.md`: the result, every trial with its reason, and the sparsity of every layer."""
    partly = describe_reach(summary.reach)
    title = f"pruned to {name_sparsity(summary)}" if partly else f"at {summary.achieved_sparsity:.2%} sparsity"
    of_parts = summary.asked != "sparsity"
    if of_parts:
        title = name_cut(summary.cut)
    lines = [
        f"# {summary.run}: {summary.model} {title}",
        "",
        describe_result(summary),
        "",
        f"The loop ended because {escape(stop)}." if stop else "",
        "",
        *list_perplexities(summary.perplexity, "test", "Billhook", summary.wanda_statistics),
        "",
        *list_goal(summary.goal),
        *list_texts(summary.texts),
        *list_weightings(summary.weightings),
        *(_list_knowledge(summary.knowledge) if summary.knowledge else []),
        *list_benchmarks(summary.benchmarks),
        "## Trials",
        "Measured on the validation text; KL in nats per token against the dense model.",
        "",
        *_list_trials(trials, [text.name for text in summary.texts]),
        "",
        "## Gone of each layer" if of_parts else "## Sparsity by layer",
        "",
        f"| layer | {'share' if of_parts else 'sparsity'} |",
        "|---|---|",
        *(f"| {escape(name)} | {value:.2%} |" for name, value in sparsity.items()),
        "",
        "## Protocol",
        f"- test text: {escape(summary.protocol.text)}, {summary.protocol.tokens} tokens in "
        f"{summary.protocol.windows}, {summary.protocol.dtype}; seen once, by no agent",
        "- versions: " + ", ".join(f"{name} {number}" for name, number in summary.protocol.versions.items()),
        *([f"- agents: {tell_spending(summary.agents.model_dump())}"] if summary.agents.calls else []),
        f"- {summary.seconds:.0f} s, peak memory {show_size(summary.peak_memory_bytes, 'GB', 2)}, "
        f"mask_sha256 `{summary.mask_sha256}`",
        "",
        "## Load it",
        "```python",
        *list_loading("model"),
        "```",
    ]
    return "\n".join(lines) + "\n"


def list_perplexities(perplexity: Perplexities, text: str, own: str, wanda: Statistics) -> list[str]:
    """The table of the perplexities on a text; the pruned model is called `own`, and `wanda` are Wanda's statistics."""
    return [
        f"| | perplexity on {text} |",
        "|---|---|",
        f"| dense | {show(perplexity.dense)} |",
        f"| **{own}** | **{show(perplexity.pruned)}** |",
        f"| uniform Wanda, same sparsity, {BEHIND[wanda]} | {show(perplexity.uniform_wanda)} |",
    ]


def list_goal(goal: Goal | None) -> list[str]:
    """A section with the goal and what was made of it; nothing without one."""
    if goal is None:
        return []
    reason = [f"Because: {escape(goal.reason)}", ""] if goal.reason else []
    return ["## Goal", f"> {escape(goal.words)}", "", f"It came to: {escape(goal.line)}.", "", *reason]


def list_texts(texts: Sequence[TextResult]) -> list[str]:
    """A section with a row for each of the named texts; nothing without any."""
    if not texts:
        return []
    rows = [
        [
            *(escape(text.name), escape(hide_path(text.source)), f"{text.weight:.0%}", show(text.dense)),
            *(f"**{show(text.pruned)}**", show(text.uniform_wanda), show_score(text.kl, text.kl_error)),
        ]
        for text in texts
    ]
    heads = ["text", "source", "weight", "dense", "pruned", "uniform Wanda", "KL"]
    return [
        "## Texts",
        "Perplexity on the test windows of each; KL in nats per token on its validation windows, ± one standard error.",
        "",
        *list_table(heads, rows, left=2),
        "",
    ]


def list_weightings(weightings: Sequence[Weighting]) -> list[str]:
    """A section with what texts lose by other weights of them; nothing where none were compared."""
    if not weightings:
        return []
    first, *others = ([escape(cell) for cell in row] for row in compare_weightings(weightings))
    rows = [[f"**{cell}**" for cell in first], *others]
    return [
        "## What the weights are worth",
        "The kept plan carried out by other weights of the texts, on the same validation windows: KL in nats per "
        "token, in brackets how much more than the kept model loses, ± one standard error of the paired difference.",
        "",
        *list_table(["weights", *(f"KL {escape(name)}" for name in weightings[0].weights)], rows, left=1),
        "",
    ]


def _list_trials(trials: Sequence[dict[str, Any]], texts: Sequence[str]) -> list[str]:
    """The table of all trials, with a column of KL for each named text."""
    heads = ["#", "sparsity", "perplexity", "KL", *(f"KL {name}" for name in texts)]
    heads += ["predicted KL", "verdict", "plan", "why"]
    return [_join_cells(heads), f"|{'---|' * len(heads)}", *(_trial_row(trial, texts) for trial in trials)]


def _trial_row(trial: dict[str, Any], texts: Sequence[str]) -> str:
    error = None if trial["kl_error"] == float("inf") else trial["kl_error"]
    known = {text["name"]: show_score(text["kl"], text["kl_error"]) for text in trial.get("texts", [])}
    cells = [show(trial["perplexity"]), show_score(trial["kl"], error), *(known.get(name, "") for name in texts)]
    verdict = name_verdict(trial)
    if verdict in ("refuse", "broke"):  # nothing was measured
        cells = [""] * len(cells)
    figures = " | ".join(cells)
    return (
        f"| {trial['iteration']} | {trial['sparsity']:.2%} | {figures} "
        f"| {trial['predicted_kl']:.4f} | {verdict} | {escape(trial['plan'])} | {escape(trial['reason'])} |"
    )


def _list_knowledge(knowledge: Knowledge) -> list[str]:
    rows = {"dense": knowledge.dense, "**Billhook**": knowledge.pruned, "uniform Wanda": knowledge.uniform_wanda}
    left = ""
    if knowledge.retention is not None:
        error = knowledge.retention_error or 0.0
        left = f" Answer probability kept (exp of the mean change): {knowledge.retention:.3f} ± {error:.3f}."
    if knowledge.dense_right and knowledge.pruned_right is not None:
        left += f" Exact match: {knowledge.pruned_right} right, {knowledge.dense_right} by the dense model."
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
    cells = []
    for (task, metric), row in rows.items():
        figures = [show_score(row[model].value, row[model].error) if model in row else "" for model in models]
        cells.append([escape(task), escape(metric), *figures, str(next(iter(row.values())).samples)])
    return [
        "## Tasks",
        "Asked by lm-evaluation-harness; ± one standard error.",
        "",
        *list_table(["task", "metric", *map(escape, models), "questions"], cells, left=2),
        "",
        *list_task_protocols(scores),
        "",
    ]


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
