"""Workers that stream their models, each from a file of its own: the bits of one process that holds it whole."""

import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import tools.team.cluster
from tests.benches import open_bench
from tests.fake_ray import make_connection
from tests.team import join_team, make_team
from tests.tiny import tiny_settings
from tests.tools.team.test_cluster import settings, work
from tools.base.settings import TeamSettings
from tools.models.load import load_model
from tools.models.streamed import Stream, find_stream
from tools.team.actor import Actor
from tools.team.cluster import Cluster
from tools.team.frozen import freeze
from tools.team.worker import Texts
from tools.workbench.bench import Workbench
from tools.workbench.open import close_workbench

__all__ = ["settings"]


@pytest.fixture
def streamed(settings: TeamSettings, tmp_path: Path, workbench_closed: None) -> Workbench:
    return open_bench(settings.model_copy(update={"device": "stream"}), tmp_path / "streamed")


def test_they_come_to_the_bits_of_one_process_that_holds_the_model(
    settings: TeamSettings, tmp_path: Path, workbench_closed: None
) -> None:
    alone = work(open_bench(settings, tmp_path / "alone"), polish=0)
    close_workbench()
    bench = open_bench(settings.model_copy(update={"device": "stream"}), tmp_path / "streamed")
    team = join_team(bench)
    models = [bench.model, *(worker.model for worker in team.workers)]
    assert all(find_stream(model) for model in models)
    places = [parameter.data_ptr() for model in models for parameter in model.parameters()]
    assert len(set(places)) == len(places), "each has weights of its own"
    assert work(bench, polish=0) == alone


def test_a_worker_s_share_of_a_text_reads_the_weights_once(
    streamed: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, copied, copy = make_team(streamed).workers[0], Counter[int](), Stream._copy

    def count(self: Stream, block: int, parameters: Any) -> Any:
        copied[block] += block not in self._copied
        return copy(self, block, parameters)

    monkeypatch.setattr(Stream, "_copy", count)
    hidden = worker.losses("validation", [0, 1, 2], None, keeps_hidden=True).hidden_BTD
    assert copied == dict.fromkeys(range(len(worker.blocks)), 1)
    assert hidden is not None and len(hidden) == 3


def test_an_actor_puts_its_weights_where_it_is_told_or_into_the_temporary_directory(
    streamed: Workbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Path] = []

    def load(settings: Any, scratch: Path) -> Any:
        seen.append(scratch)
        return load_model(settings, scratch)

    monkeypatch.setattr("tools.team.actor.load_model", load)
    texts = freeze(Texts(streamed.windows, streamed.questions))
    for scratch in (tmp_path / "own", None):
        actor = Actor()
        actor.open(streamed.settings, texts, 1, scratch)
        assert find_stream(actor._worker.model) and actor._worker.walks.scratch == seen[-1]
    assert seen == [tmp_path / "own", Path(tempfile.gettempdir())]
    assert list((tmp_path / "own").iterdir()) == [], "the file has no name"


@pytest.mark.parametrize(("workers", "reached"), [("2", True), ("ray://head:1", False)])
def test_workers_do_as_this_process_does(
    workers: str, reached: bool, tiny_llama: Path, streamed: Workbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it is auto that streams the model here; a cluster's workers may not reach this machine's directories."""
    given: list[Any] = []

    class Recorded:
        def __init__(self, _connection: Any, settings: TeamSettings, *others: Any) -> None:
            given.extend([settings.device, others[2]])

        def open(self, _count: int, _texts: Any, written: int) -> None:
            given.append(written)

    monkeypatch.setattr(tools.team.cluster, "connect", lambda _: make_connection())
    monkeypatch.setattr(tools.team.cluster, "count_workers", lambda *_: 2)
    monkeypatch.setattr(tools.team.cluster, "Places", Recorded)
    auto = tiny_settings(tiny_llama, device="auto", workers=workers)
    texts, size = Texts(streamed.windows, {}), sum(p.nbytes for p in streamed.model.parameters())
    Cluster(auto, texts, streamed.weights, streamed.model, tmp_path, pytest.fail)
    assert given == ["stream", tmp_path if reached else None, size]
    given.clear()
    Cluster(auto, texts, streamed.weights, load_model(auto)[0], tmp_path, pytest.fail)
    assert given == ["auto", tmp_path if reached else None, 0]
