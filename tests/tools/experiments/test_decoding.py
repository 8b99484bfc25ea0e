"""A model decodes with packed and with dense layers, in turn."""

import json
from pathlib import Path

import pytest
import torch

from billhook_kernels.native import explain_absence
from billhook_kernels.packed import PackedLinear
from tests.tiny import make_tiny_config, make_tiny_model, save_tiny_model
from tools.base.errors import UserError
from tools.bench import main
from tools.experiments.decoding import DECODED, PROMPT, SPARSITY, describe_difference, open_pair
from tools.models.layers import find_layers

pytestmark = pytest.mark.skipif(bool(explain_absence(torch.bfloat16)), reason=explain_absence(torch.bfloat16))


def test_dense_models_lose_the_least_weights_of_each_row(tiny_llama: Path) -> None:
    pair = open_pair(str(tiny_llama))
    before = {layer.name: layer.weight_OI.bfloat16() for layer in find_layers(make_tiny_model("llama"))}
    for layer in find_layers(pair.model):
        gone_OI = layer.weight_OI == 0
        count = round(SPARSITY * gone_OI.shape[1])
        size_OI = before[layer.name].float().abs()
        assert bool((gone_OI.sum(1) >= count).all())  # more where sizes tie
        kept_O = torch.where(gone_OI, torch.inf, size_OI).amin(1)
        assert bool((torch.where(gone_OI, size_OI, 0).amax(1) < kept_O).all())
        assert torch.equal(layer.weight_OI, torch.where(gone_OI, 0, before[layer.name]))


def test_layers_are_exchanged_and_say_the_same(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, "gpt2")
    pair = open_pair(str(tmp_path))
    assert 0.6 < pair.share < 0.9  # tiny rows pay much for their offsets
    assert describe_difference(pair).startswith(f"the first {DECODED} of {DECODED} tokens alike, logits at most 0")
    for modules in (pair.dense, pair.packed):
        pair.install(modules)
        assert all(pair.model.get_submodule(name) is module for name, module in modules.items())
        assert pair.decode().shape == (1, PROMPT + DECODED)
    assert all(isinstance(module, PackedLinear) for module in pair.packed.values())


def test_a_config_alone_gets_random_weights(tmp_path: Path) -> None:
    make_tiny_config("opt").save_pretrained(tmp_path)
    assert len(open_pair(str(tmp_path)).packed) == 12
    (tmp_path / "pytorch_model.bin").write_bytes(b"weights of another format")
    with pytest.raises(UserError, match=r"^model .* could not be loaded: "):
        open_pair(str(tmp_path))


def test_the_bench_times_it(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bench.json"
    assert main(["--decode", str(tiny_llama), "--rounds=2", "--json", str(path)]) == 0
    (result,) = json.loads(path.read_text())["results"]
    assert result["name"] == "decode" and len(result["seconds"]) == 2 and result["target"] == 0.714
    assert result["what"].startswith("32 tokens after 8, 14 layers packed: 0.")
    assert json.loads(path.read_text())["settings"]["dtype"] == "bf16"
    capsys.readouterr()
    assert main(["--decode", "x/y", "--only=obs"]) == 2
    assert capsys.readouterr().err == "error: --decode, --workers, --stream and --only exclude one another\n"
