"""Make a model smaller and faster for good: `python -m tools.structure --remove 0.2 --parts neurons,heads --out cut`

Takes whole neurons and groups of attention heads, or whole blocks, out of the model, refits what remains by least
squares, and writes a smaller model (OUT/model) that stock transformers loads, with its figures (OUT/structure.json).
"""

import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel, Field
from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table
from torch import Tensor

from tools.base.errors import UserError
from tools.base.files import write_json, write_text
from tools.base.options import Parser, add_flags, parse_flags, read_options, refuse
from tools.base.progress import Progress
from tools.base.settings import WorkbenchSettings
from tools.base.words import show
from tools.export import export_model
from tools.generate import decode
from tools.measure.losses import Evaluation, evaluate_windows
from tools.models.load import check_device, load_model, locate_model
from tools.models.readout import check_readout, compute_hidden
from tools.results.schema import Protocol, describe_protocol
from tools.surgery.choose import check_cut, choose_blocks, choose_channels, fold_blocks, measure_kl, search_windows
from tools.surgery.cut import (
    STEP,
    Counts,
    Cut,
    accepts,
    build_cut,
    check_buildable,
    count_weights,
    find_parts,
    list_counts,
    without_fits,
)
from tools.texts.windows import check_texts, cut_windows

PARTS = ("neurons", "heads", "blocks")
REPEATS = 5
"""Timings are medians of this many, dense and cut model by turns."""
PROMPT, DECODED = 8, 32
"""Tokens read and tokens decoded to measure the speed of decoding."""


class StructureSettings(WorkbenchSettings):
    """The model, its texts, and what is cut."""

    remove: float = Field(0.2, gt=0, lt=1, description="Share of the weights of the blocks' linear layers to remove.")
    parts: str = Field("neurons,heads", description="What is cut: neurons, heads, neurons,heads or blocks.")
    out: str = Field("cut", min_length=1, description="Directory of the model and its figures.")


class Figures(BaseModel):
    """One model, measured."""

    parameters: int
    file_bytes: int = Field(description="Of its weights on disk, in the number format of the run.")
    perplexity: float | None = Field(description="On the validation text; null where the loss was not finite.")
    seconds_per_window: float = Field(description="Forward of one window, logits of its last token; median.")
    decoded_per_second: float = Field(description="Tokens a second of greedy decoding, one sequence; median.")


class Structure(BaseModel):
    """`structure.json`."""

    model: str
    parts: str
    target: float = Field(description="Share of the weights of the blocks' linear layers to remove.")
    removed: float = Field(description="The share that was removed.")
    heads: int = Field(description="Groups of attention heads removed from every block.")
    neurons: int = Field(description="Neurons removed from every block.")
    blocks: list[int] = Field(description="Blocks removed, counted from 0 in the dense model.")
    constraint: str
    dense: Figures
    cut: Figures = Field(description="After the refit.")
    perplexity_without_refit: float | None
    kl_without_refit: float | None = Field(description="KL(dense || cut) on the validation text, nats per token.")
    kl: float | None = Field(description="The same after the refit.")
    protocol: Protocol


def parse_parts(parts: str) -> tuple[str, ...]:
    """The kinds of parts named. Raises UserError for one that there is not, or blocks beside another."""
    kinds = tuple(dict.fromkeys(part.strip() for part in parts.split(",") if part.strip()))
    unknown = [kind for kind in kinds if kind not in PARTS]
    if unknown or not kinds or ("blocks" in kinds and len(kinds) > 1):
        raise UserError(f"--parts {parts!r} is none of neurons; heads; neurons,heads; blocks")
    return kinds


