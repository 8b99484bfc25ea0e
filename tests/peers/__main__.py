"""Do `sparsegpt:uniform` and `wanda:uniform` come out as another tool's? `python -m tests.peers --sparsity 0.45,2:4`

Prunes the model by each method of ours and by llm-compressor's of the same name, on the same calibration windows, and
measures all of them by the same code on the same validation windows. llm-compressor is no dependency of Billhook: it
runs in an environment of its own, which pip makes in --out where --python names none. What it has pruned is kept there
and read again. Prints a line for each pair; ends with 1 where perplexities differ by more than 3 %.

With 32 windows of WikiText-2 for SmolLM2-135M-Instruct, dense 21.53, on 16 others (Billhook, llm-compressor 0.14):
SparseGPT 31.66, 31.59 at 45 %; 74.21, 72.88 at 60 %; 69.63, 71.69 at 2:4. Wanda 118.66, 117.50 at 60 %; 142.08, 146.31
at 2:4; at 45 %, with 45.00 % zeros beside 44.97 %, 34.99, 34.93:

    python -m tests.peers --calibration file:calibration.txt --validation file:validation.txt --window 1024 \\
        --calibration-windows 32 --gradient-windows 8 --validation-windows 16 --sparsity 0.45,0.6,2:4
"""

import argparse
import hashlib
import json
import subprocess
import sys
import venv
from pathlib import Path

from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor

from tools.base.console import carry_out
from tools.base.errors import UserError, in_one_line
from tools.base.options import Parser, add_flags, parse_flags, read_options
from tools.base.progress import ignore_progress
from tools.base.settings import WorkbenchSettings
from tools.models.load import load_model
from tools.models.save import export_model
from tools.plans.jobs import Job, list_jobs
from tools.plans.pattern import count_pattern_zeros
from tools.plans.work_order import order_all
from tools.texts.windows import check_texts
from tools.workbench.bench import Workbench
from tools.workbench.open import use_workbench

THEIRS = Path(__file__).parent / "llmcompressor_prunes.py"
ALIKE = 0.03
"""How far two perplexities of the same method may lie apart, as a share."""


class PeerSettings(WorkbenchSettings):
    """The model, its texts, and what is pruned."""

    recipes: str = Field("wanda:uniform,sparsegpt:uniform", description="Which of these two, comma-separated.")
    sparsity: str = Field("0.45,0.6,2:4", description="Comma-separated fractions and patterns.")
    python: str = Field("", description="An interpreter that has llm-compressor; empty makes one in --out.")
    out: str = Field("peers", min_length=1, description="Directory of windows, weights and figures.")


def make_environment(directory: Path) -> str:
    """A Python that has llm-compressor. Raises UserError when pip cannot have it."""
    python = directory / "bin" / "python"
    if not (directory / "installed").is_file():
        venv.create(directory, with_pip=True, clear=True)
        run([str(python), "-m", "pip", "install", "--quiet", "llmcompressor"], directory / "install.log")
        (directory / "installed").touch()
    return str(python)


def run(command: list[str], log: Path) -> None:
    """Raises UserError that names the log when the command fails."""
    with log.open("w", encoding="utf-8") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        words = in_one_line(log.read_text(encoding="utf-8", errors="replace")[-300:], 300)
        raise UserError(f"{Path(command[0]).name} ended with {done.returncode}: {words}; see {log}")


def prune_theirs(job: Job, dense: Path, windows: Path, settings: PeerSettings) -> dict[str, Tensor]:
    """The layers as llm-compressor prunes them; what it has pruned before is read again."""
    directory, target = Path(settings.out), job.pattern or f"{job.sparsity:g}"
    about = hashlib.sha256(windows.read_bytes() + settings.model.encode()).hexdigest()[:8]
    out = directory / f"{job.recipe.method}-{target.replace(':', '-')}-{about}.safetensors"
    if not out.is_file():
        python = settings.python or make_environment(directory / "env")
        aside = out.with_suffix(".part")
        command = [python, THEIRS, dense, windows, aside, job.recipe.method, target]
        run(list(map(str, command)), out.with_suffix(".log"))
        aside.replace(out)
    return load_file(out)


