"""What a checkout comes to, digit by digit: `python -m tests.record_results OUT.json [--questions file:PATH] [PART …]`

Runs the demo, a comparison, a run with questions, one with named texts and weights, one with two workers, one streamed
and one cut to 0.8 of its bytes, and writes mask hashes, perplexities, KL and trials. Nothing of it depends on the
machine's speed. Two checkouts that write the same file come to the same results. The work lies beside OUT, in OUT.work;
parts that are in OUT already are not made again.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

PARTS = ("demo", "compare", "questions", "texts", "workers", "streamed", "cut")
SMALL = ("--window", "256", "--calibration-windows", "8", "--gradient-windows", "4")
RUN = (*SMALL, "--validation-windows", "4", "--test-windows", "4", "--max-iterations", "3")
RECIPES = (
    "wanda:uniform,sparsegpt:owl,alps:alphapruning,two-sided:kappa,two-sided-obs:kappa,"
    "refit10~clipped~damped0.2~sequential:kappa-mask"
)
ROW = ("recipe", "sparsity", "pattern", "achieved_sparsity", "perplexity", "kl", "kl_error", "evaluated_tokens")
TRIAL = ("iteration", "plan", "verdict", "reason", "sparsity", "perplexity", "kl", "kl_error", "predicted_kl", "tokens")
SUMMARY = ("mask_sha256", "status", "achieved_sparsity", "perplexity", "kl", "knowledge", "samples", "plan")

COMPARE = """
import sys
from tools.compare import main
from tools.workbench.evaluate import Evaluator

evaluate = Evaluator.evaluate

def tell(evaluator, *arguments, **options):
    found = evaluate(evaluator, *arguments, **options)
    print("mask_sha256", evaluator._weights.hash_masks(), flush=True)
    return found

Evaluator.evaluate = tell
sys.exit(main())
"""


def call(*arguments: str) -> str:
    """The output of Python with these arguments."""
    done = subprocess.run([sys.executable, *arguments], text=True, capture_output=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


def record_run(work: Path, name: str, *flags: str) -> dict[str, Any]:
    """A run, and what it left."""
    call("-m", "graph.run", "--runs-dir", str(work / "runs"), "--name", name, "--no-memory", *flags)
    return read_run(work / "runs" / name)


def read_run(run: Path) -> dict[str, Any]:
    """Summary and trials of a finished run, as far as they are the same wherever it is done again."""
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    lines = (run / "events.jsonl").read_text(encoding="utf-8").splitlines()
    trials = [event for event in map(json.loads, lines) if event["type"] == "trial"]
    return {name: summary[name] for name in SUMMARY} | {"trials": [{k: t[k] for k in TRIAL} for t in trials]}


def record_comparison(work: Path) -> dict[str, Any]:
    """The rows of a comparison, with the hash of each row's masks."""
    flags = (*SMALL, "--validation-windows", "4", "--sparsity", "0.45,2:4", "--recipes", RECIPES)
    printed = call("-c", COMPARE, *flags, "--out", str(work / "compare"))
    known = json.loads((work / "compare" / "compare.json").read_text(encoding="utf-8"))
    return {
        "dense": known["dense_perplexity"],
        "rows": [{name: row[name] for name in ROW} for row in known["rows"]],
        "masks": [line.split()[1] for line in printed.splitlines() if line.startswith("mask_sha256")],
    }


def record_texts(work: Path) -> dict[str, Any]:
    """A run with two named texts, Python's own prose and one file of its code, the code at three times the weight."""
    code = work / "code.txt"
    code.write_text(Path(argparse.__file__).read_text(encoding="utf-8"), encoding="utf-8")
    texts = ("--text", "prose=pydoc", "--text", f"code=file:{code}", "--text-weights", "prose=1,code=3")
    return record_run(work, "texts", *RUN, *texts)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.record_results", description=__doc__)
    parser.add_argument("out", type=Path, metavar="OUT.json")
    parser.add_argument("--questions", default="", help="Questions of the run with questions; without, it is left out.")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"Of {', '.join(PARTS)}; default: all.")
    given = parser.parse_args()
    work = given.out.with_suffix(".work")
    questions = ("--questions", given.questions, "--question-pairs", "64", "--calibration-mix", "0.25")
    make = {
        "demo": lambda: record_run(work, "demo"),
        "compare": lambda: record_comparison(work),
        "questions": lambda: record_run(work, "questions", *RUN, *questions),
        "texts": lambda: record_texts(work),
        "workers": lambda: record_run(work, "workers", *RUN, "--workers", "2", "--worker-threads", "1"),
        "streamed": lambda: record_run(work, "streamed", *RUN, "--device", "stream"),
        "cut": lambda: record_run(work, "cut", *RUN, "--target-size", "0.8"),
    }
    found = json.loads(given.out.read_text(encoding="utf-8")) if given.out.is_file() else {}
    for part in given.parts or PARTS:
        if part not in found and (part != "questions" or given.questions):
            found[part] = make[part]()
            given.out.write_text(json.dumps(found, indent=1, sort_keys=True), encoding="utf-8")
            print(f"{part}: done", flush=True)


if __name__ == "__main__":
    main()
