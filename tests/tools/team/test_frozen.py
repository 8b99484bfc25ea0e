"""Values on their way between processes."""

import pytest
import torch

from tools.statistics.requests import Here
from tools.team.places import freeze, thaw
from tools.team.worker import LayerWork


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.uint8, torch.bool]
)
def test_tensors_come_out_as_they_went_in(dtype: torch.dtype) -> None:
    tensor = torch.arange(12).reshape(3, 4).to(dtype).T
    work = LayerWork("x", 3, Here(tensor), tensor[:0], tensor[0, 0])
    back = thaw(freeze({"a": [work, (1, "b", None)], 2: tensor}))
    assert back["a"][1] == (1, "b", None) and isinstance(back["a"][0], LayerWork) and back["a"][0].name == "x"
    layer = back["a"][0]
    pairs = [(back[2], tensor), (layer.dense_OI.fetch(), tensor), (layer.mean_square_I, tensor[:0])]
    for ours, theirs in [*pairs, (layer.gradient_square_O, tensor[0, 0])]:
        assert ours.dtype == dtype and torch.equal(ours, theirs)
    back[2].fill_(0)  # memory of its own
    assert not torch.equal(back[2], tensor)
