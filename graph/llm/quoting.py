"""Data from outside in a prompt: layer names, lessons, results of tools, whatever nobody vouches for."""

from collections.abc import Iterable


def quote_data(text: str, limit: int) -> str:
    """Text from outside as one harmless line: no markers, no line breaks, at most `limit` characters.

    Angle brackets become round ones, so that no data can end its `<data>` block or open another.
    """
    text = text[: 4 * limit].translate({ord("<"): "(", ord(">"): ")"})
    text = " ".join("".join(char if char.isprintable() else " " for char in text).split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def quote_words(text: str, limit: int) -> str:
    """As `quote_data`; what is too long ends behind a whole word."""
    quoted = quote_data(text, limit)
    return f"{quoted[:-1].rsplit(' ', 1)[0]}…" if len(quoted) == limit and quoted.endswith("…") else quoted


def data_block(name: str, lines: Iterable[str]) -> str:
    """Quoted lines between the marks that the instructions explain."""
    return "\n".join((f"<data {name}>", *lines, "</data>"))
