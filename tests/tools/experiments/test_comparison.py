"""Recipes compared: rows are what the workbench gives, made once, kept when interrupted, and shown as they are."""

import errno
import io
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from rich.console import Console

import tools.base.files
import tools.experiments.comparison
import tools.measure.continuations
import tools.results.comparison
import tools.surgery.published
import tools.workbench.curves
import tools.workbench.losses
import tools.workbench.open
from tests.comparisons import EVOLUTION_TOKENS, make_comparison, make_row, make_settings, run_comparison
from tests.tiny import save_tiny_model, tiny_settings
from tools.base.errors import DamagedArtifact, DiskFull, UserError
from tools.base.files import write_json
from tools.base.progress import ignore_progress
from tools.base.settings import TEAM
from tools.experiments.comparison import CompareSettings, compare
from tools.experiments.structure import StructureSettings, cut_model
from tools.experiments.structured_rows import MAKERS, take_parts
from tools.measure.losses import evaluate_windows
from tools.plans.allocate import allocate
from tools.plans.cuts import Counts
from tools.plans.jobs import PartsRecipe
from tools.plans.recipe import parse_recipe
from tools.plans.rules import WAYS_OF_PARTS
from tools.plans.work_order import order_allocation
from tools.results.comparison import Comparison, Row, describe
from tools.results.losses import Result
from tools.results.schema import Score, describe_protocol
from tools.statistics.collect import measure_kappa
from tools.surgery.flap import build_narrowed, rank_units
from tools.surgery.parts import Cut
from tools.surgery.published import drop_least, rank_blocks
from tools.surgery.rebuild import build_cut
from tools.surgery.slicegpt import build_sliced, slice_states
from tools.surgery.taylor import rank_by_gradient
from tools.team.worker import hash_weights
from tools.workbench.bench import Workbench
from tools.workbench.evaluate import Evaluator
from tools.workbench.layer_pruning import LayerPruner
from tools.workbench.open import close_workbench, use_workbench
from tools.workbench.profiles import Profiles
from tools.workbench.prune import Pruner

RECIPES = "magnitude:uniform,wanda:owl,two-sided:alphapruning,sparsegpt:kappa,wanda~dense:evolution"
SPARSITIES = "0.45,0.6,2:4"
TITLES = [
    *(f"{recipe} at {sparsity}" for sparsity in ("45%", "60%") for recipe in RECIPES.split(",")),
    *(f"{method}:uniform at 2:4" for method in ("magnitude", "wanda", "two-sided", "sparsegpt", "wanda~dense")),
]
GENERATION = 64 * (16 * 4 + (1 + 1) * 4)
"""Tokens: 16 children on 512 tokens, then the best and its parent on more, which are the 4 windows that there are."""

TASK = {"task": "mmlu", "version": "1", "shots": 0, "limit": 0, "dtype": "fp32", "chat_template": False}

MEASURED_ANEW = {"seconds", "allocation_seconds", "peak_memory_bytes"}


def read_comparison(directory: Path) -> Comparison:
    return Comparison.model_validate_json((directory / "compare.json").read_bytes())


def lasting(rows: list[Row]) -> list[dict[str, Any]]:
    """What must come out the same whenever it is measured."""
    return [row.model_dump(exclude=MEASURED_ANEW) for row in rows]


class Calls:
    """What a comparison asked the workbench's tools for, in order."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.evaluated: list[str] = []
        self.curves = 0
        patch.setattr(tools.workbench.losses, "evaluate_windows", self.evaluate)
        patch.setattr(tools.workbench.curves, "measure_kappa", self.measure)

    def evaluate(self, model: Any, windows_BT: Any, hidden: Any, label: str, *rest: Any, **options: Any) -> Any:
        self.evaluated.append(label)
        return evaluate_windows(model, windows_BT, hidden, label, *rest, **options)

    def measure(self, *arguments: Any) -> Any:
        self.curves += 1
        return measure_kappa(*arguments)


class Compared(NamedTuple):
    """One whole comparison."""

    settings: CompareSettings
    known: Comparison
    lines: list[str]
    calls: Calls


@pytest.fixture(scope="module")
def compared(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Compared:
    """All of RECIPES at all of SPARSITIES; read its directory, do not write to it."""
    settings = make_settings(
        tiny_llama, tmp_path_factory.mktemp("compared") / "out", recipes=RECIPES, sparsity=SPARSITIES
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tools.results.comparison, "plot_sparsity", lambda *_: None)
        calls = Calls(patch)
        known, lines = run_comparison(settings)
    close_workbench()
    torch.set_num_threads(threads)
    return Compared(settings, known, lines, calls)


@pytest.fixture
def copied(compared: Compared, tmp_path: Path) -> CompareSettings:
    """The whole comparison, in a directory of the test's own."""
    shutil.copytree(compared.settings.out, tmp_path / "out")
    return compared.settings.model_copy(update={"out": str(tmp_path / "out")})


