"""What does a model say, and how fast? `python -m tools.generate MODEL --prompt "Once upon a time" --compare DENSE`

Goes on with a prompt, always with the most likely token, and streams the text; then tokens a second and bytes of the
weights. MODEL and DENSE are each a run's directory, its name under runs/, a model's directory, a .gguf
file, package:NAME or a hub id.
"""

import gc
import sys
from collections.abc import Sequence
from functools import partial
from typing import get_args

from rich.console import Console
from rich.table import Table

from tools.base.console import carry_out, print_line
from tools.base.errors import UserError
from tools.base.options import Parser
from tools.base.settings import LoadSettings, TeamSettings
from tools.base.words import strip_controls
from tools.measure.continuations import (
    PROMPTS,
    Continuation,
    compare_continuations,
    encode_prompt,
    stream_continuation,
)
from tools.models.formats import DTYPES, Dtype
from tools.models.load import choose_device, find_model, load_model, read_dtype


def let_say(source: str, prompt: str, new: int, dtype: Dtype, device: str, console: Console) -> Continuation:
    """Load a model and stream what it says; it is let go. Raises UserError."""
    place = find_model(source)
    settings = TeamSettings.model_validate({"model": place, "dtype": dtype, "device": device})
    model, tokenizer = load_model(choose_device(settings))
    ids_BT = encode_prompt(model, tokenizer, prompt, new)
    print_line(console, f"--- {source}, {dtype}")
    _print_piece(console, prompt, style="dim")
    return stream_continuation(source, model, tokenizer, ids_BT, new, partial(_print_piece, console))


def _print_piece(console: Console, text: str, last: bool = False, style: str | None = None) -> None:
    """A piece of a text, harmless to a terminal."""
    text = strip_controls(text, lines=True)
    console.print(text, end="\n" if last else "", style=style, markup=False, highlight=False, soft_wrap=True)


def make_table(continuations: Sequence[Continuation]) -> Table:
    """The figures of each model, side by side."""
    table = Table()
    table.add_column("")
    rows = {
        "tokens": [str(len(x.tokens)) for x in continuations],
        "tokens/s": ["" if x.rate is None else f"{x.rate:.1f}" for x in continuations],
        "weights, MB": [f"{x.bytes / 1e6:.1f}" for x in continuations],
    }
    for continuation in continuations:
        table.add_column(strip_controls(continuation.model), justify="right")
    for name, cells in rows.items():
        table.add_row(name, *cells)
    return table


def main(arguments: list[str] | None = None) -> int:
    """The command: 0 done, 1 interrupted, 2 bad input."""
    console = Console()

    def work() -> None:
        parser = Parser(prog="python -m tools.generate", description=__doc__)
        parser.add_argument("model", metavar="MODEL")
        parser.add_argument("--prompt", metavar="TEXT", default=PROMPTS[2], help=f"Default: {PROMPTS[2]!r}.")
        parser.add_argument("--compare", metavar="DENSE", help="Let this model say it too.")
        parser.add_argument("--tokens", metavar="N", type=int, default=64, help="At most so many follow. Default: 64.")
        devices = get_args(LoadSettings.model_fields["device"].annotation)
        parser.add_argument("--device", choices=devices, default="auto")
        parser.add_argument("--dtype", choices=tuple(DTYPES), help="Of both models. Default: MODEL's own.")
        options = parser.parse_args(arguments)
        if options.tokens < 1:
            raise UserError("--tokens must be at least 1")
        sources = [options.model, *([options.compare] if options.compare else [])]
        places = [find_model(source) for source in sources]  # before a text is written that another was to stand beside
        dtype = options.dtype or read_dtype(places[0])  # of both: what is compared is no other format
        done = []
        for source in sources:
            done.append(let_say(source, options.prompt, options.tokens, dtype, options.device, console))
            gc.collect()  # the next model may need the room of this one
        console.print(make_table(done))
        for line in compare_continuations(*done) if len(done) > 1 else ():
            print_line(console, line)

    return carry_out(work, "stopped")


if __name__ == "__main__":
    sys.exit(main())
