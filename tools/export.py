"""Write a pruned model for llama.cpp: `python -m tools.export RUN --gguf FILE`

RUN is a run's directory, its name under runs/, or any model: a directory, a .gguf file, package:NAME or a hub id.
The model that the run began with was a .gguf file, too.
"""

import sys
from contextlib import suppress
from pathlib import Path

from rich.console import Console

from tools.base.console import UNWRITTEN, carry_out, print_line
from tools.base.errors import UserError
from tools.base.files import explain_full_disk, explain_unwritable
from tools.base.options import Parser
from tools.base.rundir import list_places, read_config_values
from tools.base.settings import WorkbenchSettings
from tools.base.words import show_size
from tools.models.load import ModelPlace, find_model, load_model, locate_model, read_dtype


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
        parser.add_argument("--gguf", metavar="FILE", required=True, help="A .gguf file of the model, for llama.cpp.")
        parser.add_argument(
            "--dense", metavar="MODEL", default="", help="The dense model's .gguf file; default: the run's."
        )
        options = parser.parse_args(arguments)
        if not options.gguf:
            raise UserError("--gguf wants a path, and it is empty")
        export_gguf(options.run, Path(options.gguf), options.dense, console)

    return carry_out(work, UNWRITTEN)


if __name__ == "__main__":
    sys.exit(main())
