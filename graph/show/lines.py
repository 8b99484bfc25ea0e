"""A line to a person on a terminal, and one from a person whom a plan waits for."""

import json
from contextlib import redirect_stdout

from rich.console import Console
from rich.text import Text

from graph.show.words import Event
from tools.base.words import clean, show_compact, strip_controls

HINTS = {
    "plan": 'accept, refuse WHY, or what to change, such as {"sparsity": 0.3}: ',
    "brief": 'accept, or what to change, such as {"probes": ["def parse_csv("]}: ',
}
"""What may be answered to a plan, and to what was made of a goal."""


def print_line(console: Console, line: str) -> None:
    """Print one line, neither wrapped nor coloured, with what the stream cannot encode as backslash escapes."""
    line = strip_controls(line).encode(console.encoding, "backslashreplace").decode(console.encoding)
    console.print(Text(line), soft_wrap=True)


def ask_line(console: Console, question: Event) -> str:
    """Show a plan with what it is predicted to do, or what was made of a goal; and read what a person says to it."""
    asked = "plan" if "plan" in question else "brief"
    if asked == "plan":
        print_line(console, f"plan {question['iteration']}: {clean(question['line'])}")
        if question["predicted_kl"] is not None:
            print_line(console, f"  predicted KL {show_compact(question['predicted_kl'], 4)} nats per token")
    else:
        print_line(console, f"goal: {clean(question['goal'], 2000)}")
        print_line(console, f"  comes to: {clean(question['line'])}")
    if question.get("reason"):
        print_line(console, f"  because: {clean(question['reason'], 1000)}")
    fields = {name: value for name, value in question[asked].items() if name != "reason"}
    print_line(console, f"  as JSON: {clean(json.dumps(fields, ensure_ascii=False), 10_000)}")
    if question.get("problem"):
        print_line(console, f"  that cannot be used: {clean(question['problem'], 1000)}")
    with redirect_stdout(console.file):  # the terminal's own, where lines can be edited
        return console.input(Text(HINTS[asked]))
