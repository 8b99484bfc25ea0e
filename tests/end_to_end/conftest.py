"""Fixtures of whole runs."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.helpers import (
    TINY,
    Outcome,
    at_home,
    decode_briefly,
    end_forks,
    leave_out_figures,
    run_apart,
    run_here,
    train_tiny_model,
)
from tools.workbench import bench

Command = Callable[..., Outcome]


@pytest.fixture(scope="session", autouse=True)
def imports_come_first() -> None:
    """What runs import is no part of what the collector looks through, nor of what a test waits for."""
    import datasets
    import transformers.models.llama.modeling_llama

    assert datasets and transformers


@pytest.fixture(autouse=True, scope="module")
def short_reports(request: pytest.FixtureRequest) -> Iterator[None]:
    """Little is decoded; and no figures, which take a third of a tiny run, but in files that are marked as looking at
    them."""
    with pytest.MonkeyPatch.context() as patch:
        if request.node.get_closest_marker("figures") is None:
            leave_out_figures(patch.setattr)
        decode_briefly(patch.setattr)
        yield


@pytest.fixture
def command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Command]:
    """`python -m graph.run` in this process, in `tmp_path`."""

    def run(*arguments: str) -> Outcome:
        capsys.readouterr()
        code = run_here(*arguments)
        said = capsys.readouterr()
        return Outcome(code, said.out, said.err)

    with at_home(tmp_path):
        yield run
    end_forks()


@pytest.fixture
def no_plot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots of comparisons take longer than tiny rows."""
    monkeypatch.setattr("tools.results.comparison.plot_sparsity", lambda *_: None)


@pytest.fixture
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse to load a model."""

    def refuse(*_arguments: Any, **_options: Any) -> Any:
        raise AssertionError("a model is being loaded")

    monkeypatch.setattr(bench, "load_model", refuse)


@pytest.fixture(scope="module")
def flags(tiny_llama: Path) -> list[str]:
    """Flags of a run of the tiny Llama."""
    return ["--name", "run", "--model", str(tiny_llama), *TINY]


@pytest.fixture(scope="module")
def easy(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that nothing happened to, its state in SQLite."""
    return run_apart(tmp_path_factory.mktemp("easy"), *flags)


@pytest.fixture(scope="session")
def trained_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny Llama that pruning can hurt; read it, do not write to it."""
    return train_tiny_model(tmp_path_factory.mktemp("models") / "trained-llama")
