"""Workers that stream their models, each from a file of its own: the bits of one process that holds it whole."""

from pathlib import Path
from typing import Any

import pytest

import tools.team.cluster
from tests.benches import open_bench
from tests.fake_ray import make_connection
from tests.team import join_team
from tests.tiny import tiny_settings
from tests.tools.team.test_cluster import settings, work
from tools.base.settings import TeamSettings
from tools.models.load import load_model
from tools.models.streamed import find_stream
from tools.team.cluster import Cluster
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
