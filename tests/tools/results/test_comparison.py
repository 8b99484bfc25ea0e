"""A comparison's tables, description, plot and files."""

import csv
import io
import math
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import matplotlib.image
from rich.console import Console

from tests.comparisons import make_comparison, make_row, make_settings, run_comparison
from tools.base.console import show_bars
from tools.base.files import write_json
from tools.experiments.comparison import compare
from tools.plans.jobs import ALL_ALLOCATIONS, ALL_METHODS, list_jobs
from tools.plans.recipe import parse_recipe
from tools.results.comparison import REFERENCE, describe, group_rows, rank_recipes, relative_degradation
from tools.results.losses import Evaluation
from tools.results.sparsity_curve import LABELLED


def test_the_reference_is_sparsegpt_as_its_authors_run_it() -> None:
    assert parse_recipe(REFERENCE).statistics == "sequential"


def test_degradations_are_multiples_of_uniform_sparsegpts() -> None:
    reference = make_row("sparsegpt:uniform", perplexity=14.0)
    others = [make_row("refit:kappa", perplexity=11.0), make_row("refit:owl", perplexity=9.0)]
    rows = [reference, *others, make_row("refit:kappa", 0.6), make_row("wanda:owl", perplexity=None, kl=None)]
    patterned = [
        make_row("sparsegpt:uniform", pattern="2:4", perplexity=20.0),
        make_row(pattern="2:4", perplexity=15.0),
    ]
    found = [relative_degradation(row, rows + patterned) for row in rows + patterned]
    assert found == [1.0, 0.25, -0.25, None, None, 1.0, 0.5]
    for useless in (None, 10.0, 9.5):
        same = [make_row("sparsegpt:uniform", perplexity=useless), others[0]]
        assert relative_degradation(others[0], same) is None


def test_rows_are_grouped_by_sparsity_best_first() -> None:
    rows = [
        *(make_row("a:owl", 0.6, perplexity=20.0), make_row("b:owl", 0.6, perplexity=None)),
        *(make_row("a:owl", 0.455, perplexity=12.0), make_row("b:owl", 0.455, perplexity=11.0)),
        *(make_row("c:uniform", 0.5, pattern="2:4"), make_row("c:owl", 0.6, perplexity=19.0)),
    ]
    groups = [(name, [row.recipe for row in members]) for name, members in group_rows(rows)]
    assert groups == [("45.5%", ["b:owl", "a:owl"]), ("2:4", ["c:uniform"]), ("60%", ["c:owl", "a:owl", "b:owl"])]
    assert rank_recipes(rows) == ["c:uniform", "c:owl", "b:owl", "a:owl"]  # mean places 0, 0, 1 and 1


def test_the_description_says_what_was_measured(tmp_path: Path) -> None:
    settings = make_settings("models/my_llama", tmp_path, gradient_windows=8)
    rows = (
        make_row("sparsegpt:uniform", perplexity=14.0),
        make_row("refit:kappa", perplexity=11.0, evaluated_tokens=65_536, allocation_seconds=2.25),
        make_row("wanda:owl", perplexity=None, kl=None, kl_error=None),
    )
    lines = describe(make_comparison(settings, *rows)).splitlines()
    assert lines[0] == r"# models/my\_llama: recipes compared"
    assert lines[2] == (
        "Perplexity on 192 tokens of `pydoc` in windows of 64, fp32; dense: 10.00. Statistics from 4 windows of "
        "`pydoc`, gradients from 4 of them (2.0 s with the dense model's perplexity, shared by all rows)."
    )
    assert lines[-7:] == [
        "## 50%",
        "",
        "| recipe | sparsity | of the model | perplexity | × SparseGPT | KL | prune s | allocate s | tokens |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
        "| `refit:kappa` | 50.00% | 40.00% | 11.00 | 0.25 | 0.2500 ± 0.0100 | 1.5 | 2.2 | 65,536 |",
        "| `sparsegpt:uniform` | 50.00% | 40.00% | 14.00 | 1.00 | 0.2500 ± 0.0100 | 1.5 | 0.0 | 0 |",
        "| `wanda:owl` | 50.00% | 40.00% | not finite |  | not finite | 1.5 | 0.0 | 0 |",
    ]


def test_rows_are_told_behind_the_first_window_by_window(tmp_path: Path) -> None:
    first = make_row("refit:kappa", losses=Evaluation(nll=[2.0, 3.0], kl=[0.1, 0.3]), perplexity=math.exp(2.5))
    other = make_row("refit:owl", losses=Evaluation(nll=[2.1, 3.3], kl=[0.2, 0.6]), perplexity=math.exp(2.7))
    broken = make_row("wanda:owl", losses=Evaluation(nll=[None, 3.0], kl=[None, 0.3]), perplexity=None, kl=None)
    earlier = make_row("wanda:uniform", perplexity=20.0)
    known = make_comparison(make_settings("no-model", tmp_path), broken, other, earlier, first)
    lines = describe(known).splitlines()
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| ")]
    place = table[0].index("behind the first")
    assert {cells[0]: cells[place] for cells in table[1:]} == {
        "`refit:kappa`": "",
        # e^0.2, and 0.1 of standard error of the logarithm; KL is 0.1 and 0.3 higher
        "`refit:owl`": "+22.1% ± 12.2%, KL +0.2000 ± 0.1000",
        "`wanda:uniform`": "",
        "`wanda:owl`": "",
    }
    assert "Behind the first: by how much perplexity" in "\n".join(lines)
    known.rows = [first, earlier]  # nothing to pair
    assert "behind the first" not in describe(known).lower()


