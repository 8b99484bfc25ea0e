"""What models are asked: tasks of lm-evaluation-harness and of our own, with their questions and their protocol.

benchmarks = load_benchmarks(settings, "fp32")  # all that can be wrong with the input is told here

The harness is an extra (`[eval]`) and imported only where it is used.
"""

import difflib
import functools
import importlib
import importlib.util
import logging
import pkgutil
from collections.abc import Callable, Iterator
from importlib.metadata import version
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from tools.base.errors import UserError, in_one_line
from tools.base.files import hash_file
from tools.base.hub import look_at_hub
from tools.base.settings import TaskSettings, WorkbenchSettings
from tools.measure import tasks
from tools.results.losses import find_differences
from tools.results.schema import Score
from tools.texts.questions import Question, split_questions


class OwnTask(NamedTuple):
    """A task that lm-evaluation-harness lacks, or whose questions a setting chooses.

    A leaf of the harness' task, which holds questions, may have two methods that the harness does not know:
    `meet_model(lm)` is called before it is asked, and what `describe_metric(metric)` returns is in the protocol of that
    figure.
    """

    sentence: str
    """What it asks, without a full stop."""
    check: Callable[[TaskSettings], object]
    """Refuses, before anything is loaded, what cannot be asked; raises UserError. Imports neither harness nor torch."""
    load: Callable[[TaskSettings], tuple[Any, Any]]
    """(the harness' task, group or list of tasks; where its questions come from: hub, or the hash of each file)."""
    read_questions: Callable[[TaskSettings], Iterator[Question]] | None = None
    """The questions after the exemplars, in order, where a run may judge plans by the same ones."""


@functools.cache
def find_own_tasks() -> dict[str, OwnTask]:
    """All of them by name, in the order of the alphabet."""
    names = sorted(module.name for module in pkgutil.iter_modules(tasks.__path__))
    return {name: importlib.import_module(f"{tasks.__name__}.{name}").TASK for name in names}


def hash_files(*paths: Path) -> dict[str, str]:
    """What a protocol says of questions from files: their names, and the hash of each."""
    return {path.name: hash_file(path) for path in paths}


SEED = 1234
"""The harness' default, for tasks that draw their exemplars."""

PACKAGES = ("torch", "transformers", "lm-eval", "datasets")


class Benchmark(NamedTuple):
    """A task with its questions."""

    name: str
    task: Any
    """A task, group or list of tasks of the harness."""
    protocol: dict[str, Any]
    """What is known of the protocol before any model is asked."""


def load_benchmarks(settings: TaskSettings, dtype: str) -> list[Benchmark]:
    """The tasks asked for, with their questions. Raises UserError in one line for whatever cannot be asked."""
    if not settings.tasks:
        return []
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("tasks need lm-evaluation-harness, which is not installed; try: pip install 'lm-eval>=0.4.13'")
    own = find_own_tasks()
    for name in own:
        if name in settings.tasks:
            own[name].check(settings)
    if not own.keys() >= set(settings.tasks):
        _refuse_unknown_tasks(settings.tasks)
    _hush_harness()
    benchmarks = [_load_benchmark(name, settings, dtype) for name in settings.tasks]
    asked: dict[str, str] = {}
    for benchmark in benchmarks:
        for name in group_leaves(benchmark):
            if name in asked:
                raise UserError(f"task {name} is asked by {asked[name]} and by {benchmark.name}; leave one of them out")
            asked[name] = benchmark.name
    return benchmarks


def refuse_shared_questions(settings: TaskSettings, loop: WorkbenchSettings) -> None:
    """Raises UserError when a task would ask what the plans of a run are judged by or may be fitted to."""
    for name, task in find_own_tasks().items():
        if not loop.questions or name not in settings.tasks or task.read_questions is None:
            continue
        parts = split_questions(loop.questions, loop.question_pairs, loop.text_cut)
        used = {q.question.casefold() for q in chain(parts.validation, parts.rest)}
        asked = islice(task.read_questions(settings), settings.limit or None)
        if shared := [q.question for q in asked if q.question.casefold() in used]:
            raise UserError(
                f"{name} would ask {len(shared)} questions that plans are judged by or may be fitted to, such as "
                f"{shared[0][:100]!r}; choose another --{name} or a smaller --limit"
            )


@functools.cache
def _index_tasks() -> Any:
    """All tasks of the harness by name; reading their files takes it some ten seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _refuse_unknown_tasks(names: list[str]) -> None:
    known = {*find_own_tasks(), *_index_tasks().all_tasks}
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else "see: lm_eval ls tasks"
            raise UserError(f"task {name!r} is not one of lm-evaluation-harness; {hint}")


@functools.cache
def _hush_harness() -> None:
    """No bars and no log of the harness' own: it has no switch for the first, and nothing in the second is for users
    but what `tools.measure.harness` hears.
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
    leaves = list_leaves(task)
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
    """(the harness' task, where its questions come from)."""
    if own := find_own_tasks().get(name):
        return own.load(settings)
    look_at_hub()
    loaded = _index_tasks().load([name])
    return loaded["groups"].get(name) or list(loaded["tasks"].values()), "hub"


def list_leaves(task: Any) -> list[Any]:
    """The tasks that hold questions."""
    if isinstance(task, list):
        return task
    return list(task.get_all_tasks()) if hasattr(task, "get_all_tasks") else [task]


def group_leaves(benchmark: Benchmark) -> dict[str, list[Any]]:
    """The tasks that hold questions, by the names that figures of them have: all together where the group has one."""
    leaves = list_leaves(benchmark.task)
    whole = hasattr(benchmark.task, "get_all_groups") and benchmark.task.has_aggregation
    return {benchmark.name: leaves} if whole else {leaf.task_name: [leaf] for leaf in leaves}


def _set_shots(leaf: Any, shots: int) -> None:
    """As the harness' own --num_fewshot: a task that says 0 itself is always asked without exemplars."""
    if leaf.config.num_fewshot != 0:
        leaf.set_config("num_fewshot", shots)
    sampler = getattr(leaf, "sampler", None)
    if sampler is not None and len(sampler.df) < leaf.config.num_fewshot:
        raise UserError(f"task {leaf.task_name} has {len(sampler.df)} exemplars, but {shots} shots were asked for")


def differ_from(score: Score, benchmark: Benchmark) -> list[str]:
    """The fields in which a figure's protocol is not the one by which the benchmark would be measured now."""
    known = {name: score.protocol.get(name) for name in benchmark.protocol}
    return find_differences(known, benchmark.protocol)
