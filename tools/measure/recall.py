"""What a model still knows: the log-probability of right answers to questions, paired with the dense model's.

Perplexity on running text hides what pruning forgets. A question is put closed-book and without examples; the gold
answer is read, not generated, so that small models, who would seldom say it, have a figure too.

Shape suffixes: B questions, T tokens, D hidden width.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel, Field

from tools.base.progress import Progress, heed_stop
from tools.base.settings import Split, WorkbenchSettings
from tools.measure.continuations import continue_rows
from tools.measure.tasks.freebaseqa import normalize
from tools.models.positions import refuse_long_question
from tools.models.readout import CHUNK, compute_hidden, compute_logits
from tools.results.losses import MOST_NATS, Evaluation, compare_kl
from tools.results.schema import TextFigures
from tools.texts.questions import QUESTION_FORM, Question, split_questions
from tools.texts.windows import find_bos


def list_texts(evaluation: Evaluation, accepted: Evaluation | None = None) -> list[TextFigures]:
    """The figures of every text, with how its KL differs from that of the `accepted` weights on the same windows.

    Empty where texts have no names.
    """
    return [_describe(evaluation, accepted, name) for name in dict.fromkeys(evaluation.texts)]


def _describe(evaluation: Evaluation, accepted: Evaluation | None, name: str) -> TextFigures:
    own, theirs = evaluation.take_text(name), accepted.take_text(name) if accepted else None
    change, error = compare_kl(own, theirs) if theirs and own.finite and theirs.finite else (None, None)
    return TextFigures(
        name=name,
        weight=evaluation.weights[name],
        perplexity=own.perplexity,
        kl=own.mean_kl,
        kl_error=own.kl_error,
        change=change,
        change_error=error,
    )


BATCH = 16
"""Questions in one forward; they are sorted by length, so that little of it is padding."""


ANSWER_TOKENS = 16
"""Tokens of a model's own answer at most."""


class EncodedPair(NamedTuple):
    """A question with its gold answer, as tokens."""

    ids: list[int]
    start: int
    """Where the answer begins."""
    answers: tuple[str, ...] = ()
    """All that count as right, in words."""


class Recall(BaseModel):
    """The gold answers' log-probability, question by question."""

    logprob: list[float | None] = Field(description="Mean over an answer's tokens, nats; null where it is not finite.")
    tokens: int = Field(description="Tokens put through the model.")

    @property
    def mean(self) -> float | None:
        """Mean over questions; None when one is not finite."""
        known = [value for value in self.logprob if value is not None]
        return float(np.mean(known)) if len(known) == len(self.logprob) else None


class Retention(NamedTuple):
    """How much of the dense model's knowledge is left."""

    share: float
    """exp of the mean paired difference: the geometric mean of p(model)/p(dense) per token of the gold answers."""
    error: float
    """Standard error of the share, over questions."""


def encode_questions(settings: WorkbenchSettings, model: Any, tokenizer: Any) -> dict[Split, list[EncodedPair]]:
    """The questions of each split; empty where none are asked. Raises UserError for one that the model cannot have."""
    if not settings.questions:
        return {}
    parts = split_questions(settings.questions, settings.question_pairs, settings.text_cut)

    def encode(questions: Sequence[Question]) -> list[EncodedPair]:
        pairs = encode_pairs(questions, tokenizer)
        for question, pair in zip(questions, pairs, strict=True):
            refuse_long_question(model, question.question, len(pair.ids))
        return pairs

    return {"validation": encode(parts.validation), "test": encode(parts.test)}


def encode_pairs(questions: Sequence[Question], tokenizer: Any) -> list[EncodedPair]:
    """Each question with its gold answer in the form of `QUESTION_FORM`, behind the tokenizer's own first token."""
    bos = find_bos(tokenizer)
    begin = [] if bos is None else [bos]
    pairs = []
    for question in questions:
        put = QUESTION_FORM.format(question.question)
        asked, whole = (
            begin + tokenizer(text, add_special_tokens=False)["input_ids"]
            for text in (put, f"{put} {question.answers[0]}")
        )
        # A tokenizer may join the last sign of the question with the first of the answer: what differs is the answer.
        start = next((i for i, (a, b) in enumerate(zip(asked, whole, strict=False)) if a != b), len(asked))
        pairs.append(EncodedPair(whole, max(min(start, len(whole) - 1), 1), question.answers))
    return pairs