def test_rows_of_a_search_say_how_long_it_was(tmp_path: Path) -> None:
    counts = {"generations": 3, "planned_generations": 400, "children": 16, "evaluated_tokens": 98_304}
    rows = make_row("wanda~dense:evolution", **counts), make_row("wanda:owl", perplexity=13.0)
    said = describe(make_comparison(make_settings("no-model", tmp_path), *rows))
    assert "Search: generations done, of those of EvoPress's setting (arXiv 2410.14649); " in said
    assert said.splitlines()[-4:] == [
        "| recipe | sparsity | of the model | perplexity | × SparseGPT | KL | prune s | allocate s | tokens | search |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
        "| `wanda~dense:evolution` | 50.00% | 40.00% | 12.50 |  | 0.2500 ± 0.0100 | 1.5 | 0.0 | 98,304 | "
        "3 of 400 generations of 16 children, 98,304 tokens |",
        "| `wanda:owl` | 50.00% | 40.00% | 13.00 |  | 0.2500 ± 0.0100 | 1.5 | 0.0 | 0 |  |",
    ]
    earlier = describe(make_comparison(make_settings("no-model", tmp_path), make_row("wanda~dense:evolution")))
    assert "| search |" not in earlier and "Search: " not in earlier


def test_all_files_are_written_and_can_be_read(tmp_path: Path) -> None:
    settings = make_settings("no-model", tmp_path, recipes="wanda:uniform,refit:kappa", sparsity="0.5,0.6,2:4")
    rows = [
        *(make_row(), make_row("refit:kappa", perplexity=11.0), make_row(sparsity=0.6, perplexity=None, kl=None)),
        make_row("refit:kappa", 0.6),
        *(make_row(pattern="2:4"), make_row("refit:uniform", pattern="2:4", perplexity=11.5)),
    ]
    write_json(tmp_path / "compare.json", make_comparison(settings, *rows).model_dump())
    known, _ = run_comparison(settings)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [*(f"compare.{kind}" for kind in ("csv", "json", "md", "png", "svg")), "work"]
    with (tmp_path / "compare.csv").open(encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    expected = [row.model_dump(exclude={"protocol"}) for row in known.rows]
    assert table == [{k: "" if v is None else str(v) for k, v in row.items()} for row in expected]
    assert (tmp_path / "compare.md").read_text(encoding="utf-8") == describe(known)
    assert matplotlib.image.imread(tmp_path / "compare.png").shape == (900, 1350, 4)
    assert ET.parse(tmp_path / "compare.svg").getroot().tag.endswith("svg")
    texts = read_svg_texts(tmp_path / "compare.svg")
    assert texts[texts.index("dense") :] == ["dense", "refit:kappa", "refit:uniform", "wanda:uniform", "hollow: N:M"]
    before = (tmp_path / "compare.svg").read_bytes()
    run_comparison(settings)
    assert (tmp_path / "compare.svg").read_bytes() == before


def read_svg_texts(path: Path) -> list[str]:
    """Every text of a figure; matplotlib draws outlines and says in a comment what they read."""
    return re.findall(r"<!-- (.*?) -->", path.read_text(encoding="utf-8"))


def test_a_plot_of_all_recipes_names_the_best_and_explains_the_others(tmp_path: Path) -> None:
    settings = make_settings("no-model", tmp_path, recipes="all", sparsity="0.5")
    jobs = list_jobs("all", "0.5")
    rows = [make_row(job.label, perplexity=12.0 + i) for i, job in enumerate(jobs)]
    write_json(tmp_path / "compare.json", make_comparison(settings, *rows).model_dump())
    run_comparison(settings)
    texts = read_svg_texts(tmp_path / "compare.svg")
    assert texts[texts.index("dense") + 1 :] == [
        *(job.label for job in jobs[:LABELLED]),
        *ALL_ALLOCATIONS,
        *ALL_METHODS,
        *(f"{name}~dense" for name in ALL_METHODS if parse_recipe(name).statistics == "sequential"),  # of a search
    ]


def test_a_terminal_gets_bars_and_tables(tmp_path: Path, no_plot: None) -> None:
    settings = make_settings("no-model", tmp_path, recipes="wanda:uniform,refit:kappa", sparsity="0.5")
    rows = make_row(), make_row("refit:kappa", perplexity=11.0)
    write_json(tmp_path / "compare.json", make_comparison(settings, *rows).model_dump())
    console = Console(file=io.StringIO(), force_terminal=True, width=120, color_system=None)
    compare(settings, console)
    shown = console.file.getvalue()
    assert "50%; dense perplexity 10.00" in shown
    assert shown.index("│ refit:kappa   │") < shown.index("│ wanda:uniform │")

    with show_bars(console, 7) as (begin, progress):
        begin("refit:kappa at 50%", 3)
        progress("prune", 2, 14)
        progress("validation", 1, 3)
    bars = console.file.getvalue().removeprefix(shown)
    assert "refit:kappa at 50%" in bars and "3/7" in bars and "validation" in bars and "1/3" in bars
    quiet = Console(file=io.StringIO())
    with show_bars(quiet, 7) as (begin, progress):
        begin("refit:kappa at 50%", 3)
        progress("prune", 2, 14)
    assert quiet.file.getvalue() == ""
