"""Where what a polish keeps of each survivor lies: with the weights, or on the CPU where a GPU has too little room."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.tiny import make_tiny_model
from tools.models.layers import Layer, find_layers
from tools.polish.gradients import STATE_SHARE, Place, Survivors, count_state_bytes, place_state


def prune_some() -> list[Layer]:
    layers = find_layers(make_tiny_model("llama"))[:3]
    for layer in layers:
        layer.write(layer.weight_OI * (layer.weight_OI > 0))
    return layers


def put_on_gpus(survivors: Survivors, gpus: list[int]) -> Survivors:
    """As if layers lay on these GPUs."""
    survivors.layers = [
        _Elsewhere(layer, torch.device("cuda", gpu))  # type: ignore[misc]
        for layer, gpu in zip(survivors.layers, gpus, strict=True)
    ]
    return survivors


class _Elsewhere:
    def __init__(self, layer: Layer, device: torch.device) -> None:
        self.name = layer.name
        self.weight_OI = SimpleNamespace(device=device, element_size=layer.weight_OI.element_size)


@pytest.mark.parametrize("short", [False, True])
def test_it_is_by_what_is_free_on_each_gpu(short: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = prune_some()
    kept = [int((layer.weight_OI != 0).sum()) * count_state_bytes(4, "fp32") for layer in layers]
    wanted = {0: kept[0] + kept[1], 1: kept[2]}
    room = {gpu: int(size / STATE_SHARE) + 1 for gpu, size in wanted.items()}
    room[1] -= 3 if short else 0

    def find_free(device: torch.device) -> tuple[int, int]:
        return room[device.index], 10**12

    monkeypatch.setattr(torch.cuda, "mem_get_info", find_free)
    survivors = put_on_gpus(Survivors(layers), [0, 0, 1])
    assert survivors.place.away is short
    room.clear()
    assert survivors.place.away is short, "it is asked once"


@pytest.mark.parametrize(
    ("gpu", "cpu", "place"),
    [
        (200, 0, Place(away=False, means="fp32")),
        (199, 600, Place(away=True, means="fp32")),
        (199, 599, Place(away=True, means="bf16")),
    ],
)
def test_means_take_half_where_neither_gpus_nor_cpu_memory_have_room(gpu: int, cpu: int, place: Place) -> None:
    assert STATE_SHARE == 0.5
    assert place_state([(100, gpu), (200, 400)], cpu) == place


@pytest.mark.parametrize(("short", "means"), [(0, "fp32"), (1, "bf16")])
def test_on_a_cpu_it_is_by_what_is_free_there(short: int, means: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = prune_some()
    kept = sum(int((layer.weight_OI != 0).sum()) for layer in layers)
    free = int(kept * count_state_bytes(4, "fp32") / STATE_SHARE)
    monkeypatch.setattr("tools.polish.gradients.count_free", lambda: free - short)
    assert Survivors(layers).place.means == means
    assert count_state_bytes(4, "fp32") - count_state_bytes(4, "bf16") == 4


def test_on_a_cpu_no_gpu_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError

    monkeypatch.setattr(torch.cuda, "mem_get_info", refuse)
    survivors = Survivors(prune_some())
    values = survivors.read()
    assert survivors.place == Place(away=False, means="fp32")
    before = [layer.weight_OI.clone() for layer in survivors.layers]
    survivors.write(values)
    assert all(torch.equal(layer.weight_OI, was) for layer, was in zip(survivors.layers, before, strict=True))
