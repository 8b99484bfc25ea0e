"""Workers on Ray: the same results as alone, whoever dies; and who is refused."""

import builtins
import contextlib
import ipaddress
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tools.team.cluster
from tests.tiny import tiny_settings
from tools.base.errors import UserError
from tools.base.settings import TEAM, TeamSettings
from tools.experiments.speed import BenchSettings
from tools.experiments.speed_workers import bench_workers
from tools.models.artifacts import pack_pruned, unpack_pruned
from tools.plans.allocate import allocate
from tools.plans.recipe import parse_recipe
from tools.plans.work_order import order_allocation
from tools.team.cluster import Cluster, freeze, thaw
from tools.team.worker import Identity, LayerWork
from tools.workbench.bench import DENSE, Workbench, close_workbench, use_workbench

RECIPES = ("refit:kappa", "sparsegpt~sequential:kappa-mask", "wanda:uniform")


def ignore(label: str, done: int, total: int) -> None:
    """No progress bar."""


@pytest.fixture
def settings(tiny_llama: Path, tmp_path: Path) -> TeamSettings:
    questions = tmp_path / "questions.jsonl"
    rows = [{"question": f"What is {i} and {i}?", "answer": str(2 * i)} for i in range(40)]
    questions.write_text("\n".join(map(json.dumps, rows)))
    more = {"calibration_windows": 9, "gradient_windows": 3, "questions": f"file:{questions}", "question_pairs": 18}
    return tiny_settings(tiny_llama, **more)


def work(bench: Workbench, at: Callable[[str, int, int], None] = ignore) -> list[Any]:
    """All that workers share, as ids of content and figures."""
    profile = bench.profile(at)
    results: list[Any] = [profile]
    for label in RECIPES:
        recipe = parse_recipe(label)
        allocation = allocate(bench.describe_layers(profile, recipe, ignore), 0.5, recipe)
        checkpoint = bench.prune(profile, order_allocation(recipe, allocation), ignore)
        losses = bench.evaluate(checkpoint, "validation", profile, at)
        results += [checkpoint, bench.hash_masks(), losses, bench.ask(checkpoint, "validation", ignore)]
    checkpoints = [DENSE, *results[1::4]]
    results += [bench.measure_kl_each(checkpoints, [0, 2]), bench.hash_masks()]
    results += [bench.evaluate_each(checkpoints, 2, profile, at, "side by side"), bench.hash_masks()]
    results += [bench.profile(ignore, profile), bench.evaluate(DENSE, "test", profile, ignore)]
    return results


@pytest.mark.slow
def test_workers_come_to_the_same_bits_as_one_process_alone_whoever_dies(
    settings: TeamSettings, tmp_path: Path, workbench_closed: None
) -> None:
    with use_workbench(settings, tmp_path / "alone", pytest.fail, ignore) as bench:
        alone = work(bench)
    close_workbench()
    warned: list[str] = []
    shared = settings.model_copy(update={"workers": "2", "worker_threads": 1})
    with use_workbench(shared, tmp_path / "shared", warned.append, ignore) as bench:
        cluster = bench.cluster
        assert cluster is not None and cluster.size == 2
        doomed = [place.pid for place in cluster._places]

        def kill(label: str, done: int, total: int) -> None:
            if (label, done) == ("statistics", 4) and len(doomed) == 2:
                os.kill(doomed.pop(), signal.SIGKILL)
            if label == "validation" and done and len(doomed) == 1:
                os.kill(doomed.pop(), signal.SIGKILL)
            if (label, done) == ("side by side", 0):
                os.kill(cluster._places[1].pid, signal.SIGKILL)

        assert work(bench, kill) == alone
        directory = cluster._directory
        addresses = listening([os.getpid(), *(place.pid for place in cluster._places), *processes_of(directory)])
        assert addresses and all(address.is_loopback for address in addresses)
        rounds = BenchSettings.model_validate(settings.model_dump(exclude=set(TEAM)) | {"rounds": 1})
        results = bench_workers(bench, rounds, 2)
        assert [result.name for result in results] == ["workers/profile", "workers/validation"]
        assert all(" by 2 workers of one thread each; " in result.what for result in results)
    assert [text.partition(" on ")[0] for text in warned] == ["worker 1", "worker 0", "worker 1"]
    assert all(text.endswith(" died; another one does its share again") for text in warned)
    close_workbench()
    assert not Path(directory).exists()
    assert processes_of(directory) == []


