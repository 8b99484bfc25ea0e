"""Text that models and files supply, without what a terminal or a page would obey."""

import re
import unicodedata

_ESCAPES = re.compile(
    r"\x1b\][^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)?"  # window titles, links
    r"|(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]?"  # colours, cursor
    r"|\x1b[ -/]*[0-~]?"
)


def strip_controls(text: str, *, lines: bool = False) -> str:
    """Take out escape sequences and every character that is not printed as itself; a tab becomes a space.

    Line ends go as well, but with `lines` they stay, as newlines.
    """
    text = _ESCAPES.sub("", text).replace("\t", " ")
    if lines:
        return "\n".join(strip_controls(line) for line in re.split(r"\r\n|\r|\n", text))
    return "".join(c for c in text if unicodedata.category(c)[0] != "C")
