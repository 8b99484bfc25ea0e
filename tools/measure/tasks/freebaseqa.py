"""FreebaseQA as a task of lm-evaluation-harness: each question is answered freely, and its gold answer weighed."""

import re
import string
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from tools.base.errors import UserError
from tools.base.named import path_of
from tools.base.settings import TaskSettings
from tools.measure.benchmarks import OwnTask, hash_files
from tools.texts.questions import Question, check_questions, read_questions


def check(settings: TaskSettings) -> None:
    """Refuse a source of questions that is missing or cannot be read. Raises UserError."""
    if not settings.freebaseqa:
        raise UserError(
            "the task freebaseqa needs its questions: --freebaseqa file:PATH, such as FreebaseQA-eval.json of "
            "github.com/kelvin-jiang/FreebaseQA, or hub:NAME:SPLIT"
        )
    check_questions(settings.freebaseqa)


def load(settings: TaskSettings) -> tuple[Any, Any]:
    """(the task, where its questions come from). Raises UserError where there are too few."""
    source = settings.freebaseqa
    questions = list(read_questions(source))
    if len(questions) <= settings.shots:
        raise UserError(
            f"source of questions {source!r} has {len(questions)} questions, of which the first {settings.shots} "
            "are exemplars; none is left to ask"
        )
    data = hash_files(path_of(source)) if source.startswith("file:") else source
    return make_task(questions, settings.shots), data


def read_asked(settings: TaskSettings) -> Iterator[Question]:
    """The questions after the exemplars."""
    return islice(read_questions(settings.freebaseqa), settings.shots, None)


TASK = OwnTask(
    "closed book: normalised exact match, and the log-probability per token of the right answer, which still says "
    "something of small models; --freebaseqa",
    check,
    load,
    read_asked,
)


def make_task(questions: Sequence[Question], shots: int) -> Any:
    """The harness' task; the first `shots` questions are exemplars and never asked."""
    from datasets import Dataset
    from lm_eval.api.instance import Instance
    from lm_eval.api.task import ConfigurableTask

    class FreebaseQA(ConfigurableTask):  # type: ignore[misc]  # the harness has no types
        """Counts tokens itself: the harness tells a task the log-probability of an answer, but not of how many."""

        def __init__(self, config: dict[str, Any]) -> None:
            super().__init__(config=config)
            self.count_tokens: Callable[[str, str], int]
            self.tokens: dict[str, int] = {}
            """Question to tokens of its gold answer, of those asked."""

        def meet_model(self, lm: Any) -> None:
            self.count_tokens = lambda context, answer: len(lm._encode_pair(context, answer)[1])

        def construct_requests(self, doc: dict[str, Any], ctx: str, **options: Any) -> list[Any]:
            """Two requests a question: an answer of the model's own, and the log-probability of the gold one."""
            answer = f"{self.config.target_delimiter}{doc['answer']}"
            self.tokens[doc["question"]] = self.count_tokens(ctx, answer)
            metadata = options["metadata"]
            return [
                Instance("generate_until", doc, (ctx, dict(self.config.generation_kwargs)), 0, metadata),
                Instance("loglikelihood", doc, (ctx, answer), 1, metadata),
            ]

        def process_results(self, doc: dict[str, Any], results: list[Any]) -> dict[str, float]:
            """Both metrics of one question."""
            said, (logprob, _) = results
            words = normalize(said)  # an article alone is none
            right = words != "" and words in {normalize(answer) for answer in doc["answers"]}
            return {"exact_match": float(right), "logprob": logprob / self.tokens[doc["question"]]}

        def describe_metric(self, metric: str) -> dict[str, int]:
            """The log-probability is per token, comparable for tokenizers that cut the same answers alike."""
            return {"answer_tokens": sum(self.tokens.values())} if metric == "logprob" else {}

    rows = [{"question": q.question, "answer": q.answers[0], "answers": list(q.answers)} for q in questions]
    splits = {"exemplars": Dataset.from_list(rows[:shots]), "test": Dataset.from_list(rows[shots:])}
    config = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    return FreebaseQA({**config, "num_fewshot": shots, "custom_dataset": lambda **_: splits})


def normalize(answer: str) -> str:
    """An answer without case, accents, punctuation and articles, as SQuAD's evaluation (arXiv 1606.05250) compares
    them; accents go because FreebaseQA writes none.
    """
    plain = "".join(c for c in unicodedata.normalize("NFKD", answer.casefold()) if not unicodedata.combining(c))
    bare = "".join(c for c in plain if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())
