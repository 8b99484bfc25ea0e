"""The probability of answers, and what is left of it."""

import math
from typing import Any

import pytest
import torch

import tools.measure.recall
from tests.tiny import ARCHITECTURES, make_tiny_model, make_tiny_tokenizer
from tools.base.progress import ignore_progress
from tools.measure.continuations import continue_rows
from tools.measure.recall import (
    EncodedPair,
    Recall,
    compare_recall,
    count_right,
    cut_batches,
    encode_pairs,
    measure_recall,
)
from tools.texts.questions import Question


def read_slowly(model: Any, pair: EncodedPair) -> float:
    """One question alone, by the model's own logits, in float64."""
    ids = torch.tensor([pair.ids])
    with torch.no_grad():
        log_p = torch.log_softmax(model(input_ids=ids).logits[0].double(), -1)
    places = range(pair.start, len(pair.ids))
    return sum(float(log_p[place - 1, pair.ids[place]]) for place in places) / len(places)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_batches_give_what_each_question_gives_alone(architecture: str) -> None:
    model = make_tiny_model(architecture)
    generator = torch.Generator().manual_seed(0)
    lengths = [3, 9, 2, 14, 5] * 4  # more than a batch
    pairs = [
        EncodedPair(torch.randint(0, 60, (length,), generator=generator).tolist(), max(1, length - 3))
        for length in lengths
    ]
    recall = measure_recall(model, pairs, "questions", ignore_progress)
    assert recall.tokens == sum(lengths)
    assert recall.logprob == pytest.approx([read_slowly(model, pair) for pair in pairs], abs=2e-4)


def test_the_answer_is_what_follows_the_question() -> None:
    tokenizer = make_tiny_tokenizer()
    question = Question("Which planet has Maxwell Montes?", ("venus", "the second"))
    (pair,) = encode_pairs([question], tokenizer)
    whole = "Question: Which planet has Maxwell Montes?\nAnswer: venus"
    assert pair.ids == tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(pair.ids[pair.start :]).strip() == "venus"


def test_retention() -> None:
    dense = Recall(logprob=[-1.0, -2.0, -3.0], tokens=30)
    assert compare_recall(dense, dense) == (1.0, 0.0)
    left = compare_recall(Recall(logprob=[-1.1, -2.3, -3.2], tokens=30), dense)
    assert left is not None
    assert left.share == pytest.approx(math.exp(-0.2))
    assert left.error == pytest.approx(math.exp(-0.2) * 0.1 / math.sqrt(3))
    assert compare_recall(Recall(logprob=[-1.0, None, -3.0], tokens=30), dense) is None
    with pytest.raises(ValueError, match="only answers to the same questions can be compared"):
        compare_recall(Recall(logprob=[-1.0], tokens=10), dense)


def test_a_share_too_large_for_a_number_is_none() -> None:
    pruned, dense = Recall(logprob=[-1.0, -2.0], tokens=2), Recall(logprob=[-1000.0, -2000.0], tokens=2)
    assert compare_recall(pruned, dense) is None


def test_a_model_that_is_not_finite() -> None:
    model = make_tiny_model("llama")
    model.get_output_embeddings().weight.data.fill_(math.nan)
    recall = measure_recall(model, [EncodedPair([1, 2, 3], 2)], "questions", ignore_progress)
    assert (recall.logprob, recall.mean) == ([None], None)


def test_own_answers_are_right_up_to_the_end_of_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = make_tiny_tokenizer()
    questions = [Question(f"Which is {i}?", ("the Venus", "second")) for i in range(20)]
    pairs = encode_pairs(questions, tokenizer)
    said = [" Venus.\nQuestion: more", "Second", "third", "", "the second one"] * 4
    asked: list[list[int]] = []

    def say(_model: Any, _tokenizer: Any, rows: list[list[int]], new: int, *, line: bool) -> list[str]:
        asked.extend(rows)
        assert new == 16 and line
        return [said[len(asked) - len(rows) + i] for i in range(len(rows))]

    monkeypatch.setattr(tools.measure.recall, "continue_rows", say)
    assert count_right(None, tokenizer, pairs, "own answers", ignore_progress) == 8
    order = [i for batch in cut_batches(pairs) for i in batch]
    assert asked == [pairs[i].ids[: pairs[i].start] for i in order]


def test_own_answers_are_the_likeliest_tokens() -> None:
    model, tokenizer = make_tiny_model("llama"), make_tiny_tokenizer()
    (pair,) = encode_pairs([Question("Which?", ("none",))], tokenizer)
    (said,) = continue_rows(model, tokenizer, [pair.ids[: pair.start]], 16)
    right = pair._replace(answers=("none", said.strip().partition("\n")[0]))
    other = pair._replace(answers=(f"not {right.answers[1]}",))
    assert count_right(model, tokenizer, [right, other], "own answers", ignore_progress) == 1


def test_own_answers_end_with_their_line() -> None:
    """Of a streamed model all weights come from disk for every token, and what stands behind a line counts nothing."""
    model, tokenizer = make_tiny_model("llama"), make_tiny_tokenizer()
    pairs = encode_pairs([Question("Which?", ("a",)), Question("Who?", ("b",))], tokenizer)
    rows = [pair.ids[: pair.start] for pair in pairs]
    first, second = continue_rows(model, tokenizer, rows, 16)
    lengths: list[int] = []

    class Lines:
        """As the tokenizer, but for a line that ends after three tokens, of the second row after five."""

        def batch_decode(self, tokens: Any, **options: Any) -> list[str]:
            said: list[str] = tokenizer.batch_decode(tokens, **options)
            lengths.append(len(tokens[0]))
            return [f"{text}\n" if len(tokens[0]) >= 3 + 2 * i else text for i, text in enumerate(said)]

    cut = [text.strip() for text in continue_rows(model, Lines(), rows, 16, line=True)]
    assert lengths[:-1] == [1, 2, 3, 4, 5], "no token more than it takes"
    assert len(cut[0]) < len(first) and len(cut[1]) < len(second)
