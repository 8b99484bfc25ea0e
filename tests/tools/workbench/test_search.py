"""The evolutionary search on a workbench: saved after each generation, gone on with only where it is the same one."""

from pathlib import Path
from typing import Any

import pytest

from tests.team import gather_teams
from tests.tiny import tiny_settings
from tools.base.files import write_json
from tools.base.progress import ignore_progress
from tools.plans.allocate import allocate
from tools.plans.recipe import parse_recipe
from tools.workbench.bench import Workbench
from tools.workbench.evaluate import Evaluator
from tools.workbench.open import close_workbench, use_workbench
from tools.workbench.search import Decision, SavedSearch, search_allocation

RECIPE = parse_recipe("wanda~dense:uniform")
TOKENS = 10_000
GENERATION = 64 * (16 * 4 + (1 + 1) * 4)
"""Tokens: 16 children on 512 tokens, then the best and its parent on more, which are the 4 windows that there are."""
CANDIDATES = 16 + 1 + 1
SHORT = (
    "wanda~dense:evolution selects on all of the 256 calibration tokens, where EvoPress has 8,192; "
    "give more --calibration"
)

pytestmark = pytest.mark.usefixtures("workbench_closed")


class Searched:
    """A search that was made in a run directory, and what making it again there gives."""

    def __init__(self, model: Path, directory: Path) -> None:
        self.model, self.directory = model, directory
        self.path = directory / "search-wanda~dense-0.45.json"
        self.warnings: list[str] = []
        self.found = self.again()

    def again(self, tokens: int = TOKENS, **changes: Any) -> Decision:
        settings = tiny_settings(self.model, **changes)
        with use_workbench(settings, self.directory, self.warnings.append, ignore_progress) as bench:
            profile = bench.profile(ignore_progress, masks_only=True)
            return search_allocation(
                bench, profile, RECIPE, 0.45, ignore_progress, tokens=tokens, max_layer_sparsity=0.95
            )

    def read(self) -> SavedSearch:
        return SavedSearch.model_validate_json(self.path.read_bytes())


@pytest.fixture
def searched(tiny_llama: Path, tmp_path: Path) -> Searched:
    return Searched(tiny_llama, tmp_path / "run")


def test_what_is_found_is_exact_and_told_with_its_tokens(searched: Searched, tmp_path: Path) -> None:
    found = searched.found
    assert sum(found.allocation.zeros.values()) == round(0.45 * 15_360)
    assert found.tokens == 2 * GENERATION <= TOKENS < 3 * GENERATION
    assert found.searched == (2, 400, 16, 32)
    assert [text[: len(SHORT)] for text in searched.warnings] == [SHORT]
    assert searched.read().search.zeros == found.allocation.zeros
    with use_workbench(tiny_settings(searched.model), searched.directory, pytest.fail, ignore_progress) as bench:
        layers = bench.profiles.read(searched.read().profile).layers
    searched.path.unlink()
    small = searched.again(GENERATION - 1)
    assert (small.allocation, small.tokens) == (allocate(layers, 0.45, RECIPE, max_layer_sparsity=0.95), 0)
    assert small.searched == (0, 400, 16, 0)
    assert not searched.path.exists()


def test_it_goes_on_where_it_was(searched: Searched, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = searched.read()
    saved.seconds += 1000
    write_json(searched.path, saved.model_dump())
    monkeypatch.setattr(Evaluator, "measure_kl_each", pytest.fail)
    again = searched.again()
    assert again[:2] == searched.found[:2]
    assert again.seconds >= saved.seconds, "the time of the first try is counted"


def test_an_interrupted_one_ends_as_if_it_never_was(searched: Searched, monkeypatch: pytest.MonkeyPatch) -> None:
    searched.path.unlink()
    measure, calls = Evaluator.measure_kl_each, []

    def interrupt(bench: Workbench, *arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 4:  # in the second generation
            raise KeyboardInterrupt
        return measure(bench, *arguments)

    monkeypatch.setattr(Evaluator, "measure_kl_each", interrupt)
    with pytest.raises(KeyboardInterrupt):
        searched.again()
    assert searched.read().search.generation == 1
    assert searched.again()[:2] == searched.found[:2]
    assert len(calls) == 4 + 2


def test_workers_take_whole_candidates(searched: Searched, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = searched.read()
    searched.path.unlink()
    close_workbench()
    teams = gather_teams(monkeypatch)
    assert searched.again(workers="2")[:2] == searched.found[:2]
    shared = searched.read()
    assert shared == alone.model_copy(update={"seconds": shared.seconds})
    assert len(teams) == 1 and len(teams[0].handed) == 2 * CANDIDATES


@pytest.mark.parametrize("spoil", ["profile", "file"])
def test_one_of_other_settings_or_another_model_is_not_gone_on_with(
    spoil: str, searched: Searched, monkeypatch: pytest.MonkeyPatch
) -> None:
    if spoil == "profile":
        other = searched.read().model_copy(update={"profile": "0" * 64})
        write_json(searched.path, other.model_dump())
    elif spoil == "file":
        searched.path.write_text("{")
    measured: list[str] = []
    measure = Evaluator.measure_kl_each
    monkeypatch.setattr(Evaluator, "measure_kl_each", lambda bench, c, w: measured.extend(c) or measure(bench, c, w))
    again = searched.again()
    assert len(measured) == 2 * CANDIDATES and again.tokens == 2 * GENERATION
    others = [text for text in searched.warnings if not text.startswith(SHORT)]
    assert others == ([f"{searched.path} is damaged; the search begins anew"] if spoil == "file" else [])