def pick(compared: Compared, *titles: str) -> list[Row]:
    return [compared.known.rows[TITLES.index(title)] for title in titles]


# --- rows --------------------------------------------------------------------------------------------------------


def test_rows_are_what_the_workbench_gives(compared: Compared, tmp_path: Path, workbench_closed: None) -> None:
    settings, known = compared.settings, compared.known
    with use_workbench(settings, tmp_path / "run", pytest.fail, lambda *_: None) as bench:
        profile = bench.profile(lambda *_: None)
        assert profile == known.profile
        assert known.dense_perplexity == bench.profiles.read(profile).dense.perplexity
        for row in known.rows:
            if row.allocation == "evolution":
                continue
            recipe = parse_recipe(row.recipe).model_copy(update={"pattern": row.pattern})
            layers = bench.curves.describe_layers(profile, recipe, lambda *_: None)
            allocation = allocate(layers, row.sparsity, recipe, max_layer_sparsity=0.95)
            evaluation = bench.evaluator.evaluate(
                bench.pruner.prune(profile, order_allocation(recipe, allocation), lambda *_: None),
                "validation",
                profile,
                lambda *_: None,
            )
            zeros, weights = bench.weights.count_zeros()
            assert row.achieved_sparsity == zeros / weights
            assert (row.perplexity, row.kl) == (evaluation.perplexity, evaluation.mean_kl)
            assert row.kl_error == evaluation.kl_error
            assert row.protocol == describe_protocol(settings, "validation")


def test_every_row_is_made_once_in_the_order_asked_for_and_exact(compared: Compared) -> None:
    rows, weights = compared.known.rows, 15_360
    assert [f"{row.recipe} at {row.pattern or f'{row.sparsity:.0%}'}" for row in rows] == TITLES
    for row in rows:
        assert row.achieved_sparsity == (0.5 if row.pattern else round(row.sparsity * weights) / weights)
        assert row.dense_perplexity == compared.known.dense_perplexity
        assert row.peak_memory_bytes > 0 and row.seconds >= 0
    for row in rows[-5:]:
        assert (row.pattern, row.sparsity, row.allocation) == ("2:4", 0.5, "uniform")
    assert read_comparison(Path(compared.settings.out)) == compared.known


def test_the_dense_model_is_evaluated_once_and_first(compared: Compared) -> None:
    labels = [label for label in compared.calls.evaluated if label]  # a search's have none
    assert labels == ["dense validation", *["validation"] * len(TITLES)]


def test_curves_of_a_method_are_measured_once_for_all_sparsities(compared: Compared) -> None:
    assert compared.calls.curves == 1
    first, second = pick(compared, "sparsegpt:kappa at 45%", "sparsegpt:kappa at 60%")
    walk = 4 * 2 * 64  # two gradient windows: forward twice, and a backward for two
    assert first.evaluated_tokens == second.evaluated_tokens == 2 * walk


def test_tokens_are_those_of_the_allocation(compared: Compared) -> None:
    for row in compared.known.rows:
        if row.allocation == "evolution":
            assert row.evaluated_tokens == 2 * GENERATION <= EVOLUTION_TOKENS < 3 * GENERATION
            assert (row.generations, row.planned_generations, row.children) == (2, 400, 16)
        elif row.allocation != "kappa":
            assert row.evaluated_tokens == 0
        assert (row.generations is None) is (row.allocation != "evolution")


def test_one_plain_line_for_each_row_without_a_terminal(compared: Compared) -> None:
    lines = [
        line for line in compared.lines if not line.startswith("warning: wanda~dense:evolution selects on all of the ")
    ]
    assert len(compared.lines) == len(lines) + 2
    assert compared.known.reach
    assert lines[0] == f"dense: perplexity {compared.known.dense_perplexity:.2f}"
    assert len(lines) == len(TITLES) + 2
    assert lines[-1] == f"see {compared.settings.out}/compare.md"
    for line, title, row in zip(lines[1:], TITLES, compared.known.rows, strict=False):
        share = f"{row.achieved_sparsity * compared.known.reach.of_model:.2%} of the whole model"
        begin = (
            f"{title}: {row.achieved_sparsity:.2%} zeros, {share}, perplexity {row.perplexity:.2f}, KL {row.kl:.4f}, "
        )
        by = re.escape(f" by 2 of 400 generations of 16 children, {2 * GENERATION:,} tokens") if row.search else ""
        assert bool(row.search) is (row.allocation == "evolution")
        assert re.fullmatch(re.escape(begin) + rf"allocated in \d+\.\d s{by}, pruned in \d+\.\d s", line)


