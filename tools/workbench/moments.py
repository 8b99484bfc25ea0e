"""Second moments of what layers read in the dense model, and weights of tokens in them: measured once and kept."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from kernels.triangle import pack_triangle, unpack_triangle
from tools.base.progress import Progress, ignore_progress
from tools.models.layers import Layer
from tools.statistics.collect import begin_walk, collect_moments
from tools.statistics.weights import weigh_block
from tools.workbench.crew import Crew
from tools.workbench.store import ArtifactStore, Index
from tools.workbench.stored import StoredProfile
from tools.workbench.weights import Weights


def write_moment(store: ArtifactStore, moment_II: Tensor) -> str:
    """The artifact of a second moment: its upper triangle, (U,) fp32 (`kernels.triangle`), and its width."""
    whole_II = moment_II.cpu()  # a GPU that a walk fills has no room for both
    return store.write_tensors({"upper": pack_triangle(whole_II), "width": torch.tensor([len(whole_II)])})


def read_moment(store: ArtifactStore, artifact: str, device: torch.device) -> Tensor:
    """What `write_moment` wrote, or an earlier version as a whole, (I, I), on the device."""
    tensors = store.read_tensors(artifact)
    if (whole_II := tensors.get("A")) is not None:
        return whole_II.to(device)
    return unpack_triangle(tensors["upper"].to(device), int(tensors["width"]))


class SecondMoments:
    """Those of the profiles of one model."""

    def __init__(self, weights: Weights, store: ArtifactStore, index: Index, crew: Crew) -> None:
        self._weights, self._store, self._index, self._crew = weights, store, index, crew

    def add_up(self, digests: Sequence[tuple[str, float]], device: torch.device) -> Tensor:
        """The sum of second moments, each by its share; fp32 on the device."""
        (first, share), *others = digests
        total_II = read_moment(self._store, first, device)
        if others:
            total_II = total_II * share
        for digest, share in others:
            total_II.add_(read_moment(self._store, digest, device), alpha=share)
        return total_II

    def find(
        self, stored: StoredProfile, progress: Progress = ignore_progress, *, weighted: bool = False
    ) -> dict[str, str]:
        """Artifact of each second moment; where the profile was made for masks alone, measured in the dense model.

        Those in which tokens are `weighted` are one for each layer, and always measured when they are first asked for.
        Of several texts they are those of each text that counts, which is named before the group.
        """
        if stored.parts:
            return self._find_of_texts(stored, progress)
        if weighted:
            self.find_token_weights(stored, progress)
            measure = partial(self._measure, stored, progress, weighed=True)
            return self._index.measure_once(["weighted moments", stored.means], measure)
        measure = partial(self._measure, stored, progress)
        return stored.moments or self._index.measure_once(["moments", stored.means], measure)

    def _find_of_texts(self, stored: StoredProfile, progress: Progress) -> dict[str, str]:
        found: dict[str, str] = {}
        for text, part in stored.parts.items():
            if not stored.mix[text]:
                continue
            alone = stored.model_copy(update={"means": part.means, "mix": stored.only(text)})
            measure = partial(self._measure, alone, progress)
            moments = part.moments or self._index.measure_once(["moments", part.means], measure)
            found |= {f"{text} {leader}": digest for leader, digest in moments.items()}
        return found

    def _measure(self, stored: StoredProfile, progress: Progress, *, weighed: bool = False) -> dict[str, str]:
        """By the weights of tokens of the profile, where they are `weighed`."""
        self._weights.restore_dense()
        artifacts: dict[str, str] = {}
        grouped, team = self._weights.by_block, self._crew.team
        kind, label = ("weighted moments", "weighted second moments") if weighed else ("moments", "second moments")
        with begin_walk(team, stored.calibration, shares=stored.shares) as walk:
            for block, layers in enumerate(grouped):
                progress(label, block, len(grouped))

                def measure(block: int = block, layers: Sequence[Layer] = layers) -> dict[str, str]:
                    weights = self.read_token_weights(stored, block) if weighed else None
                    moments = collect_moments(team, self._crew.extent, walk, block, layers, weights=weights)
                    return {
                        name: write_moment(self._store, moment_II) for name, moment_II in moments.second_moment.items()
                    }

                artifacts |= self._index.measure_files([kind, stored.means, str(block)], measure)
        progress(label, len(grouped), len(grouped))
        return artifacts

    def find_token_weights(self, stored: StoredProfile, progress: Progress) -> None:
        """Weights of all tokens of the profile's text, in the dense model: measured once, block by block from the last.

        Gradients flow back through every window of the text, and not the gradient windows alone.
        """
        grouped, team = self._weights.by_block, self._crew.team
        names = [["token weights", stored.means, str(block)] for block in range(len(grouped))]
        known = map(self._index.read_measured, names)
        if all(made is not None and self._store.has(made["weights"], ".safetensors") for made in known):
            return
        self._weights.restore_dense()
        with begin_walk(team, stored.calibration, every=True) as walk:
            for done, block in enumerate(reversed(range(len(grouped)))):
                progress("token weights", done, len(grouped))

                def measure(block: int = block) -> dict[str, str]:
                    weights = weigh_block(team, self._crew.extent, walk, block, grouped[block])
                    return {"weights": self._store.write_tensors(weights)}

                self._index.measure_files(names[block], measure)
        progress("token weights", len(grouped), len(grouped))

    def read_token_weights(self, stored: StoredProfile, block: int) -> dict[str, Tensor]:
        """What `find_token_weights` found for the layers of a block: (windows, T), fp32, on the CPU."""
        made = self._index.read_measured(["token weights", stored.means, str(block)])
        assert made is not None, "they are found before layers are pruned"
        return self._store.read_tensors(made["weights"])
