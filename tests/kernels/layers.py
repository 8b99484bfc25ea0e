"""Small layers with the traits of real ones, and the error of pruning them, in float64."""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tools.plans.methods import METHODS

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""Number formats of weights."""

MASK_ONLY = tuple(sorted(name for name, method in METHODS.items() if not method.changes_survivors))
"""Methods that leave the survivors as they are."""


class Layer(NamedTuple):
    """A weight, the second moment of its inputs and the mean square of the gradients of its outputs, all fp32."""

    weight: Tensor
    moment: Tensor
    gamma: Tensor


def make_layer(rows: int, columns: int, seed: int = 0, tokens: int = 600) -> Layer:
    """Correlated inputs, a few of them loud; outputs that do not matter equally."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    x = torch.randn(tokens, columns, generator=generator) @ mix
    x[:, ::9] *= 5
    weight = torch.randn(rows, columns, generator=generator)
    return Layer(weight, x.T @ x / tokens, torch.rand(rows, generator=generator) + 0.01)


def true_errors(pruned: NDArray[np.float64], layer: Layer) -> NDArray[np.float64]:
    """Mean over tokens of ((W - W')x)^2 of every row, without damping."""
    change = layer.weight.double().numpy() - pruned
    return np.asarray(np.einsum("oi,ij,oj->o", change, layer.moment.double().numpy(), change))


def make_sparse(rows: int, columns: int, dtype: torch.dtype, sparsity: float = 0.5, seed: int = 0) -> Tensor:
    """A weight of which about `sparsity` is zero."""
    generator = torch.Generator().manual_seed(seed)
    weight_OI = torch.randn(rows, columns, generator=generator)
    return torch.where(torch.rand(rows, columns, generator=generator) < sparsity, 0, weight_OI).to(dtype)