def cut_model(settings: StructureSettings, step: Progress) -> Structure:
    """Choose, cut, refit, measure and write. Raises UserError, before anything is loaded where that is possible."""
    kinds = parse_parts(settings.parts)
    directory = Path(settings.out)
    if (directory / "model").exists():
        raise UserError(f"{directory / 'model'} exists already; choose another --out")
    locate_model(settings.model)
    check_device(settings.device)
    check_texts(settings)

    step("load model", 0, 1)
    dense, tokenizer = load_model(settings)
    windows = cut_windows(settings, tokenizer)
    calibration, validation = windows.calibration.to(dense.device), windows.validation.to(dense.device)
    check_readout(dense, calibration[0])
    cut, constraint, _ = choose_cut(dense, kinds, settings.remove, calibration, step)

    dense_losses, hidden = evaluate_windows(dense, validation, None, "dense", step)
    plain = build_cut(dense, without_fits(cut))
    check_cut(dense, cut, plain, calibration[0])
    plain_losses, _ = evaluate_windows(plain, validation, hidden, "cut without refit", step)
    model = build_cut(dense, cut)
    losses, _ = evaluate_windows(model, validation, hidden, "cut with refit", step)
    speeds = measure_speeds([dense, model], validation[0], step)
    result = Structure(
        model=settings.model,
        parts=",".join(kinds),
        target=settings.remove,
        removed=1 - count_weights(model) / count_weights(dense),
        heads=cut.counts.heads,
        neurons=cut.counts.neurons,
        blocks=list(cut.dropped),
        constraint=constraint,
        dense=_figures(dense, dense_losses, speeds[0]),
        cut=_figures(model, losses, speeds[1]),
        perplexity_without_refit=plain_losses.perplexity,
        kl_without_refit=plain_losses.mean_kl,
        kl=losses.mean_kl,
        protocol=describe_protocol(settings, "validation"),
    )
    export_model(model, tokenizer, directory / "model", write_card(result))
    result.cut.file_bytes = sum(file.stat().st_size for file in (directory / "model").glob("*.safetensors"))
    write_text(directory / "model" / "README.md", write_card(result))
    write_json(directory / "structure.json", result.model_dump())
    return result


class Choice(NamedTuple):
    """What goes of a model."""

    cut: Cut
    constraint: str
    """What held it to that, in words."""
    tokens: int
    """Calibration tokens put through cut models to choose."""


def choose_cut(
    model: Any, kinds: tuple[str, ...], remove: float, windows_BT: Tensor, step: Progress, *, refit: bool = True
) -> Choice:
    """The cut of these kinds of parts that takes `remove` of the weights of the blocks' linear layers away.

    Without `refit` what stays has its dense weights. Raises UserError where there is no such cut.
    """
    candidates = list_counts(model, kinds, remove)
    for counts in candidates:
        check_buildable(model, counts)
    if "blocks" in kinds:
        order, tokens = choose_blocks(model, candidates[0].blocks, windows_BT, step)
        fits = fold_blocks(model, order, windows_BT, step) if refit else []
        words = f"whole blocks, in this order, each the one without which KL was lowest: {', '.join(map(str, order))}"
        words += (
            "" if fits or not refit else "; nothing was refitted, as no MLP before them adds to what the blocks pass on"
        )
        return Choice(Cut(candidates[0], fits, tuple(sorted(order))), words, tokens)
    cuts = choose_channels(model, candidates, windows_BT, step, refit=refit)
    words = _describe_counts(model, kinds, candidates[0])
    if len(cuts) == 1:
        return Choice(cuts[0], words, 0)
    costs = [measure_kl(model, build_cut(model, cut), windows_BT) for cut in cuts]
    best = costs.index(min(costs))
    compared = ", ".join(f"{c.heads} ({cost:.3f})" for c, cost in zip(candidates, costs, strict=True))
    words = _describe_counts(model, kinds, candidates[best])
    words += f"; the number of groups that cost the least KL on calibration text, of {compared}"
    return Choice(cuts[best], words, len(cuts) * search_windows(windows_BT).numel())


def _describe_counts(model: Any, kinds: tuple[str, ...], counts: Counts) -> str:
    parts = {kind: find_parts(model, kind)[0] for kind in ("heads", "neurons") if kind in kinds}
    names = {"heads": "groups of heads", "neurons": "neurons"}
    went = " and ".join(f"{getattr(counts, kind)} of {part.units} {names[kind]}" for kind, part in parts.items())
    words = f"every block loses the same number, its own lowest-scored: {went}"
    step = math.gcd(parts["neurons"].units, STEP) if "neurons" in parts else 1
    words += f", in multiples of {step}" if step > 1 else ""
    if "heads" in parts:
        refused = [str(n) for n in range(1, parts["heads"].units) if not accepts(model, Counts(heads=n))]
        words += f"; {type(model.config).__name__} refuses {', '.join(refused)} groups fewer" if refused else ""
    return words


def measure_speeds(models: Sequence[Any], ids_T: Tensor, step: Progress) -> list[tuple[float, float]]:
    """(seconds of a forward of the window, greedily decoded tokens a second) of each model: medians, taken by turns."""
    forwards: list[list[float]] = [[] for _ in models]
    decodings: list[list[float]] = [[] for _ in models]
    for i in range(REPEATS + 1):  # the first warms up
        step("measure speed", i, REPEATS + 1)
        for model, forward, decoding in zip(models, forwards, decodings, strict=True):
            forward.append(_time(lambda: compute_hidden(model, ids_T[None]), ids_T))  # noqa: B023
            # Without a least number a model that ends its text early would seem the faster one.
            decoding.append(_time(lambda: decode(model, ids_T[None, :PROMPT], DECODED, DECODED), ids_T))  # noqa: B023
    step("measure speed", REPEATS + 1, REPEATS + 1)
    return [
        (statistics.median(forward[1:]), DECODED / statistics.median(decoding[1:]))
        for forward, decoding in zip(forwards, decodings, strict=True)
    ]