def processes_of(directory: str) -> list[int]:
    """Processes that a directory is named to at their start."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if directory.encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return found


def listening(processes: list[int]) -> list[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    """Addresses at which these processes wait for TCP connections."""
    sockets = set()
    for process in processes:
        for descriptor in Path(f"/proc/{process}/fd").iterdir():
            with contextlib.suppress(OSError):
                sockets.add(os.readlink(descriptor))
    found: list[ipaddress.IPv4Address | ipaddress.IPv6Address] = []
    for line in [line for table in ("tcp", "tcp6") for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]]:
        fields = line.split()
        if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:  # 0A: listens
            raw = bytes.fromhex(fields[1].partition(":")[0])
            words = b"".join(raw[i : i + 4][::-1] for i in range(0, len(raw), 4))  # each word in the machine's order
            address = ipaddress.ip_address(words)
            found.append(getattr(address, "ipv4_mapped", None) or address)
    return found


# --- who is refused, without Ray ---------------------------------------------------------------------------------


class RayActorError(Exception):
    """As Ray's."""


class GetTimeoutError(Exception):
    """As Ray's."""


OURS = Identity(billhook="0.1.0 (abc)", torch="2.9 on x86_64", device="cpu", model="with weights 12")


@pytest.fixture
def made() -> Cluster:
    """A cluster that never began."""
    cluster = Cluster.__new__(Cluster)
    errors = SimpleNamespace(
        RayActorError=RayActorError,
        GetTimeoutError=GetTimeoutError,
        RayTaskError=type("RayTaskError", (Exception,), {}),
        RayError=type("RayError", (Exception,), {}),
    )
    cluster._ray = SimpleNamespace(exceptions=errors)
    cluster._identity, cluster._threads, cluster._warn = OURS, 2, pytest.fail
    return cluster


def place(deaths: int = 0) -> Any:
    return tools.team.cluster._Place(1, None, None, host="far", deaths=deaths)


def test_another_version_is_refused_by_name(made: Cluster) -> None:
    theirs = OURS.model_copy(update={"torch": "2.8 on x86_64", "model": "with weights 34"})
    made._ray.get = lambda *_, **__: (theirs, "far", 7)
    with pytest.raises(UserError) as caught:
        made._open(place())
    assert str(caught.value) == (
        "worker 1 on far has torch 2.8 on x86_64 instead of 2.9 on x86_64, model with weights 34 instead of with "
        "weights 12; give it the same, and start again"
    )


def test_a_worker_that_does_not_start(made: Cluster) -> None:
    def get(*_: Any, **__: Any) -> Any:
        raise GetTimeoutError

    made._ray.get = get
    with pytest.raises(UserError, match="worker 1 did not start within 600 seconds; has the cluster 2 free CPUs"):
        made._open(place())


def test_a_worker_that_keeps_dying_ends_the_run(made: Cluster) -> None:
    with pytest.raises(UserError, match="worker 1 on far died 4 times; it may lack memory"):
        made._replace(place(deaths=3))


def test_a_cluster_that_is_gone_leaves_the_run_to_go_on(made: Cluster) -> None:
    with pytest.raises(UserError) as caught, made._explained():
        raise made._ray.exceptions.RayError("head node\nis dead")
    assert str(caught.value) == (
        "the Ray cluster is gone (RayError: head node is dead); when it is there again, go on: a run with --resume, "
        "any other command as before"
    )


