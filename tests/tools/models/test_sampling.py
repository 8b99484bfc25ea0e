"""Tokens that a model writes: drawn from its own distribution, by a seed, whatever its config says of generation."""

from typing import Any

import pytest
import torch
import transformers

from tests.tiny import ARCHITECTURES, SHARING, VOCABULARY, make_tiny_model, make_tiny_tokenizer
from tools.base.errors import UserError
from tools.models.sampling import check_sampling, draw_rows, find_begin, find_ends

BEGIN = [5, 17, 200]


def draw_plainly(model: Any, rows: int, new: int, seed: int) -> list[list[int]]:
    """Without a cache, in float64: the first of V racing exponentials of rates p, which is token i with p_i exactly."""
    generator = torch.Generator().manual_seed(seed)
    ids_BT = torch.tensor([BEGIN] * rows)
    with torch.no_grad():
        for _ in range(new):
            p_BV = model(input_ids=ids_BT, use_cache=False).logits[:, -1].double().softmax(-1)
            arrival_BV = torch.empty(p_BV.shape).exponential_(generator=generator) / p_BV
            ids_BT = torch.cat([ids_BT, arrival_BV.argmin(-1, keepdim=True)], 1)
    return ids_BT[:, len(BEGIN) :].tolist()


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *SHARING, "gpt_oss"])
def test_what_is_drawn_is_the_models_own_distribution(architecture: str) -> None:
    model = make_tiny_model(architecture)
    assert check_sampling(model, BEGIN)
    drawn = draw_rows(model, BEGIN, 3, 24, 7)
    exact = model if architecture == "gpt_oss" else model.double()  # torch multiplies its experts in fp32 at most
    assert drawn == draw_plainly(exact, 3, 24, 7)
    assert len({token for row in drawn for token in row}) > 20, "no two rows are the same, and none loops"


def test_a_seed_decides_and_nothing_else_does() -> None:
    model = make_tiny_model("llama")
    first = draw_rows(model, BEGIN, 2, 8, 1)
    torch.manual_seed(99)
    assert draw_rows(model, BEGIN, 2, 8, 1) == first != draw_rows(model, BEGIN, 2, 8, 2)
    assert draw_rows(model, BEGIN, 2, 8, 1, cache=False) == first


def test_what_the_models_config_says_of_generation_does_not_apply() -> None:
    model = make_tiny_model("llama")
    first = draw_rows(model, BEGIN, 2, 8, 1)
    habits = transformers.GenerationConfig(repetition_penalty=5.0, top_k=1, eos_token_id=list(range(VOCABULARY)))
    model.generation_config = habits
    assert draw_rows(model, BEGIN, 2, 8, 1) == first
    assert model.generation_config is habits


def test_a_row_ends_before_a_token_that_ends_a_text() -> None:
    model = make_tiny_model("llama")
    first, second = draw_rows(model, BEGIN, 2, 8, 1)
    end = first[5]
    assert end not in first[:5] and end not in second
    assert draw_rows(model, BEGIN, 2, 8, 1, ends=[end, VOCABULARY - 1]) == [first[:5], second]


def test_a_step_is_told_of_before_each_token() -> None:
    steps: list[int] = []
    draw_rows(make_tiny_model("llama"), BEGIN, 2, 8, 1, tick=lambda: steps.append(1))
    assert len(steps) == 8


def test_a_cache_that_forgets_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_tiny_model("llama")
    forward = model.forward

    def forget(input_ids: Any = None, **options: Any) -> Any:
        told = forward(input_ids=input_ids, **options)
        told.logits = told.logits.roll(int(input_ids.shape[1] == 1), -1)
        return told

    monkeypatch.setattr(model, "forward", forget)
    assert not check_sampling(model, BEGIN)


def test_a_model_that_cannot_be_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_tiny_model("llama")

    def fail(*_arguments: Any, **_options: Any) -> Any:
        raise NotImplementedError("no generation\nin this class")

    monkeypatch.setattr(model, "generate", fail)
    sentence = (
        r"^LlamaForCausalLM cannot write text by itself \(no generation in this class\); use another source of text"
    )
    with pytest.raises(UserError, match=sentence):
        check_sampling(model, BEGIN)


def test_where_a_document_begins_and_ends() -> None:
    model, tokenizer = make_tiny_model("llama"), make_tiny_tokenizer()
    assert (find_begin(model, tokenizer), find_ends(model, tokenizer)) == (0, [0])
    model.generation_config.eos_token_id = [3, 4]
    assert find_ends(model, tokenizer) == [3, 4, 0]
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    model.config.bos_token_id = 7
    assert find_begin(model, tokenizer) == 7
    model.config.bos_token_id = None
    with pytest.raises(UserError, match="no token that a document begins or ends with, so that it cannot write text"):
        find_begin(model, tokenizer)