@torch.no_grad()
def _time(run: Callable[[], Any], ids_T: Tensor) -> float:
    cuda = ids_T.device.type == "cuda"
    if cuda:
        torch.cuda.synchronize(ids_T.device)
    began = time.perf_counter()
    run()
    if cuda:
        torch.cuda.synchronize(ids_T.device)
    return time.perf_counter() - began


def _figures(model: Any, evaluation: Evaluation, speed: tuple[float, float]) -> Figures:
    return Figures(
        parameters=sum(p.numel() for p in model.parameters()),
        file_bytes=sum(p.nbytes for p in model.parameters()),
        perplexity=evaluation.perplexity,
        seconds_per_window=speed[0],
        decoded_per_second=speed[1],
    )


# --- what is written ---------------------------------------------------------------------------------------------

_HEADER = ("", "dense", "cut", "cut and refitted")


def _rows(result: Structure) -> list[tuple[str, str, str, str]]:
    dense, cut = result.dense, result.cut
    return [
        ("parameters", f"{dense.parameters:,}", "", f"{cut.parameters:,}"),
        ("file, MB", f"{dense.file_bytes / 1e6:.1f}", "", f"{cut.file_bytes / 1e6:.1f}"),
        ("perplexity", show(dense.perplexity), show(result.perplexity_without_refit), show(cut.perplexity)),
        ("KL to dense", "", _show_kl(result.kl_without_refit), _show_kl(result.kl)),
        (
            f"forward of {result.protocol.window} tokens, ms",
            f"{dense.seconds_per_window * 1e3:.0f}",
            "",
            f"{cut.seconds_per_window * 1e3:.0f}",
        ),
        ("decoded tokens/s", f"{dense.decoded_per_second:.1f}", "", f"{cut.decoded_per_second:.1f}"),
    ]


def _show_kl(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


def make_table(result: Structure) -> Table:
    """The figures side by side."""
    table = Table(title=f"{result.model}: {result.removed:.2%} of the blocks' weights cut")
    for i, title in enumerate(_HEADER):
        table.add_column(title, justify="right" if i else "left")
    for row in _rows(result):
        table.add_row(*row)
    return table


def write_card(result: Structure) -> str:
    """The model card, `model/README.md`."""
    protocol = result.protocol
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            "tags: [pruned, structured, billhook]",
            "---",
            f"# {result.model}, {result.removed:.2%} of the blocks' weights cut",
            "",
            f"Constraint: {result.constraint}.",
            "",
            "The file is smaller than the dense one and loads with stock `transformers`.",
            "",
            f"| {' | '.join(_HEADER)} |",
            "|---|---:|---:|---:|",
            *(f"| {' | '.join(row)} |" for row in _rows(result)),
            "",
            f"Perplexity was measured on `{protocol.text}` ({protocol.tokens} tokens, windows of {protocol.window}, "
            f"{protocol.dtype}).",
            "",
        ]
    )


# --- the command -------------------------------------------------------------------------------------------------


@contextmanager
def _bar(console: Console) -> Iterator[Progress]:
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn()
    with Bars(*columns, console=console, disable=not console.is_terminal, transient=True) as bars:
        task = bars.add_task("", total=None)
        yield lambda label, at, total: bars.update(task, description=label, completed=at, total=total)


def main(arguments: list[str] | None = None) -> int:
    """The command: 0 done, 1 interrupted, 2 bad input."""
    parser = Parser(prog="python -m tools.structure", description=__doc__, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE", help="YAML file of fields; a run's config will do.")
    add_flags(parser, StructureSettings)
    console = Console()
    try:
        options, flags = parse_flags(parser, StructureSettings, sys.argv[1:] if arguments is None else arguments)
        path = Path(options.config) if options.config else None
        settings = read_options(StructureSettings, flags, path, ignore_unknown=True)
        with _bar(console) as step:
            result = cut_model(settings, step)
    except UserError as error:
        return refuse(error)
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)
        return 1
    console.print(make_table(result))
    console.print(f"{result.removed:.2%} removed (asked for {result.target:.2%}); {result.constraint}", markup=False)
    console.print(f"model and figures: {settings.out}", markup=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
