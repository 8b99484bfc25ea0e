"""How large the house is: `python -m tests.measure_house`. Lines, files, functions, options, frames, tests and words.

The frames are those of Billhook's own code, from the command to a weight that is set, in a run of a tiny model.
"""

import ast
import io
import subprocess
import sys
import tempfile
from collections import Counter
from contextlib import redirect_stdout
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ("graph", "tools", "kernels")


def list_files(*patterns: str) -> list[Path]:
    """Files that git knows and that are there."""
    known = subprocess.run(["git", "ls-files", *patterns], cwd=ROOT, text=True, capture_output=True, check=True)
    return [path for name in known.stdout.splitlines() if (path := ROOT / name).is_file()]


def count_lines(files: list[Path]) -> int:
    """Lines of all files, empty ones among them."""
    return sum(path.read_bytes().count(b"\n") for path in files)


def count_functions(files: list[Path]) -> int:
    """Functions and methods, those inside others too."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return sum(isinstance(node, kinds) for path in files for node in ast.walk(ast.parse(path.read_text("utf-8"))))


def count_frames() -> int:
    """The deepest call of our own, over all threads, at which a layer's weights are put into the model."""
    from graph.run import main
    from tests.end_to_end.helpers import TINY
    from tests.tiny import save_tiny_model
    from tools.workbench.weights import Weights

    depths: list[int] = []
    write = Weights.write

    def count(*arguments: object) -> None:
        frames: list[FrameType] = list(sys._current_frames().values())
        files = (name for frame in frames for name in _list_own(frame))
        depths.append(sum(1 for _ in files) - 1)  # without this function's
        write(*arguments)  # type: ignore[arg-type]

    Weights.write = count  # type: ignore[method-assign, assignment]
    with tempfile.TemporaryDirectory() as place:
        model = save_tiny_model(Path(place) / "llama", "llama")
        flags = ("--model", str(model), "--runs-dir", f"{place}/runs", "--max-iterations", "1", "--no-memory", *TINY)
        with redirect_stdout(io.StringIO()):
            assert main(flags) == 0, "the run of a tiny model ends well"
    return max(depths)


def _list_own(frame: FrameType | None) -> list[str]:
    """Our own source files of the calls that a frame is in."""
    found = []
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in SOURCE:
            found.append(path.name)
        frame = frame.f_back
    return found


def main() -> None:
    """Print the table."""
    from graph.config import RunConfig

    source, tests = list_files(*(f"{name}/*.py" for name in SOURCE)), list_files("tests/*.py")
    lines, functions = count_lines(source), count_functions(source)
    words = sum(len(path.read_text("utf-8").split()) for path in list_files("*README.md"))
    rooms: Counter[str] = Counter()
    for path in source:
        rooms["/".join(path.relative_to(ROOT).parts[:-1][:2])] += path.read_bytes().count(b"\n")
    frames = count_frames()
    print(f"lines in {', '.join(SOURCE)}: {lines:,}; files: {len(source)}")
    print(f"functions for each 1,000 lines: {1000 * functions / lines:.0f}")
    print(f"lines of tests: {count_lines(tests):,}; files: {len(tests)}")
    print(f"options of a run: {len(RunConfig.model_fields)}")
    print(f"own frames from the command to a weight that is set: {frames}")
    print(f"words in READMEs: {words:,}")
    print("; ".join(f"{room} {count:,}" for room, count in rooms.most_common()))


if __name__ == "__main__":
    main()
