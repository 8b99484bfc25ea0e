"""Text that a model goes on with, greedily."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from tools.controls import strip_controls

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


def decode(model: Any, ids_BT: Tensor, new: int, least: int = 0, mask_BT: Tensor | None = None) -> Tensor:
    """The tokens and at most `new`, at least `least` of the most likely ones after them, (B, T + new) int64.

    `mask_BT` is 0 where a row is padded, on its left. A row that ends before others do is filled up with token 0.
    """
    mask_BT = torch.ones_like(ids_BT) if mask_BT is None else mask_BT
    greedy = GenerationConfig(do_sample=False, max_new_tokens=new, min_new_tokens=least, pad_token_id=0)
    tokens_BT: Tensor = model.generate(ids_BT, attention_mask=mask_BT, generation_config=greedy)
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
