"""Models whose parts cannot be cut."""

import pytest
import torch

from tests.tiny import make_tiny_model
from tools.base.errors import UserError
from tools.models.layers import find_blocks
from tools.surgery.choose import list_counts


def test_blocks_that_differ_are_refused() -> None:
    dense = make_tiny_model("llama")
    find_blocks(dense)[1].mlp = torch.nn.Linear(32, 32)
    with pytest.raises(UserError, match=r"^the blocks of LlamaForCausalLM are not all alike; only models whose"):
        list_counts(dense, ["blocks"], 0.5)
