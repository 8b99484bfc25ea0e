"""Greedy continuations, on tiny models of five architectures."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, TextStreamer

from tests.tiny import ARCHITECTURES, VOCABULARY, make_tiny_model, make_tiny_tokenizer, tiny_settings
from tools.measure import continuations
from tools.measure.continuations import (
    PROMPTS,
    Continuation,
    compare_continuations,
    continue_prompts,
    count_continued,
    decode,
)
from tools.models.load import load_model

IDS_BT = torch.randint(1, VOCABULARY, (1, 8), generator=torch.Generator().manual_seed(0))


def test_decode_gives_the_likeliest_tokens() -> None:
    model = make_tiny_model("llama")
    tokens_BT = decode(model, IDS_BT, 5)
    assert tokens_BT.shape == (1, 13) and torch.equal(tokens_BT[:, :8], IDS_BT)
    logits_BTV = model(tokens_BT).logits
    assert torch.equal(tokens_BT[:, 8:], logits_BTV[:, 7:-1].argmax(-1))


@pytest.mark.parametrize(
    "habit",
    [
        {"repetition_penalty": 3.0},
        {"num_beams": 3},
        {"no_repeat_ngram_size": 2},
        {"do_sample": True, "temperature": 5.0},
        {"max_length": 9},
    ],
)
def test_what_a_model_s_own_config_says_of_generation_does_not_apply(
    habit: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    model = make_tiny_model("llama")
    plain = decode(model, IDS_BT, 24)
    model.generation_config = GenerationConfig(**habit, eos_token_id=int(plain[0, 20]))
    tokens_BT = decode(model, IDS_BT, 24, streamer=TextStreamer(make_tiny_tokenizer()))
    assert torch.equal(tokens_BT, plain[:, :21]), "but which token ends a text does"
    assert model.generation_config.to_diff_dict().items() >= habit.items() and not caplog.records


def test_as_many_tokens_are_decoded_where_a_model_would_end_its_text() -> None:
    model = make_tiny_model("llama")
    model.generation_config.eos_token_id = int(decode(model, IDS_BT, 1)[0, 8])
    assert decode(model, IDS_BT, 32).shape == (1, 9)
    assert decode(model, IDS_BT, 32, least=32).shape == (1, 40)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_prompts_of_different_lengths_go_together_as_each_goes_alone(architecture: str) -> None:
    model, tokenizer = make_tiny_model(architecture), make_tiny_tokenizer()
    together = continue_prompts(model, tokenizer, PROMPTS, 6)
    assert together == [continue_prompts(model, tokenizer, [prompt], 6)[0] for prompt in PROMPTS]
    assert len({len(tokenizer(prompt)["input_ids"]) for prompt in PROMPTS}) > 1


def test_a_text_that_ends_is_not_filled_up() -> None:
    model, tokenizer = make_tiny_model("llama"), make_tiny_tokenizer()
    plain = continue_prompts(model, tokenizer, PROMPTS, 6)
    ids_BT = torch.tensor(tokenizer([PROMPTS[0]])["input_ids"])
    tokens = decode(model, ids_BT, 6)[0, ids_BT.shape[1] :].tolist()
    model.generation_config.eos_token_id = [tokens[2]]
    ended = continue_prompts(model, tokenizer, PROMPTS, 6)
    assert ended[0] == tokenizer.decode(tokens[: tokens.index(tokens[2])]) and len(ended[0]) < len(plain[0])


def test_a_model_without_room_says_less_or_nothing() -> None:
    model, tokenizer = make_tiny_model("gpt2"), make_tiny_tokenizer()
    longest = max(len(tokenizer(prompt)["input_ids"]) for prompt in PROMPTS)
    plain = continue_prompts(model, tokenizer, PROMPTS, 3)
    model.config.n_positions = longest + 3
    assert continue_prompts(model, tokenizer, PROMPTS) == plain
    model.config.n_positions = longest
    said = continue_prompts(model, tokenizer, PROMPTS, 1)
    full = [len(tokenizer(prompt)["input_ids"]) == longest for prompt in PROMPTS]
    assert [text == "" for text in said] == full and 0 < sum(full) < len(PROMPTS)
    alone = [continue_prompts(model, tokenizer, [prompt], 1)[0] for prompt in PROMPTS]
    assert said == alone, "one that takes all positions silences no other"


def test_a_model_that_is_streamed_says_less(tiny_llama: Path, tmp_path: Path) -> None:
    """Each of its tokens takes all of its weights from disk."""
    whole, tokenizer = load_model(tiny_settings(tiny_llama))
    streamed, _ = load_model(tiny_settings(tiny_llama, device="stream"), tmp_path)
    said = continue_prompts(streamed, tokenizer, PROMPTS)
    assert said == continue_prompts(whole, tokenizer, PROMPTS, count_continued(streamed=True))
    longer = continue_prompts(whole, tokenizer, PROMPTS)
    assert longer == continue_prompts(whole, tokenizer, PROMPTS, count_continued(streamed=False))
    assert all(more.startswith(less) and more != less for more, less in zip(longer, said, strict=True))


def test_control_characters_go_and_line_ends_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = make_tiny_tokenizer()

    def say(_model: object, ids_BT: Tensor, _new: int, **_options: object) -> Tensor:
        return torch.cat([ids_BT, torch.tensor([tokenizer("\x1b[31mred\x00\r\n\tblue\x07")["input_ids"]])], 1)

    monkeypatch.setattr(continuations, "decode", say)
    assert continue_prompts(make_tiny_model("llama"), tokenizer, ["colours"]) == ["red\n blue"]


def test_where_two_texts_part() -> None:
    def say(tokens: list[int], seconds: float, size: int) -> Continuation:
        return Continuation("a", tokens, seconds, size)

    long, short = say([1, 2, 3, 4, 5], 2.0, 100), say([1, 2, 9], 2.0, 80)
    assert (long.rate, short.rate, say([1], 0.0, 1).rate) == (2.0, 1.0, None)
    assert compare_continuations(short, long) == [
        "the same tokens up to number 2 of 5",
        "0.50 times as many tokens a second",
        "0.800 of the bytes",
    ]
    assert compare_continuations(say([1], 0.0, 50), say([1], 0.0, 100)) == ["the same 1 tokens", "0.500 of the bytes"]
