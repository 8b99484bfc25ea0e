"""A workbench of several named texts: what is fitted to their sum, and what is told of each."""

import shutil
from pathlib import Path
from threading import Event

import pytest
import torch

import tools.measure.recall
import tools.plans.costs
import tools.polish.loop
from tests.benches import SEQUENTIAL, ignore, open_bench, plan, prune, same, snapshot
from tests.named import name_texts, watch_polish
from tests.rows import write_questions
from tests.team import gather_teams, join_team
from tests.tiny import tiny_settings
from tools.base.errors import ImpossiblePlan
from tools.base.progress import Stopped, stop_at
from tools.measure.recall import list_texts
from tools.plans.recipe import Recipe, parse_recipe
from tools.plans.work_order import order_allocation
from tools.workbench.bench import Workbench
from tools.workbench.evaluate import probe_orders
from tools.workbench.store import DENSE


@pytest.fixture
def named(tiny_llama: Path, tmp_path: Path, workbench_closed: None) -> Workbench:
    settings = tiny_settings(tiny_llama, **name_texts(tmp_path), calibration_windows=5)
    return open_bench(settings, tmp_path / "named")


def open_one(bench: Workbench, name: str, **changes: object) -> Workbench:
    """A workbench of one of the texts alone, without a name."""
    source = dict.fromkeys(("calibration", "validation", "test"), bench.settings.text[name])
    settings = bench.settings.model_copy(update={"text": {}, "text_weights": {}, **source, **changes})
    return open_bench(settings, bench.directory.parent / name)


def test_each_text_is_measured_as_by_a_run_of_it_alone(named: Workbench) -> None:
    profile = named.profile(ignore)
    checkpoint = prune(named, profile, 0.4)
    whole = {split: named.evaluator.evaluate(checkpoint, split, profile, ignore) for split in ("validation", "test")}
    weights = snapshot(named)
    for name in ("code", "prose"):
        alone = open_one(named, name)
        own = alone.profile(ignore)
        assert named.profiles.read(profile).dense.take_text(name) == alone.profiles.read(own).dense
        alone.model.load_state_dict({key: value.view(torch.float32) for key, value in weights.items()})
        alone.weights.installed.update(dict.fromkeys(alone.weights.by_name, "another's"))
        hidden = alone.profiles.read_hidden(own)
        assert (
            whole["validation"].take_text(name) == alone.losses.measure("validation", range(3), hidden, "", ignore)[0]
        )
        assert whole["test"].take_text(name).nll == alone.losses.measure("test", range(2), None, "", ignore)[0].nll
    code, prose = list_texts(whole["validation"])
    assert whole["validation"].mean_kl == pytest.approx(0.75 * code.kl + 0.25 * prose.kl, rel=1e-12)


