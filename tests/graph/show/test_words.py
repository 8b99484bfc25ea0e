"""What is told of events, of unexpected ones too."""

from typing import Any

import pytest

from tests.graph.show.shown import (
    NASTY,
    PLAN,
    RESULT,
    START,
    TAME,
    USAGE,
    make_console,
    make_trial,
    show_live,
    show_plain,
)


def test_stopped_says_how_to_resume() -> None:
    event = {"type": "stopped", "reason": "the planner is unreachable", "resume": "python -m graph.run --resume demo"}
    assert show_plain(event) == [
        "stopped: the planner is unreachable",
        "resume with: python -m graph.run --resume demo",
    ]


def test_what_is_our_own_count_and_what_failed_is_said() -> None:
    assert show_plain(USAGE | {"own_count": 1200, "failed_requests": 2}) == [
        "agents: 3 calls, 2,400 tokens in, 300 out, $0.0123; 1,200 of the tokens by our own count; 2 requests failed"
    ]
    nothing = {"calls": 0, "input_tokens": 0, "output_tokens": 0, "cost": 0.0}
    assert show_plain(USAGE | nothing) == ["agents: no calls"]
    assert show_plain(USAGE | nothing | {"failed_requests": 1}) == [
        "agents: 0 calls, 0 tokens in, 0 out, $0.0000; 1 request failed"
    ]
    reply = {"type": "reply", "planner": "openai:x", "input_tokens": 812, "output_tokens": 90, "own_count": 90}
    assert show_plain(reply) == ["reply of openai:x: 812 tokens in, 90 out by our own count"]


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


def test_a_result_without_figures_still_has_its_lines() -> None:
    none = dict.fromkeys(("dense", "pruned", "uniform_wanda"))
    lines = show_plain(RESULT | {"perplexity": none, "kl": None, "peak_memory_bytes": None})
    assert lines[1:3] == [
        "perplexity: not finite pruned, not finite dense, not finite uniform Wanda; KL not finite",
        "degradation: not to be compared with uniform Wanda's; 5 min 1 s, peak memory not measured",
    ]


def test_nasty_text_is_tame_in_plain_lines() -> None:
    nasty: list[dict[str, Any]] = [PLAN | {"reason": NASTY, "plan": NASTY}, {"type": "warning", "text": NASTY}]
    nasty += [{"type": "profile", "layers": 1, "weights": 1, "top": [[NASTY, 0.1]]}]
    assert show_plain(*nasty) == [
        f"plan 2 by heuristic: {TAME}, predicted KL 0.2100: {TAME}",
        f"warning: {TAME}",
        f"profile: 1 layer, 1 weight; most precious: {TAME} 0.1000",
    ]


def test_a_long_reason_is_cut() -> None:
    (line,) = show_plain(PLAN | {"reason": "word " * 1000})
    assert len(line) < 1100
    assert line.endswith("…")


def test_named_texts_are_told_behind_the_kl_of_all() -> None:
    texts = [
        {"name": "code", "weight": 0.75, "perplexity": 4.0, "kl": 0.08, "kl_error": 0.002},
        {"name": "prose", "weight": 0.25, "perplexity": None, "kl": None, "kl_error": None},
    ]
    dense, trial = show_plain(make_trial(0, texts=texts), make_trial(1, texts=texts))
    assert dense == "trial 0: the dense model, perplexity 24.50 (code 4.00, prose not finite)"
    told = "; code KL 0.0800 ± 0.0020, perplexity 4.00; prose KL not finite, perplexity not finite, 21.4 s, "
    assert f"(predicted 0.1200){told}" in trial
