"""FreebaseQA: what is asked, what is right, and what is weighed."""

from pathlib import Path

import pytest
import torch

from tests.tasks import ask, settings_of
from tests.tiny import make_tiny_model, make_tiny_tokenizer
from tools.measure.benchmarks import load_benchmarks
from tools.measure.tasks.freebaseqa import normalize


def test_freebaseqa_shows_the_first_questions_and_never_asks_them(data: Path) -> None:
    task, results = ask(data, "freebaseqa")
    prompts = list(dict.fromkeys(instance.args[0] for instance in task.instances))
    shown = "Question: Who is 0?\nAnswer: the 0\n\nQuestion: Who is 1?\nAnswer: the 1\n\n"
    assert prompts == [f"{shown}Question: Who is {i}?\nAnswer:" for i in range(2, 8)]
    assert [result.score.samples for result in results] == [6, 6]


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        (" The Beatles.", "beatles"),
        ("beyoncé", "beyonce"),
        ("A  man, a Plan!", "man plan"),
        ("Rock 'n' Roll", "rock n roll"),
        ("theatre", "theatre"),
        ("AC/DC", "acdc"),
    ],
)
def test_answers_are_compared_without_case_accents_punctuation_and_articles(said: str, kept: str) -> None:
    assert normalize(said) == kept


def test_any_of_the_answers_is_right_and_the_gold_one_is_weighed_per_token(data: Path) -> None:
    (benchmark,) = load_benchmarks(settings_of(data, "freebaseqa"), "fp32")
    task, doc = benchmark.task, {"question": "Who is 3?", "answer": "the 3", "answers": ["the 3", "three"]}
    task.tokens = {"Who is 3?": 4}
    assert task.process_results(doc, [" Three.", (-6.0, False)]) == {"exact_match": 1.0, "logprob": -1.5}
    assert task.process_results(doc, [" three or four", (-6.0, False)])["exact_match"] == 0.0


def test_the_log_probability_is_the_models_own(data: Path) -> None:
    _, (_, logprob) = ask(data, "freebaseqa")
    model, tokenizer = make_tiny_model("llama"), make_tiny_tokenizer()
    shown = "Question: Who is 0?\nAnswer: the 0\n\nQuestion: Who is 1?\nAnswer: the 1\n\n"
    expected, tokens = [], 0
    for i in range(2, 8):
        context = tokenizer(f"{shown}Question: Who is {i}?\nAnswer:")["input_ids"]
        ids = torch.tensor([context + tokenizer(f" the {i}")["input_ids"]])
        with torch.no_grad():
            logprobs = model(ids).logits[0, :-1].log_softmax(-1)
        gold = logprobs.gather(1, ids[0, 1:, None])[len(context) - 1 :]
        expected.append(float(gold.mean()))
        tokens += len(gold)
    assert logprob.score.metric == "logprob" and logprob.score.protocol["answer_tokens"] == tokens
    assert logprob.values == pytest.approx(expected, abs=1e-4)
    assert logprob.score.value == pytest.approx(sum(expected) / 6, abs=1e-4)
    assert logprob.score.error == pytest.approx(float(torch.tensor(expected).std()) / 6**0.5, abs=1e-4)
