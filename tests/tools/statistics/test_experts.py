"""Statistics of fused experts against sums over the tokens that the stock model sends to each, in float64."""

import copy
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.tiny import MIXTURES, VOCABULARY, make_tiny_model
from tools.base.progress import ignore_progress as ignore
from tools.models.blocks import Blocks
from tools.models.layers import find_layers
from tools.plans.layer_profile import LEVELS
from tools.statistics.collect import collect_statistics, measure_kappa
from tools.statistics.experts import FEW, describe_few, fill_up, fill_up_moments, find_few
from tools.statistics.known import ModelStatistics
from tools.statistics.requests import Here, Parts, ShardRequest, T, work_alone
from tools.statistics.shards import Span
from tools.statistics.walks import Walks

SCRATCH = Path(tempfile.gettempdir())
WINDOWS, LENGTH, BACKWARD, SEED = 4, 100, 3, 5
TOKENS = WINDOWS * LENGTH
EXPERTS = "model.layers.{}.mlp.experts.{}.{}"
STARVED = 2
"""The first expert of `make_starved` that no token is sent to."""


def make_windows() -> Tensor:
    return torch.randint(0, VOCABULARY, (WINDOWS, LENGTH), generator=torch.Generator().manual_seed(1))


def collect(model: Any) -> tuple[ModelStatistics, dict[str, Tensor]]:
    layers, moments = find_layers(model), dict[str, Tensor]()
    team, extent = work_alone(Blocks(model), layers, make_windows(), BACKWARD, SEED, SCRATCH)
    return collect_statistics(team, extent, layers, ignore, moments.__setitem__), moments


def make_starved() -> Any:
    """A model in which every token goes to one of the first two experts, and the other two see none."""
    model = make_tiny_model("qwen3_moe")
    for block in model.model.layers:
        router = block.mlp.gate
        router.top_k, router.weight[1] = 1, -router.weight[0]
        router.weight[STARVED:] = 0
    return model


def make_double(model: Any) -> Any:
    """The stock model in float64, its experts run as transformers' own classes say."""
    double = copy.deepcopy(model).double()
    double.set_experts_implementation("eager")
    return double


def list_routed(model: Any, ids_BT: Tensor) -> dict[tuple[int, int], Tensor]:
    """By block and expert, what the stock model sends there, float64."""
    double, found = make_double(model), dict[tuple[int, int], list[Tensor]]()

    def see(block: int) -> Callable[[Any, tuple[Tensor, ...], Any], None]:
        def hook(module: Any, inputs: tuple[Tensor, ...], _output: Any) -> None:
            x_TD, index_TK = inputs[:2]
            for expert in range(module.num_experts):
                found.setdefault((block, expert), []).append(x_TD[(index_TK == expert).any(1)])

        return hook

    for number, block in enumerate(double.model.layers):
        block.mlp.experts.register_forward_hook(see(number))
    for ids_T in ids_BT:
        double(input_ids=ids_T[None], use_cache=False)
    return {place: torch.cat(parts) for place, parts in found.items()}


def run_first(module: Any, expert: int, x_TD: Tensor) -> Tensor:
    """What an expert's down projection reads, straight from the stacked parameters."""
    weight = module.gate_up_proj[expert].double()
    y_TI = x_TD @ (weight if module.is_transposed else weight.T)
    if module.has_bias:
        y_TI = y_TI + module.gate_up_proj_bias[expert].double()
    joined: Tensor = module._apply_gate(y_TI)
    return joined