def test_a_budget_too_small_for_one_generation_leaves_it_uniform(
    copied: CompareSettings, workbench_closed: None, no_plot: None
) -> None:
    known = read_comparison(Path(copied.out))
    known.rows = []
    write_json(Path(copied.out) / "compare.json", known.model_dump())
    changes = {"evolution_tokens": GENERATION - 1, "recipes": "wanda:evolution,wanda~dense:uniform", "sparsity": "0.45"}
    searched, uniform = run_comparison(copied.model_copy(update=changes))[0].rows
    assert searched.evaluated_tokens == 0
    assert searched.perplexity == uniform.perplexity


def test_structured_rows_are_what_tools_structure_gives(
    tiny_llama: Path, tmp_path: Path, no_plot: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tools.measure.continuations, "REPEATS", 1)
    labels = ["structured:depth", "structured+refit:depth", "structured:equal", "structured+refit:equal"]
    settings = make_settings(tiny_llama, tmp_path / "out", recipes=",".join(labels), sparsity="0.5,2:4")
    try:
        known, lines = run_comparison(settings.model_copy(update={"recipes": ",".join(labels[:3])}))
        assert [row.recipe for row in known.rows] == labels[:3]
        first = known.rows
        known, lines = run_comparison(settings)
        assert known.rows[:3] == first, "none is made twice"
        with pytest.raises(
            UserError, match=r"^structured:equal at 97%: 0.97 is too much to remove: 70.00% is the most "
        ):
            run_comparison(settings.model_copy(update={"sparsity": "0.97", "recipes": "structured:equal"}))
        bench, measured = tools.workbench.open._open[0], 2 * 4 * 64
        assert bench.weights.count_zeros() == (0, 15_360), "the dense model is left as it was"
        wanted = StructureSettings.model_validate(
            tiny_settings(tiny_llama).model_dump(exclude=set(TEAM)) | {"remove": 0.5}
        )
        found = {
            name: cut_model(wanted.model_copy(update={"parts": parts, "out": str(tmp_path / name)}), lambda *_: None)
            for name, parts in (("depth", "blocks"), ("equal", "neurons,heads"))
        }
    finally:
        close_workbench()
    for row in known.rows:
        cut = found[row.allocation]
        perplexity = cut.cut.perplexity if row.method == "structured+refit" else cut.perplexity_without_refit
        kl = cut.kl if row.method == "structured+refit" else cut.kl_without_refit
        assert (row.achieved_sparsity, row.sparsity, row.pattern) == (cut.removed, 0.5, "")
        assert (row.perplexity, row.kl) == (perplexity, kl)
        assert row.dense_perplexity == cut.dense.perplexity
        assert row.protocol == describe_protocol(settings, "validation")
    assert [row.evaluated_tokens for row in known.rows] == [measured, measured, 0, 0]
    assert [line.partition(",")[0] for line in lines[1:5]] == [
        *("structured:depth at 50%: 50.00% removed", "structured+refit:depth at 50%: 50.00% removed"),
        *("structured:equal at 50%: 50.00% removed", "structured+refit:equal at 50%: 50.00% removed"),
    ]
    assert "Structured: the sparsity is the share" in (tmp_path / "out" / "compare.md").read_text()
    assert all(row.decoding_gain and row.decoding_gain > 0 for row in known.rows)
    page = (tmp_path / "out" / "compare.md").read_text()
    assert "| bytes | tokens/s |" in page
    for row in known.rows:
        cut = found[row.allocation]
        assert (row.dense_bytes, row.model_bytes) == (cut.dense.file_bytes, 4 * cut.cut.parameters), "fp32"
        assert row.model_bytes and row.dense_bytes and row.decoded_per_second and row.decoding_gain
        size = f"{row.model_bytes / 1e6:.1f} MB ({row.model_bytes / row.dense_bytes:.1%})"
        assert f"| {size} | {row.decoded_per_second:.1f} (× {row.decoding_gain:.2f}) |" in page


