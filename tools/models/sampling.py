"""Tokens drawn from a model at temperature 1: its whole distribution, no token left out and none favoured.

The largest of log p + Gumbel noise is such a token (Gumbel-max), so that transformers' own greedy generation, which
knows the cache of every architecture, draws it; the noise is all that a seed decides.

Shape suffixes: B rows, T tokens, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor

from tools.base.errors import UserError, in_one_line
from tools.base.progress import Stopped, heed_stop
from tools.models.positions import CHECKED

DIFFERENCE, DIFFERENCE_HALF = 0.001, 0.05
"""How far, in total variation, the model's distribution may be another with a cache than without, in fp32, and in
formats of 16 bits: room for another order of adding, not for what the caches of some recurrent architectures lose."""


class _Draw(LogitsProcessor):
    """Adds Gumbel noise to log p, and tells of every step; `seen` are the logits of each, (B, V) fp32, where kept."""

    def __init__(self, generator: torch.Generator, tick: Callable[[], None], seen: list[Tensor] | None = None) -> None:
        self._generator, self._tick, self._seen = generator, tick, seen

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._tick()
        if self._seen is not None:
            self._seen.append(scores)
        return scores - torch.empty_like(scores).exponential_(generator=self._generator).log()


def draw_rows(
    model: Any,
    begin_T: Sequence[int],
    rows: int,
    new: int,
    seed: int,
    *,
    ends: Sequence[int] = (),
    cache: bool = True,
    tick: Callable[[], None] = heed_stop,
    seen: list[Tensor] | None = None,
) -> list[list[int]]:
    """So many rows of at most `new` tokens each that the model writes behind the tokens `begin_T`, without those.

    A row that comes to one of `ends` ends before it. `tick` is called before each token, all rows at once.
    """
    ids_BT = torch.tensor([list(begin_T)] * rows, dtype=torch.long, device=model.device)
    options = GenerationConfig(
        do_sample=False,
        max_new_tokens=new,
        eos_token_id=list(ends) or None,
        pad_token_id=ends[0] if ends else 0,
        use_cache=cache,
    )
    generator = torch.Generator(ids_BT.device).manual_seed(seed)
    with without_habits(model):
        tokens_BT = model.generate(
            ids_BT,
            attention_mask=torch.ones_like(ids_BT),
            generation_config=options,
            logits_processor=[_Draw(generator, tick, seen)],
        )
    return [end_row(row, ends) for row in tokens_BT[:, len(begin_T) :].tolist()]


def check_sampling(model: Any, begin_T: Sequence[int]) -> bool:
    """Whether a cache may be used: what is drawn with it is what the model says of the same tokens without.

    Raises UserError where it cannot be sampled either way.
    """
    why = "its distribution is another while it writes"
    allowed = DIFFERENCE if model.dtype == torch.float32 else DIFFERENCE_HALF
    for cache in (True, False):
        seen: list[Tensor] = []
        try:
            rows = draw_rows(model, begin_T, 2, CHECKED, 0, cache=cache, seen=seen)
            if _measure_difference(model, begin_T, rows, seen) <= allowed:
                return cache
        except Stopped:
            raise
        except Exception as error:  # architectures without generation have an error of their own each
            why = in_one_line(error, 200)
    raise UserError(f"{type(model).__name__} cannot write text by itself ({why}); use another source of text than self")


@torch.no_grad()
def _measure_difference(model: Any, begin_T: Sequence[int], rows: list[list[int]], seen: list[Tensor]) -> float:
    """The largest total variation between what rows were drawn from and what a forward of them says."""
    ids_BT = torch.tensor([[*begin_T, *row] for row in rows], device=model.device)
    told = model(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT), use_cache=False)
    logits_BTV = told.logits[:, len(begin_T) - 1 : -1].float()
    drawn_BTV = torch.stack(seen, 1).to(logits_BTV.device)
    if drawn_BTV.shape != logits_BTV.shape:
        return 1.0
    return float((drawn_BTV.softmax(-1) - logits_BTV.softmax(-1)).abs().sum(-1).max()) / 2


@contextmanager
def without_habits(model: Any) -> Iterator[None]:
    """Inside, nothing that the model's own config says of generation applies, such as a penalty for repetition."""
    before = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = before


def end_row(row: list[int], ends: Sequence[int | None]) -> list[int]:
    """The tokens before the first that ends a text."""
    at = next((i for i, token in enumerate(row) if token in ends), len(row))
    return row[:at]


def find_ends(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end a text, as the model's own config and its tokenizer say."""
    known = getattr(model.generation_config, "eos_token_id", None)
    told = known if isinstance(known, list) else [known]
    return [token for token in dict.fromkeys([*told, tokenizer.eos_token_id]) if token is not None]


def find_begin(model: Any, tokenizer: Any) -> int:
    """The token that a document begins with: that of beginning, or else one that parts documents.

    Raises UserError where there is none.
    """
    config, size = model.config.get_text_config(), model.get_input_embeddings().weight.shape[0]
    told = [tokenizer.bos_token_id, getattr(config, "bos_token_id", None)]
    for token in [*told, tokenizer.eos_token_id, tokenizer.sep_token_id]:
        if isinstance(token, int) and 0 <= token < size:
            return token
    raise UserError(
        "the model's tokenizer has no token that a document begins or ends with, so that it cannot write text from "
        "nothing; give it a beginning, as self:PROMPT, or use another source of text"
    )