def test_without_ray_one_line_says_what_to_install(settings: TeamSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    found = builtins.__import__

    def refuse(name: str, *rest: Any) -> Any:
        if name.partition(".")[0] == "ray":
            raise ImportError(name)
        return found(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(UserError, match=r"workers need Ray, which is not installed; try: pip install -e '.\[ray\]'"):
        tools.team.cluster._import_ray()


@pytest.mark.parametrize("value", ["0", "-1", "many", "100", "ray://host", "http://host:1", " 2"])
def test_who_is_no_worker(tiny_llama: Path, value: str) -> None:
    with pytest.raises(ValueError, match="workers"):
        tiny_settings(tiny_llama, workers=value)


@pytest.mark.parametrize("value", ["", "auto", "1", "16", "ray://head.example:10001"])
def test_who_is(tiny_llama: Path, value: str) -> None:
    assert tiny_settings(tiny_llama, workers=value).workers == value


# --- weights of a job's own --------------------------------------------------------------------------------------


class Weighed:
    """An actor whose layers are one number each, all 1 when it was loaded; its answers are these numbers."""

    def __init__(self, dies: bool = False) -> None:
        self.layers, self.dies, self.call = {"a": 1.0, "b": 1.0}, dies, SimpleNamespace(remote=self.run)

    def run(self, method: str, _: None, arguments: Any) -> Any:
        if method != "install":
            layers = dict(self.layers)
            return lambda: self.answer(layers)  # stands for a reference
        for name, tensors in thaw(arguments)[0].items():
            self.layers[name] = float(unpack_pruned(tensors, tensors.get("dense", torch.zeros(2, 2)))[0, 0])
        return None

    def answer(self, layers: dict[str, float]) -> dict[str, float]:
        if self.dies:
            raise RayActorError
        return layers


@pytest.mark.parametrize("dies", [False, True])
def test_each_job_has_its_own_weights_and_layers_travel_once(dies: bool, made: Cluster) -> None:
    jobs = [{"a": "2", "b": "1"}, {"a": "2", "b": "3"}, {"a": "0", "b": "3"}, {"a": "1", "b": "1"}]
    read: list[str] = []

    def read_artifact(name: str, artifact: str) -> dict[str, torch.Tensor]:
        """0 is kept as a mask alone."""
        read.append(name + artifact)
        return pack_pruned(torch.full((2, 2), float(artifact)), values=artifact != "0")

    def replace(place: Any) -> None:
        place.actor, place.installed = Weighed(), {}

    made._ray.put, made._ray.get = lambda value: value, lambda answer: answer()
    made._ray.wait = lambda answers, num_returns: (answers[-1:], answers[:-1])
    made._replace = replace  # type: ignore[method-assign]
    made._places = [tools.team.cluster._Place(0, Weighed(), None), tools.team.cluster._Place(1, Weighed(dies), None)]
    made._loaded, made._kept, made._coming = {"a": "1", "b": "1"}, {}, []
    made._source = SimpleNamespace(  # type: ignore[assignment]
        installed={"a": "5", "b": "1"},
        dense={"a": torch.ones(2, 2), "b": torch.ones(2, 2)},
        read_artifact=read_artifact,
        mark_blocks=lambda weights: sorted(weights.items()),
    )
    answers = dict(made.hand_out("losses", [()] * 4, jobs))
    assert answers == {i: {name: float(artifact) for name, artifact in job.items()} for i, job in enumerate(jobs)}
    assert sorted(set(read)) == ["a0", "a2", "b3"]
    assert dies or len(read) == 3
    assert list(made.hand_out("losses", [()])) == [(0, {"a": 5.0, "b": 1.0})]
    assert made._kept.keys() == {("a", "5"), ("a", "dense weights"), ("b", "dense weights")}


# --- values in and out -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.uint8, torch.bool]
)
def test_tensors_come_out_as_they_went_in(dtype: torch.dtype) -> None:
    tensor = torch.arange(12).reshape(3, 4).to(dtype).T
    work = LayerWork("x", 3, tensor, tensor[:0], tensor[0, 0])
    back = thaw(freeze({"a": [work, (1, "b", None)], 2: tensor}))
    assert back["a"][1] == (1, "b", None) and isinstance(back["a"][0], LayerWork) and back["a"][0].name == "x"
    for ours, theirs in ((back[2], tensor), (back["a"][0].mean_square_I, tensor[:0]), (back["a"][0][4], tensor[0, 0])):
        assert ours.dtype == dtype and torch.equal(ours, theirs)
    back[2].fill_(0)  # memory of its own
    assert not torch.equal(back[2], tensor)