def test_a_row_of_flap_is_the_masked_model_of_the_dense_one(tiny_llama: Path, tmp_path: Path, no_plot: None) -> None:
    settings = make_settings(tiny_llama, tmp_path / "out", recipes="structured:flap", sparsity="0.45")
    try:
        (row,), lines = (made := run_comparison(settings))[0].rows, made[1]
        bench = tools.workbench.open._open[0]
        assert bench.weights.count_zeros() == (0, 15_360), "the dense model is left as it was"
        ranking = rank_units(bench.model, 0.45, bench.windows.calibration, ignore_progress)
        model = build_narrowed(bench.model, ranking.narrowed)
        evaluation = bench.evaluator.evaluate_other(model, made[0].profile, ignore_progress)
    finally:
        close_workbench()
    assert (row.perplexity, row.kl) == (evaluation.perplexity, evaluation.mean_kl)
    assert row.achieved_sparsity == ranking.removed
    assert row.dense_bytes and row.model_bytes == row.dense_bytes - 4 * round(ranking.removed * 15_360)
    assert (row.allocation, row.evaluated_tokens, row.scores) == ("flap", 0, [])
    assert abs(row.achieved_sparsity - 0.45) <= 0.05 and row.perplexity != row.dense_perplexity
    assert lines[1].startswith(f"structured:flap at 45%: {row.achieved_sparsity:.2%} removed, ")


def test_rows_of_other_cuts_as_published(tiny_llama: Path, tmp_path: Path, no_plot: None) -> None:
    assert MAKERS.keys() == WAYS_OF_PARTS.keys()
    labels = "structured:shortgpt,structured:llm-pruner,structured:slicegpt,structured:sleb"
    settings = make_settings(tiny_llama, tmp_path / "out", recipes=labels, sparsity="0.5")
    try:
        with pytest.raises(UserError, match=r"^structured:sleb at 50%: SLEB keeps the first and the last block: of 2 "):
            run_comparison(settings)
        bench = tools.workbench.open._open[0]
        assert bench.weights.count_zeros() == (0, 15_360), "the dense model is left as it was"
        known = read_comparison(Path(settings.out))
        dense, calibration = bench.model, bench.windows.calibration
        dropped = drop_least(rank_blocks(dense, calibration, ignore_progress), 1)
        ranking = rank_by_gradient(dense, 0.5, calibration, ignore_progress)
        sliced = slice_states(dense, 0.5, calibration, ignore_progress)
        models = [
            build_cut(dense, Cut(Counts(blocks=1), [], tuple(dropped))),
            build_narrowed(dense, ranking.narrowed),
            build_sliced(dense, sliced),
        ]
        found = [bench.evaluator.evaluate_other(model, known.profile, ignore_progress) for model in models]
    finally:
        close_workbench()
    assert [(row.recipe, row.perplexity, row.kl) for row in known.rows] == [
        (label, evaluation.perplexity, evaluation.mean_kl)
        for label, evaluation in zip(labels.split(","), found, strict=False)
    ]
    assert [row.achieved_sparsity for row in known.rows] == [0.5, ranking.removed, sliced.removed]


def test_whole_parts_are_not_taken_away_from_a_streamed_model(tiny_llama: Path, tmp_path: Path) -> None:
    with use_workbench(tiny_settings(tiny_llama, device="stream"), tmp_path, pytest.fail, ignore_progress) as bench:
        for name in MAKERS:
            with pytest.raises(UserError, match=f"^structured:{name} needs the whole model on one device; use another"):
                take_parts(PartsRecipe(name, ("blocks",), refit=False), 0.3, bench, ignore_progress)
    close_workbench()


def test_blocks_that_went_are_not_searched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_tiny_model(tmp_path / "deep", "llama", num_hidden_layers=5)
    settings = tiny_settings(model)
    measured, warnings = list[int](), list[str]()
    measure = tools.surgery.published.measure_without

    def record(blocks: Any, dropped: list[int], *arguments: Any, **options: Any) -> Any:
        measured.append(len(dropped))
        return measure(blocks, dropped, *arguments, **options)

    monkeypatch.setattr(tools.surgery.published, "measure_without", record)
    recipe = PartsRecipe("sleb", ("blocks",), refit=False)

    def make(sparsity: float, directory: Path) -> tuple[str, int, list[int]]:
        measured.clear()
        with use_workbench(settings, directory, warnings.append, ignore_progress) as bench:
            made = take_parts(recipe, sparsity, bench, ignore_progress)
        assert made.seconds > 0
        return hash_weights(made.model), made.tokens, list(measured)

    one, two = make(0.2, tmp_path / "run"), make(0.4, tmp_path / "run")
    assert (one[1:], two[1:]) == ((3 * 4 * 64, [1, 1, 1]), (5 * 4 * 64, [2, 2])), "the first block was kept"
    assert make(0.4, tmp_path / "anew") == (*two[:2], [1, 1, 1, 2, 2])
    assert make(0.2, tmp_path / "anew") == (*one[:2], [])
    assert warnings == []
    path = tmp_path / "anew" / "search-structured-sleb.json"
    path.write_text(path.read_text().replace("order", "other"))
    assert make(0.2, tmp_path / "anew") == one
    assert warnings == [f"{path} is damaged; the search begins anew"]


