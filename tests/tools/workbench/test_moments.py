"""Second moments on disk: the upper triangle."""

from pathlib import Path

import torch

from tools.workbench.moments import read_moment, write_moment
from tools.workbench.store import ArtifactStore

CPU = torch.device("cpu")


def test_a_second_moment_is_its_upper_triangle_on_disk_and_the_same_again(tmp_path: Path) -> None:
    store, x_TI = ArtifactStore(tmp_path), torch.randn(9, 300, generator=torch.Generator().manual_seed(0))
    upper_II = torch.triu(x_TI.T @ x_TI)
    moment_II = upper_II + torch.triu(upper_II, 1).T
    artifact = write_moment(store, moment_II)
    assert read_moment(store, artifact, CPU).equal(moment_II)
    assert store.path(artifact, ".safetensors").stat().st_size < 0.62 * 4 * moment_II.numel()
