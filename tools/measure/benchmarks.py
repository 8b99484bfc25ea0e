"""Tasks of lm-evaluation-harness on a model in memory: figures, their standard errors, and the whole protocol.

benchmarks = load_benchmarks(settings, "fp32")  # all that can be wrong with the input is told here
results = run_benchmark(benchmarks[0], model, tokenizer, "dense", progress)

The harness is an extra (`[eval]`) and imported only where it is used.
"""

import copy
import difflib
import functools
import hashlib
import importlib.util
import logging
import math
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from pydantic import BaseModel, Field

from tools.base.errors import UserError, in_one_line
from tools.base.files import hash_file, write_json
from tools.base.names import path_of
from tools.base.settings import TaskSettings, WorkbenchSettings
from tools.results.schema import Score
from tools.texts.questions import check_questions, read_questions, split_questions

if TYPE_CHECKING:
    from tools.base.progress import Progress
    from tools.workbench.bench import Warn, Workbench

OWN = ("freebaseqa", "mmlu")
"""Tasks whose questions are chosen by a setting of their own."""

SEED = 1234
"""The harness' default, for tasks that draw their exemplars."""

BOOTSTRAPS = 1000
"""Resamples for the standard error of metrics that are not plain means."""

PACKAGES = ("torch", "transformers", "lm-eval", "datasets")


class Benchmark(NamedTuple):
    """A task with its questions."""

    name: str
    task: Any
    """A task, group or list of tasks of the harness."""
    protocol: dict[str, Any]
    """What is known of the protocol before any model is asked."""


class Result(BaseModel):
    """A figure and what it is the mean of."""

    score: Score
    values: list[float] = Field(
        description="One for each question, in order; empty where the figure is not their plain mean."
    )


class Results(BaseModel):
    """What is kept of one model on one task."""

    results: list[Result]


# --- before any model is loaded ------------------------------------------------------------------------------------


def load_benchmarks(settings: TaskSettings, dtype: str) -> list[Benchmark]:
    """The tasks asked for, with their questions. Raises UserError in one line for whatever cannot be asked."""
    if not settings.tasks:
        return []
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("tasks need lm-evaluation-harness, which is not installed; try: pip install 'lm-eval>=0.4.13'")
    if "freebaseqa" in settings.tasks:
        _check_freebaseqa(settings.freebaseqa)
    if "mmlu" in settings.tasks and settings.mmlu != "hub":
        _find_mmlu_files(settings.mmlu)
    if settings.tasks != [name for name in settings.tasks if name in OWN]:
        _refuse_unknown_tasks(settings.tasks)
    _hush_harness()
    return [_load_benchmark(name, settings, dtype) for name in settings.tasks]


def _check_freebaseqa(source: str) -> None:
    if not source:
        raise UserError(
            "the task freebaseqa needs its questions: --freebaseqa file:PATH, such as FreebaseQA-eval.json of "
            "github.com/kelvin-jiang/FreebaseQA, or hub:NAME:SPLIT"
        )
    check_questions(source)


def refuse_shared_questions(settings: TaskSettings, loop: WorkbenchSettings) -> None:
    """Raises UserError when freebaseqa would ask what the plans of a run are judged by or may be fitted to."""
    if not loop.questions or "freebaseqa" not in settings.tasks:
        return
    parts = split_questions(loop.questions, loop.question_pairs)
    used = {q.question.casefold() for q in chain(parts.validation, parts.rest)}
    end = settings.shots + settings.limit if settings.limit else None
    asked = islice(read_questions(settings.freebaseqa), settings.shots, end)
    if shared := [q.question for q in asked if q.question.casefold() in used]:
        raise UserError(
            f"freebaseqa would ask {len(shared)} questions that plans are judged by or may be fitted to, such as "
            f"{shared[0][:100]!r}; choose another --freebaseqa or a smaller --limit"
        )


def _find_mmlu_files(source: str) -> tuple[Path, Path]:
    """(exemplars, test)."""
    if not source.startswith("file:"):
        raise UserError(f"source of MMLU {source!r} is neither hub nor file:DIR")
    directory = path_of(source)
    exemplars, tests = directory / "dev.jsonl", sorted(directory.glob("test*.jsonl"))
    if not exemplars.is_file():
        raise UserError(f"directory of MMLU {directory} has no dev.jsonl")
    if len(tests) != 1:
        raise UserError(f"directory of MMLU {directory} has {len(tests)} files test*.jsonl, but exactly one is needed")
    return exemplars, tests[0]


