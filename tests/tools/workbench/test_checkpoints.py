"""Manifests are plain, and what is damaged is made again or refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tools.statistics.table
from billhook_kernels.guard import Pruned
from billhook_kernels.methods import prune_weight
from tests.benches import (
    MASK,
    REFIT,
    SEQUENTIAL,
    artifact_path,
    damage,
    ignore,
    open_bench,
    plan,
    prune,
    same,
    snapshot,
)
from tools.base.errors import DamagedArtifact
from tools.plans.recipe import Recipe, parse_recipe
from tools.plans.work_order import order_allocation
from tools.workbench.bench import Workbench
from tools.workbench.layer_pruning import LayerTask, make_layer_key
from tools.workbench.open import close_workbench
from tools.workbench.store import DENSE


def test_manifests_are_small_and_plain(bench: Workbench) -> None:
    profile = bench.profile(ignore)
    checkpoint = prune(bench, profile, 0.4, parse_recipe("refit:kappa@0.5"))
    manifest = json.loads(bench.store.path(checkpoint, ".json").read_text())
    assert manifest["profile"] == profile
    assert list(manifest["layers"][bench.weights.layers[0].name]) == ["artifact", "zeros"]
    assert Recipe.model_validate(manifest["recipe"]) == Recipe().within_layers(), (
        "how layers were shared out is not in it"
    )
    text = json.dumps(
        {
            "layers": {
                name: {"artifact": record.artifact, "zeros": record.zeros}
                for name, record in bench.pruner.read_checkpoint(checkpoint).items()
            },
            "profile": profile,
            "recipe": Recipe().within_layers().model_dump(),
        },
        sort_keys=True,
    )
    assert bench.store.path(checkpoint, ".json").read_text() == text, "as ever"


def test_the_key_of_a_layer_names_all_that_it_depends_on_and_nothing_else() -> None:
    task = LayerTask(3, parse_recipe("refit"), "first")
    other = {
        "name": ("m", "d", "s", task),
        "dense": ("n", "e", "s", task),
        "statistics": ("n", "d", "t", task),
        "zeros": ("n", "d", "s", task._replace(zeros=4)),
        "method": ("n", "d", "s", task._replace(recipe=parse_recipe("refit3"))),
        "gamma": ("n", "d", "s", task._replace(recipe=parse_recipe("refit~clipped"))),
        "pattern": ("n", "d", "s", task._replace(recipe=task.recipe.model_copy(update={"pattern": "2:4"}))),
        "below": ("n", "d", "s", task, ["b"]),
    }
    key = make_layer_key("n", "d", "s", task)
    assert len({key, *(make_layer_key(*parts) for parts in other.values())}) == 1 + len(other)
    assert make_layer_key("n", "d", "s", task._replace(profile="second")) == key
    shared_out = task.recipe.model_copy(update={"allocation": "owl", "strength": 0.5})
    assert make_layer_key("n", "d", "s", task._replace(recipe=shared_out)) == key


def test_a_layer_of_another_recipe_says_so_and_is_made_again_by_it(
    asking: Any, tmp_path: Path, computed: list[tuple[str, int]]
) -> None:
    warnings: list[str] = []
    bench = open_bench(asking, tmp_path / "run", warnings.append)
    profile = bench.profile(ignore)
    most, other = (parse_recipe(label).within_layers() for label in ("refit", "sparsegpt~half~dense"))
    order = order_allocation(most, plan(bench, profile, 0.4))
    odd = bench.weights.layers[3].name
    changed = order.layers[odd].model_copy(update={"recipe": other})
    order = order.model_copy(update={"layers": order.layers | {odd: changed}})
    checkpoint = bench.pruner.prune(profile, order, ignore)
    bits = snapshot(bench)
    manifest = json.loads(bench.store.path(checkpoint, ".json").read_text())
    record = manifest["layers"].pop(odd)
    assert manifest["profile"] == profile and Recipe.model_validate(manifest["recipe"]) == most
    assert all(list(layer) == ["artifact", "zeros"] for layer in manifest["layers"].values())
    assert Recipe.model_validate(record["recipe"]) == other
    assert record["profile"] == bench.profiles.find(profile, other, ignore) != profile
    bench.pruner.restore(DENSE)
    for name in (odd, bench.weights.layers[4].name):
        damage(artifact_path(bench, checkpoint, name))
    computed.clear()
    bench.pruner.restore(checkpoint)
    assert same(snapshot(bench), bits) and [method for method, _ in computed] == ["sparsegpt", "refit"]
    assert len(warnings) == 2


@pytest.mark.parametrize("recipe", [REFIT, MASK])
@pytest.mark.parametrize("hurt", [damage, Path.unlink])
def test_a_damaged_artifact_is_named_and_computed_again(
    bench: Workbench, warnings: list[str], recipe: Recipe, hurt: Callable[[Path], None]
) -> None:
    profile = bench.profile(ignore)
    checkpoint = prune(bench, profile, 0.4, recipe)
    weights = snapshot(bench)
    name = bench.weights.layers[4].name
    path = artifact_path(bench, checkpoint, name)
    content = path.read_bytes()
    bench.pruner.restore(DENSE)
    hurt(path)
    assert len(bench.pruner.restore(checkpoint)) == 14
    assert same(snapshot(bench), weights)
    assert path.read_bytes() == content
    assert len(warnings) == 1
    assert str(path) in warnings[0] and warnings[0].endswith(f"; layer {name} is computed again")


def test_pruning_does_not_trust_a_damaged_artifact_either(bench: Workbench, warnings: list[str]) -> None:
    profile = bench.profile(ignore)
    checkpoint = prune(bench, profile, 0.4)
    weights = snapshot(bench)
    bench.pruner.restore(DENSE)
    damage(artifact_path(bench, checkpoint, bench.weights.layers[4].name))
    assert prune(bench, profile, 0.4) == checkpoint
    assert same(snapshot(bench), weights)
    assert len(warnings) == 1


def test_an_artifact_that_comes_out_different_is_refused(
    bench: Workbench, warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = bench.profile(ignore)
    checkpoint = prune(bench, profile, 0.4)
    bench.pruner.restore(DENSE)
    name = bench.weights.layers[4].name
    damage(artifact_path(bench, checkpoint, name))

    def spoil(*arguments: Any, **options: Any) -> Pruned:
        pruned = prune_weight(*arguments, **options)
        return pruned._replace(weight_OI=2 * pruned.weight_OI)

    monkeypatch.setattr(tools.statistics.table, "prune_weight", spoil)
    with pytest.raises(DamagedArtifact) as refusal:
        bench.pruner.restore(checkpoint)
    assert str(refusal.value) == (
        f"layer {name} of checkpoint {checkpoint[:12]} is damaged and does not come out the same again"
    )


def test_damage_beyond_repair_is_refused_and_named(bench: Workbench, warnings: list[str]) -> None:
    profile = bench.profile(ignore)
    checkpoint = prune(bench, profile, 0.4)
    bench.pruner.restore(DENSE)
    damage(artifact_path(bench, checkpoint, bench.weights.layers[-1].name))
    stored = bench.profiles.read(profile)
    moment = bench.store.path(stored.moments[stored.group[bench.weights.layers[-1].name]], ".safetensors")
    damage(moment)
    bench.profiles._shared = None
    with pytest.raises(DamagedArtifact, match=rf"artifact {moment} is damaged"):
        bench.pruner.restore(checkpoint)


@pytest.mark.parametrize("which", ["manifest", "profile", "means"])
def test_a_damaged_manifest_or_profile_is_refused(bench: Workbench, which: str) -> None:
    profile = bench.profile(ignore)
    checkpoint = prune(bench, profile, 0.4)
    stored = bench.profiles.read(profile)
    settings, directory = bench.settings, bench.directory
    path = {
        "manifest": bench.store.path(checkpoint, ".json"),
        "profile": bench.store.path(profile, ".json"),
        "means": bench.store.path(stored.means, ".safetensors"),
    }[which]
    damage(path)
    close_workbench()
    again = open_bench(settings, directory)
    with pytest.raises(DamagedArtifact, match=rf"^artifact {path} is damaged: its content does not match its hash$"):
        again.pruner.restore(checkpoint) if which == "manifest" else again.profiles.read(profile)


def test_an_unknown_checkpoint_is_refused(bench: Workbench) -> None:
    with pytest.raises(DamagedArtifact, match="is missing"):
        bench.pruner.restore("0" * 64)


def test_a_damaged_layer_of_blocks_pruned_in_order_comes_back(bench: Workbench, warnings: list[str]) -> None:
    profile = bench.profile(ignore)
    checkpoint = bench.pruner.prune(profile, order_allocation(SEQUENTIAL, plan(bench, profile, 0.4)), ignore)
    whole = snapshot(bench)
    bench.pruner.restore(DENSE)
    damage(artifact_path(bench, checkpoint, bench.weights.layers[-1].name))
    bench.pruner.restore(checkpoint)
    assert same(snapshot(bench), whole)
    assert warnings
