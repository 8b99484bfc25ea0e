"""The report in a real browser: it complains of nothing, asks for nothing, fits a phone and follows the theme."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from matplotlib.image import imread

from tests.chromium import COMMAND, Page, open_browser
from tests.made_runs import add_round, begin_run, end_run, make_layers, write_run
from tools.results.page.page import write_page
from tools.results.schema import Knowledge, Sample, Score

pytestmark = pytest.mark.skipif(COMMAND is None, reason="chromium is not installed")

PHONE = 360
LONG = "a_word_without_any_place_to_break_it/" * 8
PAPER = {"light": (251, 250, 247), "dark": (20, 24, 27)}


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with open_browser(tmp_path_factory.mktemp("browser") / "profile") as page:
        yield page


@pytest.fixture(scope="module")
def addresses(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Pages of a run with everything there is to show, of two runs, and of one that has only begun."""
    home = tmp_path_factory.mktemp("runs")
    layers = make_layers(30, ["self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", LONG])
    full = begin_run(home / "full", layers, model=f"models/{LONG}")
    add_round(full, 1, "accept", layers, words=f"<script>alert(1)</script> {LONG}")
    add_round(full, 2, "rollback", layers, sparsity=0.45, perplexity=None, kl=0.5, words=LONG)
    end_run(
        full,
        model=f"models/{LONG}",
        knowledge=Knowledge(
            **{"source": LONG, "pairs": 200, "dense": -2.5, "pruned": -2.9, "uniform_wanda": -3.5},
            **{"retention": 0.67, "retention_error": 0.03},
        ),
        benchmarks=[
            Score(model=model, task="mmlu", metric="acc", value=v, error=0.02, samples=500, protocol={})
            for model, v in (("dense", 0.4), (LONG, 0.3))
        ],
        samples=[Sample(prompt="The capital of France is", dense=" Paris.", pruned=f" Lyon. {LONG}")],
    )
    runs = {"full": [full], "several": [full, write_run(home / "other")], "begun": [begin_run(home / "begun")]}
    for name, directories in runs.items():
        (home / f"{name}.html").write_text(write_page(directories), encoding="utf-8")
    return {name: (home / f"{name}.html").as_uri() for name in runs}


@pytest.mark.parametrize("width", [PHONE, 1280])
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("name", ["full", "several", "begun"])
def test_it_is_quiet_fits_and_follows_the_theme(
    name: str, theme: str, width: int, browser: Page, addresses: dict[str, str], tmp_path: Path
) -> None:
    browser.look(width, theme)
    browser.open(addresses[name])
    browser.evaluate("document.querySelectorAll('details').forEach(fold => fold.open = true)")
    assert browser.evaluate("[document.documentElement.scrollWidth, innerWidth]") == [width, width]
    assert browser.requests() == [addresses[name]]
    assert browser.complaints() == [] and browser.pick("Page.javascriptDialogOpening") == []
    picture = imread(browser.shoot(tmp_path / "page.png"))
    assert picture.shape[1] == width and picture.shape[0] >= 800
    assert tuple(round(255 * float(part)) for part in picture[2, 2, :3]) == PAPER[theme]


def test_wide_tables_scroll_in_their_own_box(browser: Page, addresses: dict[str, str]) -> None:
    browser.look(PHONE)
    browser.open(addresses["full"])
    boxes = browser.evaluate("[...document.querySelectorAll('.wide')].map(box => box.scrollWidth > box.clientWidth)")
    assert boxes == [True, True]


def test_figures_are_drawn_with_what_they_refer_to(browser: Page, addresses: dict[str, str]) -> None:
    browser.look(1280)
    browser.open(addresses["several"])
    assert browser.evaluate("document.querySelectorAll('svg.figure').length") == 10
    empty = (
        "[...document.querySelectorAll('use')].filter(use => use.getBBox().width + use.getBBox().height == 0).length"
    )
    assert browser.evaluate(f"[document.querySelectorAll('use').length > 50, {empty}]") == [True, 0]


def test_a_page_that_loads_and_complains_would_be_noticed(browser: Page, tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text("<img src='http://127.0.0.1:9/x.png'><script>console.error('oh')</script><p style='width:999px'>")
    browser.look(PHONE)
    browser.open(page.as_uri())
    assert browser.requests() == [page.as_uri(), "http://127.0.0.1:9/x.png"]
    assert len(browser.complaints()) == 2
    assert browser.evaluate("document.documentElement.scrollWidth") > PHONE