@functools.cache
def _index_tasks() -> Any:
    """All tasks of the harness by name; reading their files takes it some ten seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _refuse_unknown_tasks(names: list[str]) -> None:
    known = {*OWN, *_index_tasks().all_tasks}
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else "see: lm_eval ls tasks"
            raise UserError(f"task {name!r} is not one of lm-evaluation-harness; {hint}")


@functools.cache
def _hush_harness() -> None:
    """No bars and no log of the harness' own: it has no switch for the first, and nothing in the second is for users
    but what `_count_cut_prompts` hears.
    """
    import datasets
    import lm_eval.api.model
    import lm_eval.api.task
    import lm_eval.models.huggingface
    from tqdm import tqdm

    for module in (lm_eval.api.model, lm_eval.api.task, lm_eval.models.huggingface):
        module.tqdm = lambda *arguments, **options: tqdm(*arguments, **{**options, "disable": True})
    logger = logging.getLogger("lm_eval")
    logger.propagate = False
    logger.addHandler(logging.NullHandler())
    datasets.disable_progress_bars()


def _load_benchmark(name: str, settings: TaskSettings, dtype: str) -> Benchmark:
    try:
        task, data = _load_task(name, settings)
    except UserError:
        raise
    except Exception as error:  # datasets raises a different class for every way a data set can be missing
        raise UserError(f"task {name} could not be loaded: {in_one_line(error)}") from error
    leaves = _list_leaves(task)
    for leaf in leaves:
        _set_shots(leaf, settings.shots)
    protocol = {
        "task": name,
        "version": str(getattr(task, "version", leaves[0].VERSION)),
        "shots": max(leaf.config.num_fewshot for leaf in leaves),
        "limit": settings.limit,
        "data": data,
        "dtype": dtype,
        "batch_size": settings.batch_size,
        "chat_template": False,
        "seed": SEED,
        "versions": {package: version(package) for package in PACKAGES},
    }
    return Benchmark(name, task, protocol)


def _load_task(name: str, settings: TaskSettings) -> tuple[Any, Any]:
    """(the harness' task, where its questions come from: hub, or the hash of each local file)."""
    if name == "freebaseqa":
        from tools.measure.tasks.freebaseqa import FreebaseQA

        source = settings.freebaseqa
        questions = list(read_questions(source))
        if len(questions) <= settings.shots:
            raise UserError(
                f"source of questions {source!r} has {len(questions)} questions, of which the first {settings.shots} "
                "are exemplars; none is left to ask"
            )
        data = _hash_files(path_of(source)) if source.startswith("file:") else source
        return FreebaseQA(questions, settings.shots), data
    if name == "mmlu":
        from tools.measure.tasks.mmlu import load_hub_mmlu, load_local_mmlu

        if settings.mmlu == "hub":
            return load_hub_mmlu(), "hub"
        files = _find_mmlu_files(settings.mmlu)
        return load_local_mmlu(*files), _hash_files(*files)
    loaded = _index_tasks().load([name])
    return loaded["groups"].get(name) or list(loaded["tasks"].values()), "hub"


def _hash_files(*paths: Path) -> dict[str, str]:
    return {path.name: hash_file(path) for path in paths}


def _list_leaves(task: Any) -> list[Any]:
    """The tasks that hold questions."""
    if isinstance(task, list):
        return task
    return list(task.get_all_tasks()) if hasattr(task, "get_all_tasks") else [task]


def _set_shots(leaf: Any, shots: int) -> None:
    """As the harness' own --num_fewshot: a task that says 0 itself is always asked without exemplars."""
    if leaf.config.num_fewshot != 0:
        leaf.set_config("num_fewshot", shots)
    sampler = getattr(leaf, "sampler", None)
    if sampler is not None and len(sampler.df) < leaf.config.num_fewshot:
        raise UserError(f"task {leaf.task_name} has {len(sampler.df)} exemplars, but {shots} shots were asked for")


# --- one model -----------------------------------------------------------------------------------------------------


def run_benchmark(benchmark: Benchmark, model: Any, tokenizer: Any, label: str, progress: "Progress") -> list[Result]:
    """Ask a transformers model in memory; neither it nor its tokenizer is changed. `label` names it in the scores."""
    import torch
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    protocol, leaves = benchmark.protocol, _list_leaves(benchmark.task)
    tokenizer = copy.deepcopy(tokenizer)  # the harness sets a padding token
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=protocol["batch_size"], softmax_dtype="float32")
    lm.set_cache_hook(_Steps(f"{benchmark.name}, {label}", leaves, progress))
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
    for leaf in leaves:
        leaf.set_fewshot_seed(SEED)
        if benchmark.name == "freebaseqa":
            leaf.count_tokens = lambda context, answer: len(lm._encode_pair(context, answer)[1])
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
    whole = group is not None and group.has_aggregation
    figures = {benchmark.name: leaves} if whole else {leaf.task_name: [leaf] for leaf in leaves}
    return [
        _make_result(key, name, members, found, protocol, label)
        for name, members in figures.items()
        for key in found["results"][name]
        if "," in key and "_stderr," not in key
    ]


