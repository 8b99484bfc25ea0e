"""What a model says: prompts continued with the most likely token each time, and how fast.

Shape suffixes: B rows, T tokens.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteriaList, TextStreamer

from tools.base.errors import UserError
from tools.base.progress import Progress
from tools.base.words import strip_controls
from tools.models.positions import count_positions
from tools.models.readout import compute_hidden
from tools.models.sampling import end_row, without_habits
from tools.models.streamed import find_stream

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

CONTINUED_STREAMED = 10
"""As many of a model that is streamed: for each of them all of its weights come from disk."""


def count_continued(*, streamed: bool) -> int:
    """Tokens that a report's prompts are continued by."""
    return CONTINUED_STREAMED if streamed else CONTINUED


def decode(
    model: Any,
    ids_BT: Tensor,
    new: int,
    least: int = 0,
    mask_BT: Tensor | None = None,
    streamer: Any = None,
    ended: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The tokens and at most `new`, at least `least` of the most likely ones after them, (B, T + new) int64.

    `mask_BT` is 0 where a row is padded, on its left. A row that ends before others do is filled up with token 0; which
    rows have `ended`, (B,) bool, of all tokens so far, may be told. Each token of the only row goes to a `streamer` of
    transformers, if one is given, as soon as it is known.
    """
    mask_BT = torch.ones_like(ids_BT) if mask_BT is None else mask_BT
    greedy = GenerationConfig(
        do_sample=False,
        max_new_tokens=new,
        min_new_tokens=least,
        eos_token_id=getattr(model.generation_config, "eos_token_id", None),
        pad_token_id=0,
    )
    stops = StoppingCriteriaList([lambda tokens_BT, _scores, **_: ended(tokens_BT)] if ended else [])
    with without_habits(model):  # with which it would be another model's most likely token, or a beam's
        tokens_BT: Tensor = model.generate(
            ids_BT, attention_mask=mask_BT, generation_config=greedy, streamer=streamer, stopping_criteria=stops
        )
    return tokens_BT


def continue_prompts(model: Any, tokenizer: Any, prompts: Sequence[str], new: int | None = None) -> list[str]:
    """What the model says after each prompt: at most `new` tokens, or as `count_continued`, without control characters.

    As `continue_rows`.
    """
    new = count_continued(streamed=find_stream(model) is not None) if new is None else new
    return continue_rows(model, tokenizer, [tokenizer(prompt)["input_ids"] for prompt in prompts], new)


def continue_rows(
    model: Any, tokenizer: Any, rows: Sequence[Sequence[int]], new: int, *, line: bool = False
) -> list[str]:
    """What the model says after the tokens of each row: at most `new` tokens, without control characters.

    All rows go through the model together. Fewer tokens follow where the model has no more positions; none, "", after a
    row that takes all of them. Where a `line` is asked for, no more than it takes to end the first one that
    is not empty: whatever stands behind it is left to chance.
    """
    positions = count_positions(model)
    if positions is not None and any(len(row) >= positions for row in rows):
        shorter = iter(continue_rows(model, tokenizer, [row for row in rows if len(row) < positions], new, line=line))
        return ["" if len(row) >= positions else next(shorter) for row in rows]
    if not rows:
        return []
    longest = max(map(len, rows))
    new = new if positions is None else min(new, positions - longest)
    ids_BT = torch.zeros((len(rows), longest), dtype=torch.long, device=model.device)
    mask_BT = torch.zeros_like(ids_BT)
    for i, row in enumerate(rows):
        ids_BT[i, longest - len(row) :] = torch.tensor(row)
        mask_BT[i, longest - len(row) :] = 1

    def has_line(tokens_BT: Tensor) -> Tensor:
        said = tokenizer.batch_decode(tokens_BT[:, longest:], skip_special_tokens=True)
        lines = ["\n" in strip_controls(text, lines=True).lstrip() for text in said]
        return torch.tensor(lines, device=tokens_BT.device)

    tokens_BT = decode(model, ids_BT, new, mask_BT=mask_BT, ended=has_line if line else None)
    texts = tokenizer.batch_decode(_end_rows(model, tokens_BT[:, longest:]), skip_special_tokens=True)
    return [strip_controls(text, lines=True) for text in texts]


def _end_rows(model: Any, tokens_BT: Tensor) -> list[list[int]]:
    """The rows without what fills them up behind the token that ends a text."""
    ends = model.generation_config.eos_token_id if model.generation_config is not None else None
    ends = ends if isinstance(ends, list) else [ends]
    return [end_row(row, ends) for row in tokens_BT.tolist()]


# --- one prompt, as it comes -------------------------------------------------------------------------------------


class Continuation(NamedTuple):
    """What one model said."""

    model: str
    tokens: list[int]
    seconds: float
    """From the first of the tokens to the last."""
    bytes: int
    """Of all weights."""

    @property
    def rate(self) -> float | None:
        """Tokens a second, without reading the prompt; None for fewer than two tokens."""
        return (len(self.tokens) - 1) / self.seconds if len(self.tokens) > 1 else None


class _Stream(TextStreamer):
    """Hands text on as it comes, and notes when each token came."""

    def __init__(self, tokenizer: Any, show: Callable[[str, bool], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.show = show
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())
        super().put(value)  # type: ignore[no-untyped-call]

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.show(text, stream_end)


def encode_prompt(model: Any, tokenizer: Any, prompt: str, new: int) -> Tensor:
    """A prompt's tokens, (1, T) int64 on the model's device. Raises UserError without room for `new` more, or any."""
    ids_BT = torch.tensor([tokenizer(prompt)["input_ids"]], dtype=torch.long, device=model.device)
    positions = count_positions(model)
    if not ids_BT.numel():
        raise UserError("the prompt has no tokens; give some text")
    if positions is not None and ids_BT.shape[1] + new > positions:
        raise UserError(f"{ids_BT.shape[1]} tokens of prompt and {new} more do not fit into {positions} positions")
    return ids_BT


def stream_continuation(
    name: str, model: Any, tokenizer: Any, ids_BT: Tensor, new: int, show: Callable[[str, bool], None]
) -> Continuation:
    """What a model called `name` says after a prompt; `show` is given each piece of the text, and whether it ends."""
    stream = _Stream(tokenizer, show)
    tokens = decode(model, ids_BT, new, streamer=stream)[0, ids_BT.shape[1] :].tolist()
    times = stream.times[1:]  # the first is the prompt's
    return Continuation(name, tokens, times[-1] - times[0], sum(weight.nbytes for weight in model.parameters()))


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


REPEATS = 5
"""Timings are medians of this many, dense and cut model by turns."""
PROMPT, DECODED = 8, 32
"""Tokens read and tokens decoded to measure the speed of decoding."""


def measure_speeds(models: Sequence[Any], ids_T: Tensor, step: Progress) -> list[tuple[float, float]]:
    """(seconds of a forward of the window, greedily decoded tokens a second) of each model: medians, taken by turns."""
    forwards: list[list[float]] = [[] for _ in models]
    decodings: list[list[float]] = [[] for _ in models]
    for i in range(REPEATS + 1):  # the first warms up
        step("measure speed", i, REPEATS + 1)
        for model, forward, decoding in zip(models, forwards, decodings, strict=True):
            forward.append(_time(lambda: compute_hidden(model, ids_T[None]), ids_T))  # noqa: B023
            # Without a least number a model that ends its text early would seem the faster one.
            decoding.append(_time(lambda: decode(model, ids_T[None, :PROMPT], DECODED, DECODED), ids_T))  # noqa: B023
    step("measure speed", REPEATS + 1, REPEATS + 1)
    return [
        (statistics.median(forward[1:]), DECODED / statistics.median(decoding[1:]))
        for forward, decoding in zip(forwards, decodings, strict=True)
    ]


@torch.no_grad()
def _time(run: Callable[[], Any], ids_T: Tensor) -> float:
    cuda = ids_T.device.type == "cuda"
    if cuda:
        torch.cuda.synchronize(ids_T.device)
    began = time.perf_counter()
    run()
    if cuda:
        torch.cuda.synchronize(ids_T.device)
    return time.perf_counter() - began
