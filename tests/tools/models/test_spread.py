"""A model laid over several devices: the same bits, every statistic on its layer's own device, and who is refused."""

import tempfile
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from tests.spread import lay_over, split
from tests.tiny import (
    ARCHITECTURES,
    SHARING,
    VOCABULARY,
    make_tiny_config,
    make_tiny_model,
    tiny_settings,
)
from tools.base.errors import UserError
from tools.base.progress import ignore_progress as ignore
from tools.measure.recall import EncodedPair, read_answers
from tools.models import load as sources
from tools.models.blocks import Blocks, check_blocks
from tools.models.layers import find_blocks, find_layers
from tools.models.load import load_model, pick_device, spread_blocks
from tools.models.readout import check_readout, compute_hidden, measure_losses
from tools.plans.allocate import allocate
from tools.plans.recipe import parse_recipe
from tools.plans.work_order import order_allocation
from tools.statistics import passage, walks
from tools.surgery.blocks import measure_without, pass_block, read_inputs
from tools.surgery.curves import begin_gradients, sum_moments
from tools.surgery.parts import KINDS, find_parts
from tools.workbench import bench as workbench
from tools.workbench.bench import Workbench

WINDOWS, LENGTH, GRADIENT = 3, 24, 2


# --- the same bits -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *SHARING, "qwen3_moe"])
def test_hooks_change_no_bit_of_blocks_and_gradients(architecture: str) -> None:
    ids_BT = torch.randint(0, VOCABULARY, (WINDOWS, LENGTH), generator=torch.Generator().manual_seed(0))
    results = []
    for model in (make_tiny_model(architecture), lay_over(make_tiny_model(architecture))):
        check_readout(model, ids_BT[0])
        blocks, layers = Blocks(model), find_layers(model)
        walked = walks.Walks(blocks, layers, ids_BT, GRADIENT, 3, Path(tempfile.gettempdir()))
        sums = [walked.moments((0, WINDOWS), walks.Walk(0, "run"), block, True, "profile")[0][0][1] for block in (0, 1)]
        sums += [walked.gradients((0, WINDOWS), walks.Walk(0, "run"), block)[0][1] for block in (1, 0)]
        loss, hidden_TD = measure_losses(model, ids_BT[0], None)
        results.append((*sums, {"hidden": hidden_TD, "nll": torch.tensor(loss.nll)}))
    assert "_hf_hook" in vars(find_blocks(model)[1])
    for plain, hooked in zip(*results, strict=True):
        assert plain.keys() == hooked.keys() and all(torch.equal(plain[name], hooked[name]) for name in plain)


