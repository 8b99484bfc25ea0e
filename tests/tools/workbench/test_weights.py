"""What is in the model is told as its file has it."""

import hashlib
from pathlib import Path

import pytest
from safetensors import safe_open

from tests.benches import ignore, open_bench, prune
from tests.tiny import save_tiny_model, tiny_settings
from tools.models.save import export_model


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_masks_are_hashed_as_the_exported_file_has_them(
    architecture: str, tmp_path: Path, workbench_closed: None
) -> None:
    bench = open_bench(tiny_settings(save_tiny_model(tmp_path / "model", architecture)), tmp_path / "run")
    profile = bench.profile(ignore)
    dense = bench.weights.hash_masks()
    prune(bench, profile, 0.45)
    export_model(bench.model, bench.tokenizer, tmp_path / "exported", "card")

    prefix = "model.layers." if architecture == "llama" else "transformer.h."
    digest, zeros, weights = hashlib.sha256(), 0, 0
    with safe_open(tmp_path / "exported" / "model.safetensors", "pt") as file:
        names = [key for key in file.keys() if key.startswith(prefix) and file.get_tensor(key).ndim == 2]  # noqa: SIM118
        for key in sorted(name.removesuffix(".weight") for name in names):
            flat = file.get_tensor(f"{key}.weight").flatten().tolist()
            flat += [0.0] * (-len(flat) % 8)
            digest.update(key.encode())
            digest.update(bytes(sum((flat[i + j] != 0) << j for j in range(8)) for i in range(0, len(flat), 8)))
            zeros, weights = zeros + flat.count(0.0), weights + len(flat)
    assert bench.weights.hash_masks() == digest.hexdigest() != dense
    assert (zeros, weights) == bench.weights.count_zeros()
    assert zeros == round(0.45 * weights)