@pytest.mark.parametrize("architecture", MIXTURES)
def test_an_expert_is_known_by_the_tokens_that_are_sent_to_it(architecture: str) -> None:
    model = make_tiny_model(architecture)
    statistics, moments = collect(model)
    assert statistics.few == {}
    for (block, expert), x_TD in list_routed(model, make_windows()).items():
        assert 32 < len(x_TD) < TOKENS
        h_TI = run_first(model.model.layers[block].mlp.experts, expert, x_TD)
        for part, rows in (("gate_proj", x_TD), ("up_proj", x_TD), ("down_proj", h_TI)):
            name = EXPERTS.format(block, expert, part)
            expected = rows.T @ rows / TOKENS
            torch.testing.assert_close(moments[statistics.group[name]].double(), expected, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(statistics.mean_square[name].double(), expected.diag(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("architecture", [*MIXTURES, "llama4_text"])
def test_gradients_of_experts_are_those_of_the_stacked_parameters(architecture: str) -> None:
    model = make_tiny_model(architecture)
    statistics, _ = collect(model)
    double = make_double(model).requires_grad_(True)
    layers, total = find_layers(double), dict[str, float]()
    for ids_T in make_windows()[:BACKWARD]:
        double.zero_grad()
        logits = double(input_ids=ids_T[None], use_cache=False).logits[0]
        F.cross_entropy(logits[:-1], ids_T[1:]).backward()
        for layer in layers:
            weight, stacked = layer.weight_OI, layer.parameter
            assert stacked.grad is not None
            gradient = stacked.grad.as_strided(weight.shape, weight.stride(), weight.storage_offset())
            total[layer.name] = total.get(layer.name, 0.0) + float(gradient.abs().mean()) / BACKWARD
    assert statistics.gradient == pytest.approx(total, rel=1e-3)


def test_an_expert_that_was_sent_few_tokens_has_those_of_all_filled_in() -> None:
    model = make_starved()
    statistics, moments = collect(model)
    for block in range(2):
        routed = {expert: x for (b, expert), x in list_routed(model, make_windows()).items() if b == block}
        assert len(routed[STARVED]) == 0
        everything = torch.cat([routed[expert] for expert in range(4)])
        average = everything.T @ everything / len(everything)
        for part in ("gate_proj", "up_proj", "down_proj"):
            name = EXPERTS.format(block, STARVED, part)
            assert statistics.few[name] == 0
            assert bool((statistics.gradient_square[name] > 0).all()) and min(statistics.kappa[name]) > 0
        leader = statistics.group[EXPERTS.format(block, STARVED, "gate_proj")]
        torch.testing.assert_close(moments[leader].double(), average / TOKENS, rtol=1e-4, atol=1e-7)
    assert describe_few(statistics.few, find_layers(model)) == (
        "4 of 8 experts were sent fewer calibration tokens than they have inputs, 4 of them fewer than 64; their "
        "statistics are filled up with those of all experts of their block: "
        "model.layers.0.mlp.experts.2 (0), model.layers.0.mlp.experts.3 (0), "
        "model.layers.1.mlp.experts.2 (0), model.layers.1.mlp.experts.3 (0). "
        "More calibration windows give them their own"
    )


def test_filling_up_is_a_mean_of_ones_own_tokens_and_average_ones() -> None:
    own, other = torch.tensor([8.0, 0.0]), torch.tensor([0.0, 90.0])
    sums = {"A/few": own, "A/many": other, "n/few": torch.tensor(2.0), "n/many": torch.tensor(18.0)}
    assert find_few(sums, ["few", "many"], enough=10, tokens=100) == {"few": 2}
    fill_up(sums, "A", ["few", "many"], enough=10, tokens=100)
    # Eight average tokens beside two of its own, and of these ten what two come to.
    assert sums["A/few"].tolist() == pytest.approx([2 / 10 * (8 + 8 * 8 / 20), 2 / 10 * (8 * 90 / 20)])
    assert sums["A/many"].tolist() == [0.0, 90.0]
    assert find_few(sums, ["few", "many"], enough=10, tokens=2) == {}, "it saw the whole text"


@pytest.mark.parametrize("full", [True, False])
def test_what_two_projections_read_is_filled_up_once(full: bool) -> None:
    """Gate and up read the same, and both their pools name the gate."""
    enough, tokens = (16 if full else FEW), 100
    own, other = torch.diag(torch.tensor([8.0, 0.0])), torch.diag(torch.tensor([0.0, 92.0]))
    sums = {"n/e.0.gate": torch.tensor(8.0), "n/e.1.gate": torch.tensor(92.0)}
    for name, moment in (("e.0.gate", own), ("e.1.gate", other)):
        sums |= {f"A/{name}": moment} if full else {f"a/{name}": moment.diagonal()}
    layers: list[Any] = [
        SimpleNamespace(name=f"e.{i}.{part}", pool=f"e.*.{part}", weight_OI=torch.zeros(4, 16))
        for i in (0, 1, 2)
        for part in ("gate", "up")
    ]
    group = {layer.name: f"{layer.name.rpartition('.')[0]}.gate" for layer in layers}
    group["e.2.up"] = "e.2.up"  # which nothing was sent to, so that nobody knows what it reads with
    few = fill_up_moments(sums, tokens, layers, group, full)
    assert few == {"e.0.gate": 8, "e.0.up": 8, "e.2.gate": 0, "e.2.up": 0}
    kind = "A" if full else "a"
    found = [sums[f"{kind}/e.{i}.gate"] for i in (0, 1)]
    first, second = (x.diagonal() if full else x for x in found)
    lacking = enough - 8
    assert first.tolist() == pytest.approx([8 / enough * (8 + lacking * 8 / 100), 8 / enough * lacking * 92 / 100])
    assert second.tolist() == [0.0, 92.0]
    for part in ("gate", "up"):
        average = sums[f"{kind}/e.2.{part}"]
        assert (average.diagonal() if full else average).tolist() == pytest.approx([0.08, 0.92]), "as they were sent"


class Two:
    """A team of two processes, each with a model of its own."""

    ahead = 1

    def __init__(self, walks: tuple[Walks, Walks], shards: int) -> None:
        self._shares: list[tuple[Walks, Span]] = [(walks[0], (0, shards // 2)), (walks[1], (shards // 2, shards))]

    def ask(self, request: ShardRequest[T]) -> Callable[[Callable[[int], None]], list[T]]:
        answers = [request.run(walks, span) for walks, span in self._shares]
        return lambda tick: answers


def test_two_workers_come_to_the_same_bits() -> None:
    def begin() -> Walks:
        model = make_starved()
        return Walks(Blocks(model), find_layers(model), make_windows(), BACKWARD, SEED, SCRATCH, ahead=1)

    two = Two((begin(), begin()), WINDOWS)
    model = make_starved()
    layers = find_layers(model)
    alone, extent = work_alone(Blocks(model), layers, make_windows(), BACKWARD, SEED, SCRATCH)
    found: list[tuple[Mapping[str, Tensor], ModelStatistics]] = []
    for team in (alone, two):
        moments = dict[str, Tensor]()
        found.append((moments, collect_statistics(team, extent, layers, ignore, moments.__setitem__)))
    (ours, mine), (theirs, other) = found
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert (mine.kappa, mine.gradient, mine.few, mine.group) == (other.kappa, other.gradient, other.few, other.group)

    def parts(chosen: Any) -> Parts:
        return [Here({layer.name: [layer.weight_OI / len(LEVELS)] * len(LEVELS) for layer in chosen})]

    curves = [measure_kappa(team, extent, layers, ignore, parts) for team in (alone, two)]
    assert curves[0] == curves[1] and min(map(min, curves[0].values())) > 0
    assert FEW < BACKWARD * LENGTH