def test_questions_are_asked_once_whatever_a_goal_makes_the_texts_count(
    tiny_llama: Path, tmp_path: Path, workbench_closed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {"questions": write_questions(tmp_path / "qa.jsonl", 200), "question_pairs": 10}
    settings = tiny_settings(tiny_llama, **name_texts(tmp_path, text_weights={}), **asked, calibration_windows=5)
    found = open_bench(settings, tmp_path / "run").evaluator.ask("dense", "validation", ignore)
    monkeypatch.setattr(tools.measure.recall, "read_answers", None)
    weighed = settings.model_copy(update={"text_weights": {"code": 3.0, "prose": 1.0}})
    assert open_bench(weighed, tmp_path / "run").evaluator.ask("dense", "validation", ignore) == found
    named = settings.model_copy(update={"text": {**settings.text, "more": "pydoc"}})
    assert open_bench(named, tmp_path / "run").evaluator.ask("dense", "validation", ignore) == found


def test_a_text_that_counts_nothing_changes_nothing_that_is_fitted(named: Workbench) -> None:
    settings = named.settings.model_copy(update={"text_weights": {"code": 2.0, "prose": 0.0}})
    bench = open_bench(settings, named.directory.parent / "nothing")
    profile = bench.profile(ignore)
    layers, bits = bench.profiles.read(profile).layers, {}
    for recipe in (Recipe(), SEQUENTIAL):
        checkpoint = prune(bench, profile, 0.4, recipe)
        bits[recipe] = snapshot(bench)
        found = list_texts(bench.evaluator.evaluate(checkpoint, "validation", profile, ignore))
        assert [text.weight for text in found] == [1, 0] and found[1].kl > 0, "it is measured"
    alone = open_one(named, "code")
    own = alone.profile(ignore)
    for ours, theirs in zip(layers, alone.profiles.read(own).layers, strict=True):
        assert ours.kappa == pytest.approx(theirs.kappa, rel=1e-5), ours.name
        assert (ours.wanda, ours.gradient) == pytest.approx((theirs.wanda, theirs.gradient), rel=1e-5)
    for recipe, ours in bits.items():
        prune(alone, own, 0.4, recipe)
        theirs = snapshot(alone)
        for name in ours:
            assert torch.equal(ours[name].view(torch.float32) == 0, theirs[name].view(torch.float32) == 0), name


def test_workers_and_interruptions_come_to_the_same_bits(named: Workbench) -> None:
    profile = named.profile(ignore)
    recipes = (Recipe(), SEQUENTIAL, parse_recipe("two-sided+refit:kappa"))
    made = [prune(named, profile, 0.4, recipe) for recipe in recipes]
    bits = snapshot(named)
    losses = named.evaluator.evaluate(made[-1], "validation", profile, ignore)
    shared = open_bench(named.settings, named.directory.parent / "shared")
    join_team(shared)
    event = Event()
    with stop_at(event), pytest.raises(Stopped):
        shared.profile(lambda label, done, _: event.set() if label == "gradients" and done else None)
    assert shared.profile(ignore) == profile
    assert [prune(shared, profile, 0.4, recipe) for recipe in recipes] == made
    assert same(snapshot(shared), bits)
    assert shared.evaluator.evaluate(made[-1], "validation", profile, ignore) == losses


def test_probes_and_searches_read_as_much_of_each_text(named: Workbench) -> None:
    profile = named.profile(ignore)
    order = order_allocation(Recipe(), plan(named, profile, 0.4))
    [probed] = probe_orders(named, profile, [order], 3, ignore, back=DENSE)
    whole = named.evaluator.evaluate(named.pruner.prune(profile, order, ignore), "validation", profile, ignore)
    assert not isinstance(probed, str)
    assert probed.losses == whole.take([0, 2, 3, 5]), "three windows are two of each text, spread over it"
    shutil.rmtree(named.directory / "evaluations")
    (named.directory / "evaluations").mkdir()
    fresh = named.evaluator.evaluate(named.pruner.prune(profile, order, ignore), "validation", profile, ignore)
    assert fresh == whole, "the probe's windows were not measured again"
    checkpoint = prune(named, profile, 0.4)
    hidden = named.losses.measure("calibration", range(10), None, "", ignore)
    assert hidden[0].texts == ["code"] * 5 + ["prose"] * 5
    [kl] = named.evaluator.measure_kl_each([checkpoint], [1, 2, 7])
    named.pruner.restore(DENSE)
    dense = named.losses.measure("calibration", [1, 2, 7], None, "", ignore)[1]
    named.pruner.restore(checkpoint)
    found = named.losses.measure("calibration", [1, 2, 7], dense, "", ignore)[0]
    assert kl == pytest.approx(0.75 * (found.kl[0] + found.kl[1]) / 2 + 0.25 * found.kl[2], rel=1e-12)
    one = named.settings.model_copy(update={"text_weights": {"code": 0.0, "prose": 1.0}})
    assert open_bench(one, named.directory.parent / "one").list_fitted() == [5, 6, 7, 8, 9]
    assert named.list_fitted() == list(range(10))


def test_what_named_texts_do_not_have_is_refused_in_one_line(named: Workbench) -> None:
    profile = named.profile(ignore)
    line = "mix weighs 'questions', which is none of the texts code, prose"
    with pytest.raises(ImpossiblePlan, match=f"^{line}$"):
        prune(named, profile, 0.4, parse_recipe("refit~half:kappa"))


@pytest.mark.usefixtures("raw_gamma")
def test_a_polish_weighs_windows_and_workers_polish_alike(named: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools.plans.costs, "STEP_TOKENS", 128)
    monkeypatch.setattr(tools.polish.loop, "RATE", 3e-3)

    def polish(bench: Workbench) -> str:
        profile = bench.profile(ignore)
        return bench.pruner.prune(profile, order_allocation(Recipe(), plan(bench, profile, 0.4), 64 * 16), ignore)

    made = polish(named)
    bits, told = snapshot(named), named.pruner.read_polished(made)
    assert told is not None and told.after < told.before
    gather_teams(monkeypatch)
    shared = open_bench(named.settings.model_copy(update={"workers": "2"}), named.directory.parent / "shared")
    assert polish(shared) == made and same(snapshot(shared), bits)


def test_a_polish_leaves_texts_out_that_count_nothing(named: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools.plans.costs, "STEP_TOKENS", 128)
    read = watch_polish(monkeypatch)
    settings = named.settings.model_copy(update={"text_weights": {"code": 0.0, "prose": 1.0}})
    bench = open_bench(settings, named.directory.parent / "nothing", lambda _: None)
    profile = bench.profile(ignore)
    bench.pruner.prune(profile, order_allocation(Recipe(), plan(bench, profile, 0.4), 64 * 8), ignore)
    assert set(read) == {5, 6, 7, 8, 9}