def find_profile(bench: Workbench, settings: PeerSettings) -> str:
    """The id of the dense model's profile, made once for all sparsities."""
    about = settings.model_dump_json(exclude={"recipes", "sparsity", "python", "out"})
    kept = Path(settings.out) / f"profile-{hashlib.sha256(about.encode()).hexdigest()[:8]}"
    if not kept.is_file():
        kept.write_text(bench.profile(ignore_progress, masks_only=True))
    return kept.read_text()


def prune_ours(job: Job, bench: Workbench, profile: str, theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The layers as the recipe leaves them, each with as many zeros as llm-compressor left, or as the pattern has.

    Wanda's authors round down to whole weights in every row; Billhook is exact to the weight. At 60 % of SmolLM2-135M
    that is 59.91 % beside 60.00 %, which is worth more perplexity than the implementations differ by.
    """
    if group := job.recipe.group:  # llm-compressor leaves zeros beside the pattern's: some that the dense weights had
        zeros = {layer.name: count_pattern_zeros(layer.weight_OI.numel(), group) for layer in bench.weights.layers}
    else:
        zeros = {layer.name: int((theirs[f"{layer.name}.weight"] == 0).sum()) for layer in bench.weights.layers}
    order = order_all(job.recipe, zeros, sparsity=job.sparsity, predicted_kl=0.0)
    bench.pruner.prune(profile, order, ignore_progress)
    return {f"{layer.name}.weight": layer.weight_OI.clone() for layer in bench.weights.layers}


def compare(settings: PeerSettings) -> bool:
    """Print a line for each pair; whether all are alike."""
    jobs = list_jobs(settings.recipes, settings.sparsity)
    check_texts(settings)
    directory = Path(settings.out)
    directory.mkdir(parents=True, exist_ok=True)
    dense, windows, alike = directory / "dense", directory / "windows.safetensors", True
    figures: dict[str, tuple[float, float]] = {}
    with use_workbench(settings, directory / "work", print, ignore_progress) as bench:
        profile = find_profile(bench, settings)
        bench.pruner.restore("dense")
        if not dense.is_dir():
            export_model(bench.model, bench.tokenizer, dense, "")
        save_file({"windows": bench.windows.calibration.cpu().contiguous()}, windows)
        model, _ = load_model(settings.model_copy(update={"model": str(dense)}))
        print(f"dense: {bench.profiles.read(profile).dense.perplexity:.2f}", flush=True)
        for job in jobs:
            perplexities = []
            theirs = prune_theirs(job, dense, windows, settings)
            if theirs.keys() != {f"{layer.name}.weight" for layer in bench.weights.layers}:
                raise UserError("llm-compressor prunes other layers than Billhook does")
            for weights in (prune_ours(job, bench, profile, theirs), theirs):
                model.load_state_dict(weights, strict=False)
                zeros = sum(int((weight == 0).sum()) for weight in weights.values())
                perplexity = bench.evaluator.evaluate_other(model, profile, ignore_progress).perplexity
                perplexities.append(perplexity or float("nan"))
                shares = zeros / sum(weight.numel() for weight in weights.values())
                print(f"  {job.title}: {shares:.2%} zeros, perplexity {perplexities[-1]:.2f}", flush=True)
            own, other = perplexities
            alike &= abs(own / other - 1) <= ALIKE
            figures[job.title] = own, other
            print(f"{job.title}: {own:.2f}, llm-compressor {other:.2f}: {own / other - 1:+.2%}", flush=True)
            (directory / "peers.json").write_text(json.dumps(figures, indent=1))
    return alike


def main(arguments: list[str] | None = None) -> int:
    """The command: 0 alike, 1 not, 2 bad input."""
    parser = Parser(
        prog="python -m tests.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_flags(parser, PeerSettings)
    alike = [False]

    def work() -> None:
        _, flags = parse_flags(parser, PeerSettings, sys.argv[1:] if arguments is None else arguments)
        alike[0] = compare(read_options(PeerSettings, flags, None))

    return carry_out(work) or int(not alike[0])


if __name__ == "__main__":
    sys.exit(main())