def measure_recall(
    model: Any,
    pairs: Sequence[EncodedPair],
    label: str,
    progress: Callable[[str, int, int], None],
    so_far: list[float] | None = None,
) -> Recall:
    """The log-probability of every gold answer.

    Questions of a batch are padded on the right, where a causal model does not look, so no mask is needed. What is
    known `so_far`, of the first batches, is not asked again, and grows batch by batch.
    """
    values = [] if so_far is None else so_far
    for batch in cut_batches(pairs)[-(-len(values) // BATCH) :]:
        heed_stop()
        progress(label, len(values), len(pairs))
        values += read_answers(model, [pairs[i] for i in batch])
    progress(label, len(pairs), len(pairs))
    return put_together(pairs, values)


def cut_batches(pairs: Sequence[EncodedPair]) -> list[list[int]]:
    """Which questions go through the model at once: numbers of those of nearly one length."""
    order = sorted(range(len(pairs)), key=lambda i: (len(pairs[i].ids), i))
    return [order[first : first + BATCH] for first in range(0, len(order), BATCH)]


def put_together(pairs: Sequence[EncodedPair], values: Sequence[float]) -> Recall:
    """The recall of all questions, from the log-probabilities of batch after batch."""
    found: list[float | None] = [None] * len(pairs)
    order = [i for batch in cut_batches(pairs) for i in batch]
    for i, value in zip(order, values, strict=True):
        found[i] = value if math.isfinite(value) else None
    return Recall(logprob=found, tokens=sum(len(pair.ids) for pair in pairs))


def count_right(model: Any, tokenizer: Any, pairs: Sequence[EncodedPair], label: str, progress: Progress) -> int:
    """Questions to which the model's own answer, its likeliest tokens up to the end of the line, is one that counts.

    Compared as FreebaseQA's are (`normalize`). A small model that is put to it without examples may get none right.
    """
    right = 0
    for done, batch in enumerate(batches := cut_batches(pairs)):
        heed_stop()
        progress(label, done, len(batches))
        asked = [pairs[i].ids[: pairs[i].start] for i in batch]
        for i, said in zip(batch, continue_rows(model, tokenizer, asked, ANSWER_TOKENS, line=True), strict=True):
            line = normalize(said.strip().partition("\n")[0])
            right += line != "" and line in {normalize(answer) for answer in pairs[i].answers}
    progress(label, len(batches), len(batches))
    return right


@torch.no_grad()
def read_answers(model: Any, pairs: Sequence[EncodedPair]) -> list[float]:
    """Mean log-probability per token of the gold answer of each pair of a batch."""
    width = max(len(pair.ids) for pair in pairs)
    ids_BT = torch.tensor([pair.ids + [0] * (width - len(pair.ids)) for pair in pairs], device=model.device)
    hidden_BTD = compute_hidden(model, ids_BT)
    spans = [slice(pair.start, len(pair.ids)) for pair in pairs]
    before = torch.cat([hidden_BTD[b, span.start - 1 : span.stop - 1] for b, span in enumerate(spans)])
    answers = torch.cat([ids_BT[b, span] for b, span in enumerate(spans)]).to(hidden_BTD.device)
    parts = zip(before.split(CHUNK), answers.split(CHUNK), strict=True)
    losses = [
        torch.nn.functional.cross_entropy(compute_logits(model, hidden), targets, reduction="none")
        for hidden, targets in parts
    ]
    shares = torch.cat(losses).double().split([span.stop - span.start for span in spans])
    return [-float(share.mean()) for share in shares]


def compare_recall(recall: Recall, dense: Recall) -> Retention | None:
    """What is left of the dense model's knowledge; None where either is not finite, or the share too large a number.

    Raises ValueError when they are not about the same questions.
    """
    if len(recall.logprob) != len(dense.logprob):
        raise ValueError("only answers to the same questions can be compared")
    pairs = zip(recall.logprob, dense.logprob, strict=True)
    changes = np.array([after - before for after, before in pairs if after is not None and before is not None])
    if len(changes) < len(dense.logprob) or changes.mean() >= MOST_NATS:
        return None
    share = math.exp(float(changes.mean()))
    return Retention(share, share * float(changes.std(ddof=1)) / math.sqrt(len(changes)))
