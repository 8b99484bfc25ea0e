"""What the output projections of parts read in real forwards of the dense model, and the text that choices cost."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from torch import Tensor

from billhook_kernels.channels import HalvedSums, InputMoments, MomentSums
from tools.base.errors import UnknownStatistics
from tools.surgery.parts import Part

SEARCH_TOKENS = 1024
"""Calibration tokens, in whole windows, on which whole cuts are compared: a KL is paired, so that few will do."""


def search_windows(windows_BT: Tensor, lead: int = 0) -> Tensor:
    """The first windows, SEARCH_TOKENS of text in all, or one; the first `lead` tokens of each are no text."""
    return windows_BT[: count_searched(windows_BT.shape[1] - lead)]


def count_searched(window: int) -> int:
    """How many windows of so many tokens of text SEARCH_TOKENS are, or one."""
    return max(1, SEARCH_TOKENS // window)


def finish_moments(sums: MomentSums | HalvedSums, part: Part) -> InputMoments:
    """What was summed up of what a part's output projection reads. Raises UnknownStatistics where it is not finite."""
    try:
        return sums.finish()
    except ValueError as error:
        text = f"{part.output.name}: {error} on the calibration text; try --dtype fp32 or bf16"
        raise UnknownStatistics(text) from error


@contextmanager
def tapped(parts: Sequence[Part], see: Sequence[Callable[[Tensor], None]]) -> Iterator[None]:
    """Inside, each function is shown what the output projection of its part reads, (T, I)."""
    with ExitStack() as undo:
        for part, show in zip(parts, see, strict=True):
            undo.callback(part.output.module.register_forward_pre_hook(_showing(show)).remove)
        yield


def _showing(show: Callable[[Tensor], None]) -> Callable[..., None]:
    return lambda _module, inputs: show(inputs[0].detach().flatten(0, -2))


@contextmanager
def kept_outputs(parts: Sequence[Part]) -> Iterator[dict[int, Tensor]]:
    """Filled by a forward: what the output projection of each part gives, by the part's place, with its graph."""
    outputs: dict[int, Tensor] = {}

    def keep(place: int) -> Callable[..., None]:
        return lambda _module, _inputs, output: outputs.update({place: output})

    with ExitStack() as undo:
        for place, part in enumerate(parts):
            undo.callback(part.output.module.register_forward_hook(keep(place)).remove)
        yield outputs