def test_a_run_of_the_workbench_comes_to_the_same_masks(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_over(settings: Any, _scratch: Path) -> Any:
        model, tokenizer = load_model(settings)
        return lay_over(model), tokenizer

    recipe = parse_recipe("refit:kappa")
    found = []
    for name in ("plain", "spread"):
        (tmp_path / name).mkdir()
        bench = Workbench(tiny_settings(tiny_llama), tmp_path / name, pytest.fail, ignore)
        profile = bench.profile(ignore)
        allocation = allocate(bench.curves.describe_layers(profile, recipe, ignore), 0.5, recipe)
        checkpoint = bench.pruner.prune(profile, order_allocation(recipe, allocation), ignore)
        found.append(
            (
                profile,
                checkpoint,
                bench.weights.hash_masks(),
                bench.evaluator.evaluate(checkpoint, "test", profile, ignore),
            )
        )
        monkeypatch.setattr(workbench, "load_model", load_over)
    assert found[0] == found[1]


# --- every tensor on the right device ------------------------------------------------------------------------------


class Stack:
    """As `StateStack`, for tensors without numbers."""

    def __init__(self, _directory: Path) -> None:
        self._lists: list[list[Tensor]] = []
        self.height = 0

    def push(self, states: list[Tensor]) -> None:
        self._lists.append([state.cpu() for state in states])
        self.height += 1

    def pop(self) -> list[Tensor]:
        self.height -= 1
        return self._lists.pop()


def build_over_two(architecture: str) -> Any:
    """A model without numbers, on the devices "cpu" and "cpu:1": torch refuses to mix them, as it does two GPUs."""
    model = transformers.AutoModelForCausalLM.from_config(make_tiny_config(architecture))
    devices = {name: "cpu:1" if place else "cpu" for name, place in split(model).items()}
    moved: dict[int, tuple[Any, nn.Parameter]] = {}  # tied weights stay one
    for name, device in devices.items():
        for module in model.get_submodule(name).modules():
            for key, weight in module._parameters.items():
                if weight is not None:
                    copy = nn.Parameter(weight.detach().to(device), requires_grad=False)
                    module._parameters[key] = moved.setdefault(id(weight), (weight, copy))[1]
            for key, buffer in module._buffers.items():
                module._buffers[key] = None if buffer is None else buffer.to(device)
    accelerate.hooks.attach_align_device_hook_on_blocks(
        model.eval(), {**devices, "": "cpu"}, offload=dict.fromkeys(devices, False)
    )
    return model


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
def test_no_two_devices_meet(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passage, "StateStack", Stack)
    monkeypatch.setattr(walks, "mean_absolute_gradient", lambda g_TO, x_TI: float(len(g_TO.T @ x_TI)))
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = build_over_two(architecture)
        blocks, layers = Blocks(model), find_layers(model)
        ids_BT = torch.zeros((WINDOWS, LENGTH), dtype=torch.long)
        places = {layer.name: layer.weight_OI.device for layer in layers}
        assert {str(place) for place in places.values()} == {"cpu", "cpu:1"}
        assert str(blocks.run(ids_BT[0], 1, blocks.embed(ids_BT[0])).device) == "cpu:1"
        assert str(compute_hidden(model, ids_BT).device) == "cpu", "where the head is"
        walked = walks.Walks(blocks, layers, ids_BT, GRADIENT, 3, Path("."))
        up, down = walks.Walk(0, "run"), walks.Walk(1, "run")
        for block in (0, 1):
            [(_, sums)], _ = walked.moments((0, WINDOWS), up, block, True, "moments")
            assert all(total.device == places[name.partition("/")[2]] for name, total in sums.items())
        for block in (1, 0):
            [(_, sums)] = walked.gradients((0, WINDOWS), down, block)
            own = {name: total for name, total in sums.items() if not name.startswith("language")}
            assert all(total.device == places[name.partition("/")[2]] for name, total in own.items())
            parts = {layer.name: [torch.zeros(layer.weight_OI.shape)] for layer in layers if layer.block == block}
            walked.curves((0, WINDOWS), down, block, parts)
        for measure in (
            lambda: measure_losses(model, ids_BT[0], torch.zeros(LENGTH, 32)),
            lambda: read_answers(model, [EncodedPair([1, 2, 3], 1)]),
            lambda: check_readout(model, ids_BT[0]),
            lambda: check_blocks(blocks, ids_BT[0]),
        ):
            with pytest.raises(DataDependentOutputException):  # the number at the very end, which nobody has
                measure()
        members = [find_parts(model, kind)[1] for kind in KINDS if kind == "neurons" or architecture != "gpt2"]
        states = [blocks.embed(ids_T) for ids_T in ids_BT]
        read = pass_block(blocks, ids_BT, 1, pass_block(blocks, ids_BT, 0, states))
        above = begin_gradients(blocks, ids_BT, read, 0, 0)
        sum_moments(blocks, 1, members, ids_BT, pass_block(blocks, ids_BT, 0, states), above)
        inputs = read_inputs(blocks, [0], ids_BT)
        with pytest.raises(DataDependentOutputException):
            measure_without(blocks, [0, 1], ids_BT, [own[1] for own in inputs], [read_BTD[0] for read_BTD in read])


# --- where blocks go -------------------------------------------------------------------------------------------------


def build_meta(blocks: int) -> Any:
    config = make_tiny_config("qwen3")
    config.num_hidden_layers, config.layer_types = blocks, ["full_attention"] * blocks
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


def test_whole_blocks_go_to_one_gpu_and_each_gets_its_share() -> None:
    model = build_meta(8)
    places = spread_blocks(model, {0: 10**9, 1: 10**9})
    assert sorted(places) == sorted(
        ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", *(f"model.layers.{i}" for i in range(8))]
    )
    assert [places[f"model.layers.{i}"] for i in range(8)] == [0, 0, 0, 1, 1, 1, 1, 1]
    assert (places["model.embed_tokens"], places["lm_head"]) == (0, 1)
    assert set(spread_blocks(model, {0: 10**9}).values()) == {0}


def test_what_does_not_fit_is_not_left_on_the_cpu(caplog: pytest.LogCaptureFixture) -> None:
    model = build_meta(8)
    with pytest.raises(UserError) as caught:
        spread_blocks(model, {0: 150_000, 1: 100_000})
    assert str(caught.value) == (
        "the model's 0.0 GB do not fit the GPUs, which have 0.0 GB free in all: model.layers.5 would be left on the "
        "CPU or on disk, where nothing can be pruned; use more or larger GPUs"
    )
    assert caplog.messages == [], "nothing is said of GPUs that are not here"


# --- loading ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "pick_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr(sources, "_measure_gpus", lambda: {0: 10**9, 1: 10**9})


def test_a_model_is_loaded_to_where_its_blocks_go(
    tiny_llama: Path, two_gpus: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    read = transformers.AutoModelForCausalLM.from_pretrained

    def from_pretrained(*given: Any, **options: Any) -> Any:
        asked.append(options["device_map"])
        return read(*given, **options)

    monkeypatch.setattr(sources, "spread_blocks", lambda model, memory: dict.fromkeys(split(model), "cpu"))
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    model, _ = load_model(tiny_settings(tiny_llama, device="spread"))
    monkeypatch.undo()
    plain, _ = load_model(tiny_settings(tiny_llama))
    assert asked == [dict.fromkeys(split(plain), "cpu")] and not model.training
    state = model.state_dict()
    assert all(torch.equal(state[name], weight) for name, weight in plain.state_dict().items())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_no_gpu_no_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"^device spread was asked for, but torch sees no GPU; use --device cpu$"):
        pick_device("spread")


def test_workers_have_one_gpu_each(tiny_llama: Path) -> None:
    with pytest.raises(ValueError, match="device spread is one model on all GPUs, and a worker has one GPU; leave"):
        tiny_settings(tiny_llama, device="spread", workers="2")
