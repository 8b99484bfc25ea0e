"""Workers on Ray: the same results as alone, whoever dies; layers travel once."""

import contextlib
import ipaddress
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import tiny_settings
from tools.base.progress import ignore_progress as ignore
from tools.base.settings import TEAM, TeamSettings
from tools.experiments.speed import BenchSettings, Site, bench_workers
from tools.plans.allocate import allocate
from tools.plans.recipe import parse_recipe
from tools.plans.work_order import order_allocation
from tools.workbench.bench import Workbench
from tools.workbench.open import close_workbench, use_workbench
from tools.workbench.store import DENSE

RECIPES = ("refit:kappa", "sparsegpt~sequential:kappa-mask", "wanda:uniform")


@pytest.fixture
def settings(tiny_llama: Path, tmp_path: Path) -> TeamSettings:
    questions = tmp_path / "questions.jsonl"
    rows = [{"question": f"What is {i} and {i}?", "answer": str(2 * i)} for i in range(40)]
    questions.write_text("\n".join(map(json.dumps, rows)))
    more = {"calibration_windows": 9, "gradient_windows": 3, "questions": f"file:{questions}", "question_pairs": 18}
    return tiny_settings(tiny_llama, **more)


def work(bench: Workbench, at: Callable[[str, int, int], None] = ignore, polish: int = 64 * 16) -> list[Any]:
    """All that workers share, as ids of content and figures; the first recipe with a polish on so many tokens."""
    profile = bench.profile(at)
    results: list[Any] = [profile]
    for label in RECIPES:
        recipe = parse_recipe(label)
        allocation = allocate(bench.curves.describe_layers(profile, recipe, ignore), 0.5, recipe)
        checkpoint = bench.pruner.prune(
            profile, order_allocation(recipe, allocation, polish * (label == RECIPES[0])), ignore
        )
        losses = bench.evaluator.evaluate(checkpoint, "validation", profile, at)
        results += [
            checkpoint,
            bench.weights.hash_masks(),
            losses,
            bench.evaluator.ask(checkpoint, "validation", ignore),
        ]
    checkpoints = [DENSE, *results[1::4]]
    results += [bench.evaluator.measure_kl_each(checkpoints, [0, 2]), bench.weights.hash_masks()]
    results += [bench.evaluator.evaluate_each(checkpoints, 2, profile, at, "side by side"), bench.weights.hash_masks()]
    results += [bench.profile(ignore, profile), bench.evaluator.evaluate(DENSE, "test", profile, ignore)]
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
        cluster = bench.crew.cluster
        assert cluster is not None and cluster.size == 2
        doomed = [place.pid for place in cluster._places.used]

        def kill(label: str, done: int, total: int) -> None:
            if (label, done) == ("statistics", 4) and len(doomed) == 2:
                os.kill(doomed.pop(), signal.SIGKILL)
            if label == "validation" and done and len(doomed) == 1:
                os.kill(doomed.pop(), signal.SIGKILL)
            if (label, done) == ("side by side", 0):
                os.kill(cluster._places.used[1].pid, signal.SIGKILL)

        assert work(bench, kill) == alone
        directory = cluster._connection.directory
        begun = processes_of(directory)
        addresses = listening([os.getpid(), *(place.pid for place in cluster._places.used), *begun])
        assert addresses and all(address.is_loopback for address in addresses)
        dashboards = [process for process in begun if is_dashboard(process)]
        assert listening(dashboards) == [], "its pages would run whatever job they are sent"
        rounds = BenchSettings.model_validate(settings.model_dump(exclude=set(TEAM)) | {"rounds": 1})
        results = list(bench_workers(Site(bench, rounds)))
        assert [result.name for result in results] == ["workers/profile", "workers/validation"]
        assert all(result.what.endswith(" by 2 workers") for result in results)
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


def is_dashboard(process: int) -> bool:
    """Whether a process is Ray's dashboard or its agent, which Ray begins even where it is to have no pages."""
    arguments = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
    return any(argument.endswith((b"/dashboard/dashboard.py", b"/dashboard/agent.py")) for argument in arguments)


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