# --- going on ----------------------------------------------------------------------------------------------------


def test_what_is_done_is_shown_without_loading_anything(
    copied: CompareSettings, compared: Compared, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tools.experiments.comparison, "use_workbench", pytest.fail)
    (Path(copied.out) / "compare.md").unlink()  # as if killed between two files
    known, lines = run_comparison(copied)
    assert known == compared.known
    made = [line for line in compared.lines[:-1] if not line.startswith("warning: ")]
    assert lines == [*made, f"see {copied.out}/compare.md"]
    assert (Path(copied.out) / "compare.md").read_text(encoding="utf-8") == describe(known)


def test_only_new_rows_are_made(
    copied: CompareSettings,
    compared: Compared,
    monkeypatch: pytest.MonkeyPatch,
    workbench_closed: None,
    no_plot: None,
) -> None:
    calls = Calls(monkeypatch)
    known, lines = run_comparison(
        copied.model_copy(update={"recipes": "wanda:uniform,sparsegpt:kappa", "sparsity": "0.45,0.3"})
    )
    assert known.rows[: len(TITLES)] == compared.known.rows
    assert [(row.recipe, row.sparsity) for row in known.rows[len(TITLES) :]] == [
        *(("wanda:uniform", 0.45), ("wanda:uniform", 0.3), ("sparsegpt:kappa", 0.3))
    ]
    assert calls.evaluated == ["validation"] * 3 and calls.curves == 0
    assert [line.partition(":  ")[0].split(": ")[0] for line in lines[1:-1]] == [
        *("sparsegpt:kappa at 45%", "wanda:uniform at 45%", "wanda:uniform at 30%", "sparsegpt:kappa at 30%")
    ]


