"""One model in memory asked by lm-evaluation-harness: figures, their standard errors, and the whole protocol.

results = run_benchmark(benchmarks[0], model, tokenizer, "dense", progress)
"""

import copy
import hashlib
import logging
import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from tools.base.progress import Progress
from tools.measure.benchmarks import SEED, Benchmark, group_leaves, list_leaves
from tools.results.losses import Result
from tools.results.schema import Score

BOOTSTRAPS = 1000
"""Resamples for the standard error of metrics that are not plain means."""


def run_benchmark(benchmark: Benchmark, model: Any, tokenizer: Any, label: str, progress: Progress) -> list[Result]:
    """Ask a transformers model in memory; neither it nor its tokenizer is changed. `label` names it in the scores."""
    import torch
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    protocol, leaves = benchmark.protocol, list_leaves(benchmark.task)
    tokenizer = copy.deepcopy(tokenizer)  # the harness sets a padding token
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=protocol["batch_size"], softmax_dtype="float32")
    lm.set_cache_hook(_Steps(f"{benchmark.name}, {label}", leaves, progress))
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
    for leaf in leaves:
        leaf.set_fewshot_seed(SEED)
        if hasattr(leaf, "meet_model"):
            leaf.meet_model(lm)
    group = benchmark.task if hasattr(benchmark.task, "get_all_groups") else None
    groups = {member.name: member for member in [group, *group.get_all_groups()]} if group else {}
    with _count_cut_prompts() as cut:
        # Not `simple_evaluate`: it adds to the seeds above only what pip and git say of the machine, in two seconds.
        found = evaluate(
            lm,
            {"tasks": {leaf.task_name: leaf for leaf in leaves}, "groups": groups},
            limit=protocol["limit"] or None,
            bootstrap_iters=BOOTSTRAPS,
        )
    protocol = {**protocol, "prompts_sha256": _hash_prompts(found["samples"]), "cut_prompts": len(cut)}
    return [
        _make_result(key, name, members, found, protocol, label)
        for name, members in group_leaves(benchmark).items()
        for key in found["results"][name]
        if "," in key and "_stderr," not in key
    ]


class _Steps:
    """What the harness tells of every answer, as progress."""

    def __init__(self, label: str, leaves: list[Any], progress: Progress) -> None:
        self.label, self.leaves, self.progress, self.done = label, leaves, progress, 0

    def add_partial(self, *_: Any) -> None:
        self.done += 1
        self.progress(self.label, self.done, sum(len(leaf.instances) for leaf in self.leaves))


@contextmanager
def _count_cut_prompts() -> Iterator[list[str]]:
    """Filled with a line for each prompt that was too long for the model and lost its beginning."""
    lines: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "runcat" in record.getMessage():
                lines.append(record.getMessage())

    logger, listener = logging.getLogger("lm_eval"), Listener(logging.WARNING)
    logger.addHandler(listener)
    try:
        yield lines
    finally:
        logger.removeHandler(listener)


def _hash_prompts(samples: dict[str, list[dict[str, Any]]]) -> str:
    """SHA-256 over all prompts and right answers, in order: the same hash, the same questions."""
    digest = hashlib.sha256()
    for members in samples.values():
        for sample in members:
            digest.update(f"{sample['prompt_hash']} {sample['target_hash']}\n".encode())
    return digest.hexdigest()


def _make_result(key: str, name: str, leaves: list[Any], found: Any, protocol: dict[str, Any], label: str) -> Result:
    metric, _, filter_ = key.partition(",")
    figures = found["results"][name]
    value, error = _as_number(figures[key]), _as_number(figures.get(f"{metric}_stderr,{filter_}"))
    values = [
        sample.get(metric)
        for leaf in leaves
        for sample in found["samples"][leaf.task_name]
        if sample["filter"] == filter_
    ]
    numbers = [number for number in map(_as_number, values) if number is not None]
    complete = 0 < len(numbers) == len(values)
    plain = value is not None and complete and math.isclose(float(np.mean(numbers)), value, abs_tol=1e-9)
    for leaf in leaves:
        if hasattr(leaf, "describe_metric"):
            protocol = {**protocol, **leaf.describe_metric(metric)}
    score = Score(
        model=label,
        task=name,
        metric=metric if filter_ == "none" else f"{metric} ({filter_})",
        value=value,
        error=error,
        samples=len(values),
        protocol=protocol,
    )
    return Result(score=score, values=numbers if plain else [])


def _as_number(value: Any) -> float | None:
    """A finite number; None for anything else that the harness may give."""
    is_number = isinstance(value, int | float | np.number) and math.isfinite(value)
    return float(value) if is_number else None


def warn_of_cut_prompts(results: list[Result], warn: Callable[[str], None]) -> None:
    """Say so when prompts were longer than the model reads."""
    score = results[0].score
    if cut := score.protocol["cut_prompts"]:
        warn(f"{score.protocol['task']}: {cut} prompts are longer than {score.model} reads and lost their beginning")
