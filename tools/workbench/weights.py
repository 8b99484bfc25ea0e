"""The weights that are in the loaded model now: installed layer by layer, and put back bit for bit."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from billhook_kernels.packed import pack_bits
from tools.base.errors import DamagedArtifact
from tools.base.progress import Warn
from tools.models.artifacts import pack_pruned, unpack_pruned
from tools.models.layers import Biases, Layer
from tools.models.mapped import Mapped, map_dense, view_bytes
from tools.models.unfinished import Marks
from tools.statistics.walks import layers_by_block
from tools.workbench.store import DENSE, ArtifactStore


class Weights:
    """The prunable layers of one model, each with the artifact that it has now."""

    def __init__(
        self, layers: Sequence[Layer], blocks: int, store: ArtifactStore, warn: Warn, source: Mapped | None = None
    ) -> None:
        """The layers, in `blocks` blocks, are as they were loaded; what `map_dense` makes of them and their `source`
        lies on disk, copies beside the store."""
        self.layers = list(layers)
        self.by_name = {layer.name: layer for layer in layers}
        self.by_block = layers_by_block(layers, blocks)
        self.dense = map_dense(layers, store.directory, source)
        if any(layer.is_streamed for layer in layers):
            self.dense.groups = {layer.name: layer.block for layer in layers}
        self.installed = dict.fromkeys(self.by_name, DENSE)
        self._biases = Biases()
        self._store, self._warn = store, warn
        self._hashes: dict[str, str] = {}
        self._dense_zeros: dict[str, int] = {}
        self._zeros: dict[str, tuple[str, int]] = {}
        """By layer, an artifact that was put in last, and the zeros that were counted in the model then."""

    def device_of(self, name: str) -> torch.device:
        """Where a layer is computed."""
        return self.by_name[name].device

    def hash_dense(self, name: str) -> str:
        """SHA-256 of a layer's weights as they were loaded; its zeros are counted with it, by one read of them."""
        if name not in self._hashes:
            weight_OI = self.dense[name]
            self._dense_zeros[name] = int((weight_OI == 0).sum())
            digest = hashlib.sha256(f"{tuple(weight_OI.shape)} {weight_OI.dtype}\n".encode())
            digest.update(view_bytes(weight_OI))
            self._hashes[name] = digest.hexdigest()
        return self._hashes[name]

    def count_dense_zeros(self, name: str) -> int:
        """Zeros among a layer's weights as they were loaded; every prune asks for those of all layers."""
        if name not in self._dense_zeros:
            self._dense_zeros[name] = int((self.dense[name] == 0).sum())
        return self._dense_zeros[name]

    def hash_all_dense(self) -> str:
        """SHA-256 that names the weights of all layers as they were loaded."""
        return hashlib.sha256("".join(map(self.hash_dense, self.dense)).encode()).hexdigest()

    def read_artifact(self, name: str, artifact: str) -> dict[str, Tensor]:
        """A layer's mask, and its values and bias unless they are the dense ones. Raises DamagedArtifact."""
        try:
            return self._store.read_tensors(artifact)
        except DamagedArtifact:
            if artifact != self.installed[name]:
                raise
            layer = self.by_name[name]  # what is in the model is whole
            return pack_pruned(layer.weight_OI, values=True) | self._biases.read_moved(layer)

    def write(self, name: str, weight_OI: Tensor, artifact: str, bias_O: Tensor | None = None) -> None:
        """Put weights into the model, and a bias where it is not the dense one: what the artifact stands for."""
        self.installed[name] = ""  # a write that is cut short leaves neither the old weights nor the new
        self.by_name[name].write(weight_OI)
        self._biases.write(self.by_name[name], bias_O)
        self.installed[name] = artifact

    def install(self, name: str, artifact: str) -> bool:
        """Put a layer's stored weights into the model; False (and a warning) when the artifact is damaged."""
        if self.installed[name] == artifact:
            return True
        bias_O: Tensor | None = None
        if artifact == DENSE:
            weight_OI = self.dense[name]
        else:
            try:
                tensors = self._store.read_tensors(artifact)
            except DamagedArtifact as error:
                self._warn(f"{error}; layer {name} is computed again")
                self._store.path(artifact, ".safetensors").unlink(missing_ok=True)  # nobody should trip over it again
                return False
            weight_OI = unpack_pruned(tensors, self.dense[name], self.device_of(name))
            bias_O = tensors.get("bias")
        self.write(name, weight_OI, artifact, bias_O)
        return True

    def install_all(self, artifacts: Mapping[str, str]) -> bool:
        """As `install`, of every layer; False where one is no longer on disk, and none is put in, or is damaged."""
        there = all(self.is_there(artifact) for artifact in artifacts.values())
        return there and all(self.install(name, artifact) for name, artifact in artifacts.items())

    def restore(self, artifacts: Mapping[str, str], make_again: Callable[[str], None]) -> list[str]:
        """Put stored weights into all layers, or where an artifact is damaged those that `make_again(name)` puts in.

        The names of the layers that differed.
        """
        changed = [name for name in self.by_name if self.installed[name] != artifacts[name]]
        gone = [name for name in changed if not self.is_there(artifacts[name])]
        if len(gone) > 1:  # as of a checkpoint that is no longer kept, which a fork goes back to
            self._warn(f"{len(gone)} layers are no longer on disk and are computed again")
        for name in changed:
            if self.installed[name] == artifacts[name]:  # `make_again` of another put it in
                continue
            if (len(gone) > 1 and name in gone) or not self.install(name, artifacts[name]):
                make_again(name)
        return changed

    def is_there(self, artifact: str) -> bool:
        """Whether the weights of an artifact are to be had without making them again, as far as nobody reads them."""
        return artifact == DENSE or self._store.path(artifact, ".safetensors").is_file()

    def restore_dense(self) -> list[str]:
        """As `restore`, of the weights as they were loaded."""
        changed = [name for name in self.by_name if self.installed[name] != DENSE]
        for name in changed:
            self.install(name, DENSE)
        return changed

    @contextmanager
    def put_back(self) -> Iterator[None]:
        """The weights in the model end as they were. Raises DamagedArtifact for those that are not to be had."""
        present = {name: artifact for name, artifact in self.installed.items() if artifact}  # no half-written ones
        try:
            yield
        finally:
            for name, artifact in present.items():
                if not self.install(name, artifact):
                    raise DamagedArtifact(f"layer {name} cannot be put back: artifact {artifact[:12]} is damaged")

    def mark_blocks(self, weights: Mapping[str, str]) -> list[str]:
        """For each block, a hash that names the weights of all blocks before it; `weights` is each layer's artifact."""
        digest, marks = hashlib.sha256(), []
        for members in self.by_block:
            marks.append(digest.hexdigest())
            for layer in members:
                digest.update(f"{layer.name} {weights[layer.name]}\n".encode())
        return marks

    def mark_present(self) -> Marks | None:
        """Names of the weights in the model; None while any of them are not whole."""
        if "" in self.installed.values():
            return None
        return Marks(self.mark_blocks(self.installed), json.dumps(self.installed))

    def _count_present(self, layer: Layer) -> int:
        """Zeros of a layer in the model as it is now, counted once for what was put in: several ask in every round, and
        of a model that is streamed all of it would come from disk."""
        artifact = self.installed[layer.name]
        if artifact == DENSE:
            return self.count_dense_zeros(layer.name)
        known, zeros = self._zeros.get(layer.name, ("", 0))
        if not artifact or known != artifact:
            zeros = int((layer.weight_OI == 0).sum())
            self._zeros[layer.name] = artifact, zeros
        return zeros

    def count_each(self) -> dict[str, int]:
        """Zeros of every layer of the model as it is now, by its name."""
        return {layer.name: self._count_present(layer) for layer in self.layers}

    def sparsities(self) -> list[float]:
        """Share of zeros in each layer of the model as it is now, in layer order."""
        return [self._count_present(layer) / self.dense[layer.name].numel() for layer in self.layers]

    def describe_sparsity(self) -> dict[str, float]:
        """The same by name; of the experts of one block the mean."""
        found: dict[str, list[float]] = {}
        for layer, sparsity in zip(self.layers, self.sparsities(), strict=True):
            found.setdefault(layer.pool or layer.name, []).append(sparsity)
        return {name: sum(shares) / len(shares) for name, shares in found.items()}

    def count_zeros(self) -> tuple[int, int]:
        """(zeros, weights) over all prunable layers of the model as it is now."""
        zeros = sum(self.count_each().values())
        return zeros, sum(self.dense[name].numel() for name in self.by_name)

    def hash_masks(self) -> str:
        """SHA-256 over the sorted layer names and their mask bits.

        For each name in sorted order: the name in UTF-8, then one bit per weight as the model's file stores it
        (row-major, lowest bit first, 1 = not zero), padded to whole bytes.
        """
        digest = hashlib.sha256()
        for name in sorted(self.by_name):
            digest.update(name.encode())
            digest.update(pack_bits(self.by_name[name].stored_weight != 0).numpy().tobytes())
        return digest.hexdigest()