@pytest.mark.parametrize(
    ("owner", "name", "count", "rows_done"),
    [
        (Evaluator, "evaluate", 2, 1),
        (LayerPruner, "compute", 20, 1),
        (Evaluator, "measure_kl_each", 4, 2),  # in the second generation
        (Profiles, "_measure_dense", 1, 0),
        (tools.results.comparison, "as_csv", 3, 2),
    ],
    ids=["evaluate", "prune", "search", "profile", "write"],
)
def test_interrupted_is_as_uninterrupted(
    owner: Any,
    name: str,
    count: int,
    rows_done: int,
    compared: Compared,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    workbench_closed: None,
    no_plot: None,
) -> None:
    changes = {"recipes": "magnitude:uniform,sparsegpt:kappa,wanda~dense:evolution", "sparsity": "0.45"}
    settings = compared.settings.model_copy(update={"out": str(tmp_path / "out"), **changes})
    target, calls = getattr(owner, name), 0

    def interrupt(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count:
            raise KeyboardInterrupt
        return target(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_comparison(settings)
    if rows_done:
        assert len(read_comparison(tmp_path / "out").rows) == rows_done
    close_workbench()
    known, _ = run_comparison(settings)
    whole = pick(compared, *(f"{recipe} at 45%" for recipe in changes["recipes"].split(",")))
    assert lasting(known.rows) == lasting(whole)
    assert (known.profile, known.dense_perplexity) == (compared.known.profile, compared.known.dense_perplexity)


@pytest.mark.parametrize(("broken", "prunings"), [(1, 2), (2, 2)], ids=["dense", "row"])
def test_nothing_is_pruned_again_whose_tasks_were_broken_off(
    broken: int,
    prunings: int,
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    workbench_closed: None,
    no_plot: None,
) -> None:
    """The model of each task's question is told by its zeros."""
    asked, pruned, prune = [], [], Pruner.prune

    def ask(_benchmark: Any, model: Any, _tokenizer: Any, label: str, _progress: Any) -> list[Any]:
        asked.append(label)
        if len(asked) == broken:
            raise KeyboardInterrupt
        zeros = sum(int((parameter == 0).sum()) for parameter in model.parameters())
        score = Score(model=label, task="mmlu", metric="acc", value=zeros, error=0.0, samples=1, protocol=TASK)
        return [Result(score=score, values=[float(zeros)])]

    def record(bench: Workbench, profile: str, order: Any, progress: Any) -> str:
        pruned.append(order.id)
        return prune(bench, profile, order, progress)

    monkeypatch.setattr(tools.experiments.comparison, "load_benchmarks", lambda *_: ["mmlu"])
    monkeypatch.setattr(tools.experiments.comparison, "run_benchmark", ask)
    monkeypatch.setattr(Pruner, "prune", record)
    settings = make_settings(tiny_llama, tmp_path / "out", recipes="magnitude:uniform,wanda:uniform", sparsity="0.45")
    with pytest.raises(KeyboardInterrupt):
        run_comparison(settings)
    close_workbench()
    profile = read_comparison(tmp_path / "out").profile
    known, _ = run_comparison(settings)
    assert asked.count("dense") == (2 if broken == 1 else 1)
    assert len(pruned) == len(set(pruned)) == prunings
    assert known.profile == profile and read_comparison(tmp_path / "out").unasked is None
    kept = [{"mmlu acc": [row.scores[0].value]} for row in known.rows]
    assert [row.answers for row in read_comparison(tmp_path / "out").rows] == kept and known.dense_answers
    zeros = [scores[0].value for scores in [known.dense_scores, *(row.scores for row in known.rows)]]
    assert zeros[0] < zeros[1] == zeros[2]
    close_workbench()
    whole, _ = run_comparison(settings.model_copy(update={"out": str(tmp_path / "whole")}))
    assert lasting(whole.rows) == lasting(known.rows) and whole.dense_scores == known.dense_scores


def test_tasks_are_asked_of_rows_that_were_made_without_any(
    copied: CompareSettings, compared: Compared, monkeypatch: pytest.MonkeyPatch, workbench_closed: None, no_plot: None
) -> None:
    asked = []

    def ask(_benchmark: Any, _model: Any, _tokenizer: Any, label: str, _progress: Any) -> list[Any]:
        asked.append(label)
        score = Score(model=label, task="mmlu", metric="acc", value=0.5, error=0.0, samples=1, protocol=TASK)
        return [Result(score=score, values=[0.5])]

    monkeypatch.setattr(tools.experiments.comparison, "load_benchmarks", lambda *_: ["mmlu"])
    monkeypatch.setattr(tools.experiments.comparison, "run_benchmark", ask)
    monkeypatch.setattr(Workbench, "profile", lambda *_, **__: pytest.fail("there is one"))
    tasks = {"tasks": ["mmlu"], "mmlu": "file:mmlu", "shots": 0}
    before = compared.known.rows[0]
    known, _ = run_comparison(copied.model_copy(update={"recipes": before.recipe, "sparsity": "0.45", **tasks}))
    assert asked == ["dense", TITLES[0]] and known.dense_scores and known.settings["tasks"] == ["mmlu"]
    row = known.rows[-1]
    assert len(row.scores) == 1 and not before.scores
    assert lasting([row.model_copy(update={"scores": [], "answers": {}})]) == lasting([before])
    assert len(known.rows) == len(compared.known.rows) and not any(other.scores for other in known.rows[:-1])
    with pytest.raises(UserError, match=r"holds a comparison with other settings \(shots\); choose another --out$"):
        run_comparison(copied.model_copy(update=tasks | {"shots": 5}))


# --- rows that cannot be, and bad input --------------------------------------------------------------------------


def test_rows_that_cannot_be_lose_no_others(
    copied: CompareSettings, compared: Compared, workbench_closed: None, no_plot: None
) -> None:
    console = Console(file=io.StringIO())
    changes = {"recipes": "wanda:uniform,magnitude:evolution", "sparsity": "0.97,3:9,0.3"}
    with pytest.raises(UserError) as refusal:
        compare(copied.model_copy(update=changes), console)
    bounds = "bounds and protected layers allow at most 95.05% sparsity, but 97.00% is asked"
    assert str(refusal.value) == f"wanda:uniform at 97%: {bounds} (and 3 more, warned of above)"
    told = [line for line in console.file.getvalue().splitlines() if line.startswith("warning: ")]
    warnings = [line for line in told if "evolution selects on all of the 256 calibration tokens" not in line]
    assert len(told) == len(warnings) + 2, "once for each search that there may be"
    assert warnings[:2] == [f"warning: {recipe} at 97%: {bounds}" for recipe in changes["recipes"].split(",")]
    assert warnings[2].startswith("warning: wanda:uniform at 3:9: ") and "not divisible into groups of 9" in warnings[2]
    assert len(warnings) == 4
    rows = read_comparison(Path(copied.out)).rows
    assert rows[: len(TITLES)] == compared.known.rows
    assert [(row.recipe, row.sparsity) for row in rows[len(TITLES) :]] == [
        *(("wanda:uniform", 0.3), ("magnitude:evolution", 0.3))
    ]


def test_other_settings_are_named(tmp_path: Path) -> None:
    settings = make_settings("no-model", tmp_path)
    write_json(tmp_path / "compare.json", make_comparison(settings, make_row("wanda:evolution")).model_dump())
    before = (tmp_path / "compare.json").read_bytes()
    search = {"evolution": "full", "evolution_tokens": 5}
    changed = make_settings("no-model", tmp_path, window=32, seed=1, recipes="wanda:owl", **search)
    with pytest.raises(UserError) as refusal:
        run_comparison(changed)
    assert str(refusal.value) == (
        f"{tmp_path} holds a comparison with other settings (evolution, evolution_tokens, seed, window); "
        "choose another --out"
    )
    assert (tmp_path / "compare.json").read_bytes() == before


@pytest.mark.parametrize(
    ("now", "dropped"), [({"text": {"a": "pydoc", "b": "pydoc"}}, "text_weights"), ({}, "text, text_weights")]
)
def test_settings_that_are_left_out_now_are_other_ones(now: dict[str, Any], dropped: str, tmp_path: Path) -> None:
    named = {"text": {"a": "pydoc", "b": "pydoc"}, "text_weights": {"a": 9, "b": 1}}
    settings = make_settings("no-model", tmp_path, **named)
    write_json(tmp_path / "compare.json", make_comparison(settings, make_row("wanda:uniform")).model_dump())
    with pytest.raises(UserError, match=rf"with other settings \({dropped}\); choose another --out$"):
        run_comparison(make_settings("no-model", tmp_path, **now))


def test_the_budget_of_searches_may_change_until_there_is_one(tmp_path: Path, no_plot: None) -> None:
    changes = {"recipes": "wanda:uniform", "sparsity": "0.5"}
    settings = make_settings("no-model", tmp_path, **changes)
    write_json(tmp_path / "compare.json", make_comparison(settings, make_row()).model_dump())
    other = make_settings("no-model", tmp_path, evolution="full", evolution_tokens=5, **changes)
    known, _ = run_comparison(other)
    for found in (known, read_comparison(tmp_path)):
        assert (found.settings["evolution"], found.settings["evolution_tokens"]) == ("full", 5)


def test_a_comparison_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "compare.json").write_text('{"rows": 3')
    with pytest.raises(UserError, match=rf"^{tmp_path}/compare\.json is damaged: it is not JSON; put it back"):
        run_comparison(make_settings("no-model", tmp_path))


@pytest.mark.parametrize("below", ["", "below"])
def test_an_output_that_is_a_file(below: str, tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(
        UserError, match=rf"^--out {tmp_path}/file\S* cannot be written: (Not a directory|File exists)$"
    ):
        run_comparison(make_settings(tiny_llama, tmp_path / "file" / below))
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model": "./nowhere"}, "model './nowhere' is neither a directory"),
        ({"validation": "file:missing.txt"}, "text file missing.txt does not exist"),
    ],
)
def test_a_model_or_text_that_is_not_there_leaves_nothing_behind(
    changes: dict[str, str], sentence: str, tiny_llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=re.escape(sentence)):
        run_comparison(make_settings(**{"model": tiny_llama, "out": tmp_path / "out", **changes}))
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_profile_is_named(
    copied: CompareSettings, compared: Compared, workbench_closed: None, no_plot: None
) -> None:
    profile = compared.known.profile
    path = Path(copied.out) / "work" / "artifacts" / profile[:2] / f"{profile}.json"
    path.write_text(path.read_text() + " ")
    with pytest.raises(DamagedArtifact, match=rf"^artifact {path} is damaged"):
        run_comparison(copied.model_copy(update={"recipes": "wanda:uniform"}))
    assert read_comparison(Path(copied.out)) == compared.known


