"""What does a model say, and how fast? `python -m tools.generate MODEL --prompt "Once upon a time" --compare DENSE`

Goes on with a prompt, always with the most likely token, and streams the text; then tokens a second and bytes of the
weights. MODEL and DENSE are each a run's directory, its name under runs/, a directory of a plain or packed model, a
.gguf file, package:NAME or a hub id.
"""

import gc
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import GenerationConfig, TextStreamer

from tools.base.console import carry_out, print_line
from tools.base.errors import UserError
from tools.base.options import Parser
from tools.base.settings import WorkbenchSettings
from tools.base.words import strip_controls
from tools.models.load import DTYPES, Dtype, find_model, load_model, read_dtype
from tools.models.packed import is_packed, measure_sizes, read_contents

PROMPTS = (
    "The capital of France is",
    "Photosynthesis is the process by which",
    "Once upon a time, an old fisherman",
    "def is_prime(n):\n",
)
"""A fact, an explanation, a story and code: the same for every run, so that two runs can be compared; none of a run's
texts, so that nobody reads what a plan was judged by; and whole beginnings, which a window cut out of a text is not."""

CONTINUED = 40
"""Tokens that a prompt is continued by."""


def decode(
    model: Any, ids_BT: Tensor, new: int, least: int = 0, mask_BT: Tensor | None = None, streamer: Any = None
) -> Tensor:
    """The tokens and at most `new`, at least `least` of the most likely ones after them, (B, T + new) int64.

    `mask_BT` is 0 where a row is padded, on its left. A row that ends before others do is filled up with token 0. Each
    token of the only row goes to a `streamer` of transformers, if one is given, as soon as it is known.
    """
    mask_BT = torch.ones_like(ids_BT) if mask_BT is None else mask_BT
    greedy = GenerationConfig(do_sample=False, max_new_tokens=new, min_new_tokens=least, pad_token_id=0)
    tokens_BT: Tensor = model.generate(ids_BT, attention_mask=mask_BT, generation_config=greedy, streamer=streamer)
    return tokens_BT


def continue_prompts(model: Any, tokenizer: Any, prompts: Sequence[str], new: int = CONTINUED) -> list[str]:
    """What the model says after each prompt: at most `new` tokens, without control characters.

    All prompts go through the model together. Fewer tokens follow where the model has no more positions; none, "",
    where it has not even enough for the prompts.
    """
    rows = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    longest = max(map(len, rows))
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    new = new if positions is None else min(new, positions - longest)
    if new < 1:
        return [""] * len(rows)
    ids_BT = torch.zeros((len(rows), longest), dtype=torch.long, device=model.device)
    mask_BT = torch.zeros_like(ids_BT)
    for i, row in enumerate(rows):
        ids_BT[i, longest - len(row) :] = torch.tensor(row)
        mask_BT[i, longest - len(row) :] = 1
    tokens_BT = decode(model, ids_BT, new, mask_BT=mask_BT)
    texts = tokenizer.batch_decode(_end_rows(model, tokens_BT[:, longest:]), skip_special_tokens=True)
    return [strip_controls(text, lines=True) for text in texts]


def _end_rows(model: Any, tokens_BT: Tensor) -> list[list[int]]:
    """The rows without what fills them up behind the token that ends a text."""
    ends = model.generation_config.eos_token_id if model.generation_config is not None else None
    ends = ends if isinstance(ends, list) else [ends]
    rows = []
    for row in tokens_BT.tolist():
        at = next((i for i, token in enumerate(row) if token in ends), len(row))
        rows.append(row[:at])
    return rows


# --- the command -------------------------------------------------------------------------------------------------


class Continuation(NamedTuple):
    """What one model said."""

    model: str
    tokens: list[int]
    seconds: float
    """From the first of the tokens to the last."""
    layer_bytes: int
    """Of packed layers; 0 in a dense model."""
    dense_bytes: int
    """Of the same layers, if they were dense."""
    other_bytes: int
    """Of all other parameters."""

    @property
    def rate(self) -> float | None:
        """Tokens a second, without reading the prompt; None for fewer than two tokens."""
        return (len(self.tokens) - 1) / self.seconds if len(self.tokens) > 1 else None

    @property
    def bytes(self) -> int:
        return self.layer_bytes + self.other_bytes


class _Stream(TextStreamer):
    """Prints text as it comes, harmless to a terminal, and notes when each token came."""

    def __init__(self, tokenizer: Any, console: Console) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.console = console
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())
        super().put(value)  # type: ignore[no-untyped-call]

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.console.print(
            strip_controls(text, lines=True),
            end="\n" if stream_end else "",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )


def let_say(source: str, prompt: str, new: int, dtype: Dtype | None, device: str, console: Console) -> Continuation:
    """Load a model and stream what it says; it is let go. Raises UserError."""
    place = find_model(source)
    if is_packed(place):
        dtype = read_contents(place).dtype
    settings = {"model": place, "dtype": dtype or read_dtype(place), "device": device}
    model, tokenizer = load_model(WorkbenchSettings.model_validate(settings))
    ids_BT = torch.tensor([tokenizer(prompt)["input_ids"]], dtype=torch.long, device=model.device)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not ids_BT.numel():
        raise UserError("the prompt has no tokens; give some text")
    if positions is not None and ids_BT.shape[1] + new > positions:
        raise UserError(f"{ids_BT.shape[1]} tokens of prompt and {new} more do not fit into {positions} positions")
    stream = _Stream(tokenizer, console)
    print_line(console, f"--- {source}, {settings['dtype']}{', packed' if is_packed(place) else ''}")
    console.print(
        strip_controls(prompt, lines=True), end="", style="dim", markup=False, highlight=False, soft_wrap=True
    )
    tokens = decode(model, ids_BT, new, streamer=stream)[0, ids_BT.shape[1] :].tolist()
    times = stream.times[1:]  # the first is the prompt's
    return Continuation(source, tokens, times[-1] - times[0], *measure_sizes(model))


def compare_continuations(ours: Continuation, dense: Continuation) -> list[str]:
    """How one model's text, speed and bytes stand to another's, a line each."""
    same = next((i for i, (a, b) in enumerate(zip(ours.tokens, dense.tokens, strict=False)) if a != b), None)
    shorter = min(len(ours.tokens), len(dense.tokens))
    if same is None and len(ours.tokens) == len(dense.tokens):
        lines = [f"the same {shorter} tokens"]
    else:
        lines = [f"the same tokens up to number {shorter if same is None else same} of {len(dense.tokens)}"]
    if ours.rate and dense.rate:
        lines.append(f"{ours.rate / dense.rate:.2f} times as many tokens a second")
    return [*lines, f"{ours.bytes / dense.bytes:.3f} of the bytes"]


def make_table(continuations: Sequence[Continuation]) -> Table:
    """The figures of each model, side by side."""
    table = Table()
    table.add_column("")
    rows = {
        "tokens": [str(len(x.tokens)) for x in continuations],
        "tokens/s": ["" if x.rate is None else f"{x.rate:.1f}" for x in continuations],
        "weights, MB": [f"{x.bytes / 1e6:.1f}" for x in continuations],
        "of these packed, MB": [f"{x.layer_bytes / 1e6:.1f}" if x.layer_bytes else "" for x in continuations],
        "and would be dense, MB": [f"{x.dense_bytes / 1e6:.1f}" if x.layer_bytes else "" for x in continuations],
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
        parser = Parser(prog="python -m tools.generate", description=__doc__, allow_abbrev=False)
        parser.add_argument("model", metavar="MODEL")
        parser.add_argument("--prompt", metavar="TEXT", default=PROMPTS[2], help=f"Default: {PROMPTS[2]!r}.")
        parser.add_argument("--compare", metavar="DENSE", help="Let this model say it too.")
        parser.add_argument("--tokens", metavar="N", type=int, default=64, help="At most so many follow. Default: 64.")
        parser.add_argument("--device", choices=("auto", "cpu", "cuda", "spread"), default="auto")
        parser.add_argument("--dtype", choices=tuple(DTYPES), help="Of a model that is not packed. Default: its own.")
        options = parser.parse_args(arguments)
        if options.tokens < 1:
            raise UserError("--tokens must be at least 1")
        sources = [options.model, *([options.compare] if options.compare else [])]
        dtype = options.dtype
        if dtype is None and is_packed(place := find_model(options.model)):
            dtype = read_contents(place).dtype  # the other shall have the same
        for source in sources:
            find_model(source)  # before a text is written that another was to stand beside
        done = []
        for source in sources:
            done.append(let_say(source, options.prompt, options.tokens, dtype, options.device, console))
            gc.collect()  # the next model may need the room of this one
        console.print(make_table(done))
        for line in compare_continuations(*done) if len(done) > 1 else ():
            print_line(console, line)

    return carry_out(work)


if __name__ == "__main__":
    sys.exit(main())