class _Steps:
    """What the harness tells of every answer, as progress."""

    def __init__(self, label: str, leaves: list[Any], progress: "Progress") -> None:
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
    if metric == "logprob":  # per token: of tokenizers that cut the same answers alike
        protocol = {**protocol, "answer_tokens": sum(sum(leaf.tokens.values()) for leaf in leaves)}
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


# --- side by side --------------------------------------------------------------------------------------------------


def find_differences(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """The fields in which two protocols differ, with both values where these are short."""
    differing = []
    for name in dict.fromkeys([*first, *second]):
        one, other = first.get(name), second.get(name)
        if one == other:
            continue
        if isinstance(one, dict) and isinstance(other, dict):
            differing += [f"{name}.{line}" for line in find_differences(one, other)]
        else:
            pair = f"{one} and {other}"
            differing.append(f"{name} ({pair})" if len(pair) < 60 else name)
    return differing


def compare_scores(scores: Iterable[Score]) -> None:
    """Refuse to set figures of one task and metric side by side that were not measured alike. Raises UserError."""
    firsts: dict[tuple[str, str], Score] = {}
    for score in scores:
        first = firsts.setdefault((score.task, score.metric), score)
        if differing := find_differences(first.protocol, score.protocol):
            raise UserError(
                f"{score.task} {score.metric} of {first.model} and of {score.model} must not be compared; their "
                f"protocols differ in {', '.join(differing)}"
            )


class Difference(NamedTuple):
    """A figure less the first model's."""

    value: float
    error: float | None
    paired: bool
    """Whether the error is that of the differences question by question."""


def subtract(result: Result, first: Result) -> Difference | None:
    """The difference to the first model's figure; None where one was not finite. Raises UserError by protocol."""
    compare_scores([first.score, result.score])
    if result.score.value is None or first.score.value is None:
        return None
    value = result.score.value - first.score.value
    if result.values and len(result.values) == len(first.values):
        differences = np.subtract(result.values, first.values)
        count = len(differences)
        return Difference(value, float(np.std(differences, ddof=1) / math.sqrt(count)) if count > 1 else None, True)
    errors = (result.score.error, first.score.error)
    return Difference(value, None if None in errors else math.hypot(*(e for e in errors if e is not None)), False)


# --- in a run ------------------------------------------------------------------------------------------------------


def measure_checkpoints(
    bench: "Workbench",
    settings: TaskSettings,
    checkpoints: dict[str, str],
    progress: "Progress",
) -> list[Score]:
    """The tasks on checkpoints of the workbench, by label; each is asked once, then read back.

    The last checkpoint asked stays in the model. Raises UserError where the tasks cannot be loaded.
    """
    scores: list[Score] = []
    benchmarks = load_benchmarks(settings, bench.settings.dtype)
    for label, checkpoint in checkpoints.items():
        for benchmark in benchmarks:
            path = bench.directory / "evaluations" / f"{benchmark.name}-{checkpoint[:16]}.json"
            results = _read_kept(path, benchmark, label)
            if results is None:
                bench.restore(checkpoint)
                results = run_benchmark(benchmark, bench.model, bench.tokenizer, label, progress)
                write_json(path, Results(results=results).model_dump())
            warn_of_cut_prompts(results, bench.warn)
            scores += [result.score for result in results]
    compare_scores(scores)
    return scores


def _read_kept(path: Path, benchmark: Benchmark, label: str) -> list[Result] | None:
    """What was measured before by the same protocol, under the label that it has now."""
    try:
        results = Results.model_validate_json(path.read_bytes()).results
    except (OSError, ValueError):
        return None
    if any(differ_from(result.score, benchmark) for result in results):
        return None
    return [Result(score=r.score.model_copy(update={"model": label}), values=r.values) for r in results]


def differ_from(score: Score, benchmark: Benchmark) -> list[str]:
    """The fields in which a figure's protocol is not the one by which the benchmark would be measured now."""
    known = {name: score.protocol.get(name) for name in benchmark.protocol}
    return find_differences(known, benchmark.protocol)


def warn_of_cut_prompts(results: list[Result], warn: "Warn") -> None:
    """Say so when prompts were longer than the model reads."""
    score = results[0].score
    if cut := score.protocol["cut_prompts"]:
        warn(f"{score.protocol['task']}: {cut} prompts are longer than {score.model} reads and lost their beginning")