def test_a_full_disk_is_named_and_the_row_is_kept(
    copied: CompareSettings, monkeypatch: pytest.MonkeyPatch, workbench_closed: None, no_plot: None
) -> None:
    write = Path.write_bytes

    def fill(path: Path, content: bytes) -> int:
        if path.name.startswith(".compare.md"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", fill)
        with pytest.raises(DiskFull, match=r"^the disk is full \(\d+ MB free\) while writing \S+/compare\.md; "):
            run_comparison(copied.model_copy(update={"recipes": "wanda:uniform", "sparsity": "0.45"}))
    assert read_comparison(Path(copied.out)).rows[-1].recipe == "wanda:uniform"


def test_yaml_may_hold_lists_and_numbers() -> None:
    given = CompareSettings.model_validate({"recipes": ["wanda:owl", "refit:kappa"], "sparsity": [0.45, "2:4"]})
    assert (given.recipes, given.sparsity) == ("wanda:owl,refit:kappa", "0.45,2:4")
    assert CompareSettings.model_validate({"sparsity": 0.6}).sparsity == "0.6"


def test_what_a_recipe_leaves_of_the_facts(tiny_llama: Path, tmp_path: Path, no_plot: None) -> None:
    source = tmp_path / "questions.jsonl"
    source.write_text("\n".join(f'{{"question": "Which is number {i}?", "answer": "class"}}' for i in range(8)))
    settings = make_settings(tiny_llama, tmp_path / "out").model_copy(
        update={"recipes": "magnitude:uniform,structured:flap", "questions": f"file:{source}", "question_pairs": 4}
    )
    known, _ = run_comparison(settings.model_copy(update={"sparsity": "0.6"}))
    said = (tmp_path / "out" / "compare.md").read_text()
    for row in known.rows:
        assert row.fact_retention is not None and row.fact_retention != 1 and row.fact_error is not None
        assert f"| {row.fact_retention:.1%} ± {row.fact_error:.1%} |" in said
    assert len(known.rows) == 2
    assert f"on 4 questions of `file:{source}`." in said


def test_questions_that_rows_may_be_fitted_to_are_not_asked_as_a_task(tiny_llama: Path, tmp_path: Path) -> None:
    source = tmp_path / "questions.jsonl"
    source.write_text("\n".join(f'{{"question": "Which is number {i}?", "answer": "class"}}' for i in range(12)))
    asked = {
        "questions": f"file:{source}",
        "question_pairs": 4,
        "tasks": ["freebaseqa"],
        "freebaseqa": f"file:{source}",
    }
    settings = make_settings(tiny_llama, tmp_path / "out").model_copy(update={**asked, "shots": 0})
    with pytest.raises(
        UserError, match=r"^freebaseqa would ask 8 questions that plans are judged by or may be fitted to, "
    ):
        run_comparison(settings)
    assert not (tmp_path / "out").exists()


def test_a_polish_behind_the_row_that_it_stands_on_prunes_no_layer_again(
    tiny_llama: Path, tmp_path: Path, no_plot: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pruned: list[str] = []
    compute = LayerPruner.compute

    def watch(self: LayerPruner, name: str, *args: Any) -> str:
        pruned.append(name)
        return compute(self, name, *args)

    monkeypatch.setattr(LayerPruner, "compute", watch)
    alone, _ = run_comparison(make_settings(tiny_llama, tmp_path / "alone", recipes="two-sided+polish128"))
    layers = len(pruned)
    recipes = "two-sided,two-sided+polish64,two-sided+polish128,wanda,two-sided+polish192"
    known, _ = run_comparison(make_settings(tiny_llama, tmp_path / "all", recipes=recipes))
    assert len(pruned) == layers * (1 + 3), "two-sided, wanda, and what stands behind another row"
    plain, first, second, _, _ = known.rows
    assert (second.perplexity, second.kl) == (alone.rows[0].perplexity, alone.rows[0].kl), "the same model"
    for row in (first, second):
        assert row.polished is not None and row.seconds >= plain.seconds + row.polished.seconds - 0.1


def test_a_row_with_a_polish_says_on_how_many_tokens_and_in_how_many_seconds(
    tiny_llama: Path, tmp_path: Path, no_plot: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tools.polish.loop.RATE", 3e-3)
    settings = make_settings(
        tiny_llama, tmp_path / "out", recipes="two-sided:kappa,two-sided+polish:kappa", polish_tokens=128
    )
    known, lines = run_comparison(settings)
    plain, row = known.rows
    assert (row.recipe, row.method) == ("two-sided+polish128:kappa", "two-sided+polish128")
    assert plain.polished is None and row.polished is not None and row.polished.helped
    assert plain.kl is not None and row.kl is not None and row.kl < plain.kl
    assert row.achieved_sparsity == plain.achieved_sparsity and row.polished.tokens == 128
    assert row.evaluated_tokens - plain.evaluated_tokens == 64 * (4 * 2 + 1 * 2 + 3)
    told = f"polished on 128 tokens (held-out KL {row.polished.before:.4f} → {row.polished.after:.4f})"
    assert lines[-2].endswith(f" s, {told}") and "polish" not in lines[-3]
    assert f"| 128 tokens, {row.polished.seconds:.1f} s |" in describe(known)
    more = settings.model_copy(update={"polish_tokens": 0, "recipes": "two-sided+polish128:kappa"})
    assert lasting(run_comparison(more)[0].rows) == lasting(known.rows), "--polish-tokens is no part of what was kept"
    with pytest.raises(UserError, match=r"^polish on 32 tokens is less than one window of 64; give it more$"):
        run_comparison(make_settings(tiny_llama, tmp_path / "few", recipes="wanda+polish32"))
