"""Checkpoints are measured once, one after another or side by side, from where their weights differ."""

import shutil
from collections.abc import Sequence
from typing import Any

import pytest

import tools.workbench.losses
from tests.benches import MASK, REFIT, artifact_path, damage, ignore, prune, same, snapshot
from tests.team import join_team
from tools.measure.losses import PrefixCache
from tools.workbench.bench import Workbench
from tools.workbench.losses import Losses, MeasuredText
from tools.workbench.store import DENSE


def test_evaluations_are_measured_once(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    profile = bench.profile(ignore)
    checkpoint = prune(bench, profile, 0.5, MASK)
    bench.pruner.restore(DENSE)
    first = bench.evaluator.evaluate(checkpoint, "validation", profile, ignore)
    assert bench.weights.installed[bench.weights.layers[0].name] != DENSE  # the checkpoint was put in
    assert first.finite and first.mean_kl is not None and first.mean_kl > 0.01
    dense = bench.evaluator.evaluate(DENSE, "validation", profile, ignore)
    assert dense.nll == bench.profiles.read(profile).dense.nll
    assert dense.mean_kl == pytest.approx(0, abs=1e-6)
    test = bench.evaluator.evaluate(checkpoint, "test", profile, ignore)
    assert len(test.nll) == 2 and test.kl == [0, 0]
    with monkeypatch.context() as patch:
        patch.setattr(tools.workbench.losses, "evaluate_windows", pytest.fail)
        assert bench.evaluator.evaluate(checkpoint, "validation", profile, ignore) == first


def test_a_damaged_evaluation_is_named_and_measured_again(bench: Workbench, warnings: list[str]) -> None:
    profile = bench.profile(ignore)
    first = bench.evaluator.evaluate(DENSE, "validation", profile, ignore)
    [path] = (bench.directory / "evaluations").iterdir()
    for content in (b"{", b"\xff\xfe", b'{"nll": 3}'):
        path.write_bytes(content)
        assert bench.evaluator.evaluate(DENSE, "validation", profile, ignore) == first
        assert warnings.pop() == f"{path} is damaged, or of other text; validation is measured again"


def test_block_inputs_are_kept_within_their_memory(bench: Workbench) -> None:
    size = bench.windows.validation.numel() * 32 * 4
    for limit, kept in ((0, []), (size // 2, []), (size, []), (2 * size, [1]), (9 * size, [1])):
        assert list(PrefixCache(bench.losses.prefix.blocks, bench.windows.validation, limit).kept) == kept


def test_kl_on_calibration_windows_leaves_the_weights_as_they_are(bench: Workbench) -> None:
    profile = bench.profile(ignore)
    checkpoint = prune(bench, profile, 0.5, MASK)
    weights = snapshot(bench)
    kl = measure_kl(bench, checkpoint, [0, 1])
    both = measure_kl(bench, checkpoint, [0]) + measure_kl(bench, checkpoint, [1])
    assert kl == pytest.approx(both / 2, rel=1e-5)
    assert same(snapshot(bench), weights)
    assert bench.evaluator.measure_kl_each([DENSE, checkpoint, DENSE], [1, 0]) == pytest.approx([0, kl, 0], abs=1e-6)
    assert same(snapshot(bench), weights)


def measure_kl(bench: Workbench, checkpoint: str, windows: list[int]) -> float:
    return bench.evaluator.measure_kl_each([checkpoint], windows)[0]


@pytest.fixture
def three(bench: Workbench) -> tuple[str, list[str]]:
    """A profile and three checkpoints, the last one in the model."""
    profile = bench.profile(ignore)
    return profile, [
        prune(bench, profile, 0.3, MASK),
        prune(bench, profile, 0.5, REFIT),
        prune(bench, profile, 0.5, MASK),
    ]


@pytest.mark.parametrize("windows", [1, 3])
def test_checkpoints_side_by_side_are_as_one_after_another(
    bench: Workbench, three: tuple[str, list[str]], windows: int
) -> None:
    profile, checkpoints = three
    asked = [*checkpoints, DENSE, checkpoints[0]]
    weights = snapshot(bench)
    alone = bench.evaluator.evaluate_each(asked, windows, profile, ignore), bench.evaluator.measure_kl_each(asked, [1])
    assert same(snapshot(bench), weights)
    assert bench.crew.abreast == 1
    if windows == 3:
        assert alone[0] == [bench.evaluator.evaluate(checkpoint, "validation", profile, ignore) for checkpoint in asked]
    shutil.rmtree(bench.directory / "evaluations")
    bench.pruner.restore(checkpoints[0])
    weights = snapshot(bench)
    team = join_team(bench)
    ticks: list[tuple[int, int]] = []
    shared = bench.evaluator.evaluate_each(asked, windows, profile, lambda _, done, total: ticks.append((done, total)))
    assert (shared, bench.evaluator.measure_kl_each(asked, [1])) == alone
    assert team.handed == [("MeasureLosses", place) for place in (1, 0, 1, 0)] * 2 and bench.crew.abreast == 2
    assert ticks == [(done * windows, 4 * windows) for done in range(5)]
    assert same(snapshot(bench), weights)
    assert bench.evaluator.evaluate_each(asked, windows, profile, ignore) == shared and len(team.handed) == 8, "kept"


def test_what_was_measured_on_a_part_is_measured_on_the_rest_of_a_larger_one(
    bench: Workbench, three: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    profile, checkpoints = three
    whole = [bench.evaluator.evaluate(checkpoint, "validation", profile, ignore) for checkpoint in checkpoints]
    shutil.rmtree(bench.directory / "evaluations")
    asked: list[list[int]] = []
    measure = Losses.measure

    def record(losses: Losses, split: MeasuredText, windows: Sequence[int], *others: Any, **options: Any) -> Any:
        asked.append(list(windows))
        return measure(losses, split, windows, *others, **options)

    monkeypatch.setattr(Losses, "measure", record)
    [first], part = bench.losses.list_part("validation", 1), bench.losses.list_part("validation", 2)
    bench.evaluator.evaluate_each(checkpoints[:1], 1, profile, ignore)
    found = bench.evaluator.evaluate_each(checkpoints[:2], 2, profile, ignore)
    assert found == [losses.take(part) for losses in whole[:2]]
    rest = [window for window in part if window != first]
    assert asked == [[first], rest, part]
    found = bench.evaluator.evaluate_each(checkpoints, 3, profile, ignore)
    assert found == whole and asked[3:] == [[window for window in range(3) if window not in part]] * 2 + [[0, 1, 2]]
    asked.clear()
    assert bench.evaluator.evaluate_each(checkpoints, 2, profile, ignore) == [losses.take(part) for losses in whole]
    assert not asked, "a smaller part is read back"


def test_a_layer_damaged_before_it_travels_is_made_again(
    bench: Workbench, warnings: list[str], three: tuple[str, list[str]]
) -> None:
    profile, checkpoints = three
    alone = bench.evaluator.evaluate_each(checkpoints, 2, profile, ignore)
    shutil.rmtree(bench.directory / "evaluations")
    damage(artifact_path(bench, checkpoints[1], bench.weights.layers[3].name))
    weights = snapshot(bench)
    team = join_team(bench)
    assert bench.evaluator.evaluate_each(checkpoints, 2, profile, ignore) == alone
    assert team.handed == [("MeasureLosses", 0)], "the others are measured one after another"
    assert len(warnings) == 1 and "computed again" in warnings[0]
    assert same(snapshot(bench), weights)
