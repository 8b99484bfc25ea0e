"""Does the wheel work by itself? `python -m tests.try_wheel ENVIRONMENT`

Builds a wheel of this checkout, installs it with the newest libraries into a new environment, beside Hugging Face's
`kernels`, and there, from an empty folder, shows the help and prunes a tiny model. Ends with 1 at the first failure.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

from tests.end_to_end.helpers import TINY
from tests.paths import ROOT
from tests.tiny import save_tiny_model


def try_wheel(environment: Path) -> None:
    """Raises CalledProcessError where a step fails."""
    shutil.rmtree(environment, ignore_errors=True)
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)

        def call(*command: str | Path) -> None:
            print("+", *command, flush=True)
            clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
            subprocess.run(command, cwd=here, env=clean, check=True)

        call(python, "-m", "pip", "wheel", "-q", "--no-deps", "-w", here, ROOT)
        call(python, "-m", "pip", "install", "-q", "kernels", next(here.glob("*.whl")))
        call(python, "-m", "pip", "check")
        owners = "import kernels, billhook_kernels as ours; print(kernels.__file__, ours.__file__)"
        call(python, "-c", owners)
        call(environment / "bin" / "billhook", "--help")
        model = save_tiny_model(here / "tiny", "llama")
        call(environment / "bin" / "billhook", "--model", model, *TINY, "--name", "run")
        call(python, "-c", "from transformers import AutoModelForCausalLM as M; M.from_pretrained('runs/run/model')")


if __name__ == "__main__":
    try_wheel(Path(sys.argv[1]).resolve())
