"""Figures and counts for people, to the letter, and text from outside made harmless."""

import pytest

from tools.base.words import (
    clean,
    count,
    escape,
    round_seconds,
    shorten,
    show,
    show_compact,
    show_percent,
    show_rounded,
    show_score,
    show_seconds,
    show_share,
    show_size,
    strip_controls,
)


@pytest.mark.parametrize(
    ("told", "words"),
    [
        *((show(12.3456), "12.35"), (show(0.1, 4), "0.1000"), (show(None), "not finite")),
        *((show_compact(123456.0), "1.2e+05"), (show_compact(0.1, 4), "0.1000"), (show_compact(None), "not finite")),
        *((show_score(0.62, 0.02), "0.6200 ± 0.0200"), (show_score(0.62, None), "0.6200")),
        *((show_share(0.704, 0.038), "70.4% ± 3.8%"), (show_share(0.704, None), "70.4%")),
        (show_share(None, 0.02), "not finite"),
        *((show_score(None, 0.02), "not finite"), (show_score(0.62, 0.0), "0.6200 ± 0.0000")),
        *(
            (show_rounded(0.62, 0.02), "0.620 ± 0.020"),
            (show_rounded(2, None), "2"),
            (show_rounded(80.4, 12), "80 ± 12"),
        ),
        *((show_percent(0.45), "45.00%"), (show_percent(0.123, 1), "12.3%"), (show_percent(None), "not finite")),
        *((show_size(2.1e9, "GB"), "2.1 GB"), (show_size(1_500_000_000, "GB", 2), "1.50 GB")),
        *((show_size(1.5e6), "1.5 MB"), (show_size(2300), "2.3 kB"), (show_size(999), "999 bytes")),
        *((show_seconds(3.14), "3.1 s"), (show_seconds(301.2), "5 min 1 s"), (show_seconds(59.6), "1 min 0 s")),
        *(
            (show_seconds(7322), "2 h 2 min"),
            (count(1, "lesson"), "1 lesson"),
            (count(2000, "lesson"), "2,000 lessons"),
        ),
        *((shorten("abcdef", 6), "abcdef"), (shorten("abcdefg", 6), "abcde…"), (clean("a\n b\x1b[31mc", 4), "a bc")),
        (escape("a|b\n*c* <d>\x00"), "a\\|b \\*c\\* \\<d\\>"),
    ],
)
def test_words_to_the_letter(told: str, words: str) -> None:
    assert told == words


def test_what_a_terminal_would_obey_goes() -> None:
    assert strip_controls("\x1b]0;title\x07a\x1b[31mred\x1b[0m\tb\u202e\n") == "ared b"
    assert strip_controls("a\r\nb\rc\x00", lines=True) == "a\nb\nc"


def test_clean_makes_one_harmless_line() -> None:
    nasty = "[red]boo[/red] [/] [link=x]\x1b[31mred\x1b]0;title\x07\x1b[2J\r\nnext\tline\x9b5m\u202e\ud800end"
    assert clean(nasty) == "[red]boo[/red] [/] [link=x]red next lineend"
    assert clean("a" * 301) == "a" * 299 + "…"
    assert clean("a" * 300) == "a" * 300
    assert clean("\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\ \x1b(B\x1b") == "link "
    assert len(clean("\x1b]" * 1_000_000)) < 300


@pytest.mark.parametrize(
    ("seconds", "told"), [(0.3, 0), (4.6, 5), (12.4, 10), (47, 50), (95, 100), (213, 210), (3600, 3600)]
)
def test_seconds_are_told_roughly(seconds: float, told: float) -> None:
    assert round_seconds(seconds) == told
