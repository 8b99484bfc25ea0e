"""A dense model and the same one with its layers packed, side by side in one process: speed, bytes, tokens."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from billhook_kernels.packed import PackedLinear, pack_rows, settle_layers
from tools.base.errors import UserError
from tools.base.memory import measure_peak
from tools.base.settings import WorkbenchSettings
from tools.experiments.speed import BenchSettings, Task, time_in_turn
from tools.measure.continuations import decode
from tools.models.experts import ExpertLinear
from tools.models.layers import Layer, find_layers
from tools.models.load import find_model, load_model, locate_model
from tools.models.packing import LEAST_SPARSITY
from tools.results.speed import Result, compare_rounds

PROMPT, DECODED = 8, 32
"""Tokens read and tokens decoded."""

SPARSITY = 0.45
"""Share of each row's weights, the least ones, that are set to zero in a dense model: speed does not ask which."""

OF_WEIGHTS = (".safetensors", ".gguf", ".bin", ".pt", ".pth")
"""Ends of the names of files that hold weights, whether or not they are read here."""

TARGET = 0.714
"""Seconds of packed decoding, of dense decoding: 1.4 times as many tokens a second."""


class Pair(NamedTuple):
    """One model whose layers can be exchanged."""

    model: Any
    dense: dict[str, nn.Module]
    packed: dict[str, PackedLinear]
    prompt_BT: Tensor

    def install(self, modules: Mapping[str, nn.Module]) -> None:
        """Put the dense or the packed layers into the model."""
        for name, module in modules.items():
            parent, _, last = name.rpartition(".")
            setattr(self.model.get_submodule(parent), last, module)

    def decode(self) -> Tensor:
        """The prompt and DECODED tokens after it, (1, PROMPT + DECODED), with the layers that are installed."""
        return decode(self.model, self.prompt_BT, DECODED, least=DECODED)

    @property
    def share(self) -> float:
        """Bytes of the packed layers, of those that they are when dense."""
        dense = sum(layer.in_features * layer.out_features * layer.values.itemsize for layer in self.packed.values())
        return sum(layer.packed.nbytes for layer in self.packed.values()) / dense


def open_pair(source: str) -> Pair:
    """A model in bf16 on the CPU, and its layers packed. Raises UserError.

    Of a directory with a config.json and no weights a model with random ones is made. A model with less than
    LEAST_SPARSITY of zeros loses SPARSITY of each row's weights. Fused experts stay dense in both.
    """
    model = _load(source)
    layers = [layer for layer in find_layers(model) if not isinstance(layer.module, ExpertLinear)]
    zeros = sum(int((layer.weight_OI == 0).sum()) for layer in layers)
    if zeros < LEAST_SPARSITY * sum(layer.weight_OI.numel() for layer in layers):
        for layer in layers:
            _drop_least(layer)
    dense = {layer.name: layer.module for layer in layers}
    packed = {}
    for layer in layers:
        packed[layer.name] = PackedLinear(pack_rows(layer.weight_OI), layer.module._parameters.get("bias"))
    settle_layers(list(packed.values()))
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    return Pair(model, dense, packed, torch.randint(vocabulary, (1, PROMPT), generator=generator))


def _load(source: str) -> Any:
    import transformers

    place = find_model(source)
    files = Path(locate_model(place).path)
    if files.is_dir() and not any(file.suffix in OF_WEIGHTS for file in files.iterdir()):
        try:
            config = transformers.AutoConfig.from_pretrained(place)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        except (OSError, ValueError) as error:
            raise UserError(f"no model can be made of {place}/config.json: {' '.join(str(error).split())}") from error
        return model.eval().requires_grad_(False)
    return load_model(WorkbenchSettings(model=place, dtype="bf16", device="cpu"))[0]


def _drop_least(layer: Layer) -> None:
    size_OI = layer.weight_OI.float().abs()
    count = round(SPARSITY * size_OI.shape[1])
    if count:
        threshold_O1 = size_OI.kthvalue(count, dim=1, keepdim=True).values
        layer.write(torch.where(size_OI > threshold_O1, layer.weight_OI, 0))


@torch.no_grad()
def describe_difference(pair: Pair) -> str:
    """How many tokens are alike, and how far the logits of the prompt part."""
    pair.install(pair.dense)
    dense_T, dense_logits = pair.decode()[0, PROMPT:], pair.model(pair.prompt_BT).logits
    pair.install(pair.packed)
    packed_T, packed_logits = pair.decode()[0, PROMPT:], pair.model(pair.prompt_BT).logits
    alike = int((dense_T == packed_T).cumprod(0).sum())
    apart, size = float((packed_logits - dense_logits).abs().max()), float(dense_logits.abs().max())
    return f"the first {alike} of {DECODED} tokens alike, logits at most {apart:.3g} apart (the greatest is {size:.3g})"


def bench_decode(source: str, settings: BenchSettings) -> Result:
    """Greedy decoding with packed layers against the same model with dense ones, bf16, one sequence, on the CPU."""
    pair = open_pair(source)
    difference = describe_difference(pair)
    packed, dense = time_in_turn(
        [
            Task(pair.decode, lambda: pair.install(pair.packed)),
            Task(pair.decode, lambda: pair.install(pair.dense)),
        ],
        settings,
    )
    what = f"{DECODED} tokens after {PROMPT}, {len(pair.packed)} layers packed: {pair.share:.3f} of their dense bytes; "
    peak = measure_peak()
    return compare_rounds("decode", what + difference, packed, "the same with dense layers, bf16", dense, TARGET, peak)
