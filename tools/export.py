"""Write a pruned model as others read it: `python -m tools.export RUN --packed DIR`, or `--gguf FILE`

RUN is a run's directory, its name under runs/, or any model: a directory, a .gguf file, package:NAME or a hub id.
A packed model is smaller than the dense one and decodes faster; python -m tools.generate DIR runs it. A .gguf file is
for llama.cpp, of a run whose model was such a file.
"""

import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Literal

from rich.console import Console

from tools.base.console import UNWRITTEN, carry_out, print_line
from tools.base.errors import UserError
from tools.base.files import explain_full_disk, explain_unwritable
from tools.base.made import read_config_values
from tools.base.names import hide_path
from tools.base.options import Parser
from tools.base.rundir import list_places
from tools.base.settings import TeamSettings, WorkbenchSettings
from tools.base.words import show_size
from tools.models.formats import DTYPES, Dtype
from tools.models.load import ModelPlace, choose_device, find_model, load_model, locate_model, read_dtype
from tools.results.cards import write_packed_card


def export_packed(source: str, directory: Path, dtype: Dtype | Literal[""], console: Console) -> None:
    """Pack a model. Raises UserError."""
    from tools.models.packed import describe_packed, is_packed
    from tools.models.packing import save_packed

    place = find_model(source)
    if directory.exists():
        raise UserError(f"{directory} exists already; choose another --packed")
    if is_packed(place):
        raise UserError(f"{place} is packed already")
    settings = choose_device(TeamSettings(model=place, dtype=dtype or read_dtype(place)))
    if settings.device == "auto":  # it fits; what is packed is packed on the CPU
        settings = settings.model_copy(update={"device": "cpu"})
    model, tokenizer = load_model(settings, directory.parent)
    if dtype and not all(bool(weight.isfinite().all()) for weight in model.parameters() if not weight.is_meta):
        raise UserError(f"not all weights of {source} are finite in {dtype}; use --dtype bf16")
    words = f"`{hide_path(source)}`" + (f", weights rounded to {dtype}" if dtype else "")
    write_card = partial(write_packed_card, words, rounded=bool(dtype))
    contents = save_packed(model, tokenizer, directory, lambda contents: write_card(describe_packed(contents)))
    print_line(console, describe_packed(contents))
    print_line(console, f"run it: python -m tools.generate {directory}")


def export_gguf(source: str, path: Path, dense: str, console: Console) -> None:
    """Write a model directory as a .gguf file, checked by reading it; `dense` is that of the dense model, by default
    the run's. Raises UserError.
    """
    from tools.models.gguf import describe_by_hand, list_changed, write_gguf

    directory = Path(find_model(source))
    if path.suffix != ".gguf":
        raise UserError(f"{path} does not end in .gguf; choose another --gguf")
    if path.exists():
        raise UserError(f"{path} exists already; choose another --gguf")
    if not (directory / "config.json").is_file():
        raise UserError(f"{source} is no run and no model directory; what is written is a model of transformers")
    place = locate_model(dense) if dense else find_dense(source)
    if place is None or place.gguf_file is None:
        raise UserError(f"the model of {source} was read from no .gguf file; name one of the dense model with --dense")
    aside = path.with_name(f".{path.stem}.new.gguf")
    try:
        with explain_unwritable(path), explain_full_disk(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_gguf(directory, Path(place.path) / place.gguf_file, aside)
        settings = {"model": str(aside), "dtype": read_dtype(str(directory)), "device": "cpu"}
        try:
            read, _ = load_model(WorkbenchSettings.model_validate(settings))
        except UserError as error:  # it names a file that is gone with it
            raise UserError(f"what is written cannot be read back here; {describe_by_hand(directory)}") from error
        if changed := list_changed(read, directory):
            raise UserError(
                f"{len(changed)} tensors would be read as others, such as {changed[0]}; {describe_by_hand(directory)}"
            )
        aside.replace(path)
    finally:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
    print_line(console, f"{path}: {show_size(path.stat().st_size)}, read back to the bit")


def find_dense(source: str) -> ModelPlace | None:
    """The model that a run began with, or the one before where it began with another run's; None of no run."""
    for run in list_places(source):
        if not (run / "config.yaml").is_file():
            continue
        begun = str(read_config_values(run)["model"])
        before = Path(begun).parent if Path(begun).name == "model" else None
        return find_dense(str(before)) if before and (before / "config.yaml").is_file() else locate_model(begun)
    return None


def main(arguments: list[str] | None = None) -> int:
    """The command: 0 done, 1 interrupted, 2 bad input."""
    console = Console()

    def work() -> None:
        parser = Parser(prog="python -m tools.export", description=__doc__)
        parser.add_argument("run", metavar="RUN")
        forms = parser.add_mutually_exclusive_group(required=True)
        forms.add_argument("--packed", metavar="DIR", help="Directory of the packed model.")
        forms.add_argument("--gguf", metavar="FILE", help="A .gguf file of the model, for llama.cpp.")
        parser.add_argument(
            "--dense",
            metavar="MODEL",
            default="",
            help="With --gguf: the dense model's .gguf file; default: the run's.",
        )
        parser.add_argument(
            "--dtype",
            choices=tuple(DTYPES),
            default="",
            help="With --packed: round the weights to this format; default: none.",
        )
        options = parser.parse_args(arguments)
        if not (options.packed or options.gguf):
            raise UserError("--packed and --gguf want a path, and it is empty")
        if options.gguf and options.dtype:
            raise UserError("--dtype is about --packed; a .gguf file keeps the formats of the dense model's")
        if options.packed and options.dense:
            raise UserError("--dense is about --gguf; leave it out")
        if options.packed:
            export_packed(options.run, Path(options.packed), options.dtype, console)
        else:
            export_gguf(options.run, Path(options.gguf), options.dense, console)

    return carry_out(work, UNWRITTEN)


if __name__ == "__main__":
    sys.exit(main())
