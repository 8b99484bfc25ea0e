"""FreebaseQA as a task of lm-evaluation-harness: each question is answered freely, and its gold answer weighed."""

import re
import string
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask

from tools.texts.questions import Question


class FreebaseQA(ConfigurableTask):  # type: ignore[misc]  # the harness has no types
    """The first `shots` questions are exemplars and never asked.

    `count_tokens(context, answer)` must be set before questions are asked: the harness tells a task the log-probability
    of an answer, but not of how many tokens.
    """

    def __init__(self, questions: Sequence[Question], shots: int) -> None:
        rows = [{"question": q.question, "answer": q.answers[0], "answers": list(q.answers)} for q in questions]
        splits = {"exemplars": Dataset.from_list(rows[:shots]), "test": Dataset.from_list(rows[shots:])}
        config = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
        super().__init__(config={**config, "num_fewshot": shots, "custom_dataset": lambda **_: splits})
        self.count_tokens: Callable[[str, str], int]
        self.tokens: dict[str, int] = {}
        """Question to tokens of its gold answer, of those asked."""

    def construct_requests(self, doc: dict[str, Any], ctx: str, **options: Any) -> list[Instance]:
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
        right = normalize(said) in {normalize(answer) for answer in doc["answers"]}
        return {"exact_match": float(right), "logprob": logprob / self.tokens[doc["question"]]}


def normalize(answer: str) -> str:
    """An answer without case, accents, punctuation and articles, as SQuAD's evaluation (arXiv 1606.05250) compares
    them; accents go because FreebaseQA writes none.
    """
    plain = "".join(c for c in unicodedata.normalize("NFKD", answer.casefold()) if not unicodedata.combining(c))
    bare = "".join(c for c in plain if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())
