"""What must be the same in every process of a team."""

import hashlib
import importlib.metadata
import platform
from collections.abc import Container
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel

import billhook_kernels
import tools
from tools.models.mapped import view_bytes
from tools.models.streamed import find_stream

# Wherever they lie: in a checkout, or each by itself among installed packages.
CODE = (Path(billhook_kernels.__file__).parent, Path(tools.__file__).parent)


class Identity(BaseModel):
    """What must be the same everywhere for results to be the same bits, as far as the device gives them twice."""

    billhook: str
    torch: str
    device: str
    model: str

    def explain_difference(self, other: "Identity") -> str:
        """What the other one has instead, in a few words; "" where it has all the same."""
        pairs = ((name, getattr(self, name), getattr(other, name)) for name in type(self).model_fields)
        return ", ".join(f"{name} {theirs} instead of {ours}" for name, ours, theirs in pairs if ours != theirs)


def hash_weights(model: Any, but: Container[str] = ()) -> str:
    """SHA-256, in hex, of all weights as they are now but some by name, with names, shapes and dtypes."""
    weights = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if name in but:
            continue
        if stream := find_stream(model):
            stream.let_go()
        weights.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        weights.update(view_bytes(value))
    return weights.hexdigest()


def identify(model: Any) -> Identity:
    """This process: versions, with hashes of Billhook's own code and of the model's weights as they are now."""
    return Identity(
        billhook=f"{importlib.metadata.version('billhook')} ({hash_code(*CODE)[:12]})",
        torch=f"{torch.__version__} on {platform.machine()}",
        device=torch.cuda.get_device_name(model.device)
        if model.device.type == "cuda"
        else f"CPU with {torch.backends.cpu.get_cpu_capability()}",
        model=f"with weights {hash_weights(model)[:12]}",
    )


def hash_code(*packages: Path) -> str:
    """SHA-256, in hex, of all code that makes results: every file of Python in these folders, with its place."""
    code = hashlib.sha256()
    for package in packages:
        for path in sorted(package.rglob("*.py")):
            content = path.read_bytes()
            code.update(f"{path.relative_to(package.parent).as_posix()} {len(content)}\n".encode())
            code.update(content)
    return code.hexdigest()
