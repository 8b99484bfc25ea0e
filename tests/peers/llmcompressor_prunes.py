"""Prunes by llm-compressor, run by the Python that has it: llmcompressor_prunes.py DENSE WINDOWS OUT METHOD TARGET

DENSE is a directory of transformers, WINDOWS a safetensors file of token ids `windows` (B, T), METHOD sparsegpt or
wanda, TARGET a fraction or N:M. OUT becomes a safetensors file of the weights of all linear layers but the head. The
settings of the methods are llm-compressor's own: 128 columns at once, damping 0.01, each block behind its pruned
predecessors.
Nothing of Billhook is imported.
"""

import sys

import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

MODIFIERS = {"sparsegpt": SparseGPTModifier, "wanda": WandaPruningModifier}


def prune(dense: str, windows: str, out: str, method: str, target: str) -> None:
    """Write the pruned layers."""
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    rows = [{"input_ids": row_T, "attention_mask": torch.ones_like(row_T)} for row_T in load_file(windows)["windows"]]
    if ":" in target:
        pruned, group = target.split(":")
        share, pattern = int(pruned) / int(group), target
    else:
        share, pattern = float(target), "0:0"
    modifier = MODIFIERS[method](sparsity=share, mask_structure=pattern, ignore=["re:.*lm_head"])
    oneshot(model=model, dataset=DataLoader(rows, batch_size=1), recipe=[modifier], num_calibration_samples=len(rows))
    linear = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    weights = {f"{name}.weight": layer.weight.detach().contiguous() for name, layer in linear.items()}
    save_file({name: weight for name, weight in weights.items() if not name.startswith("lm_head")}, out)


if __name__ == "__main__":
    prune(*sys.argv[1:])
