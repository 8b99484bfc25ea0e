"""Triton's kernels compile for a GPU that need not be there: its interpreter lets pass what its compiler refuses."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

COMPILE = """
import re
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

class Driver:
    def get_current_target(self): return GPUTarget("cuda", 80, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0

driver.set_active(Driver())
run, compiled = JITFunction.run, set()

def compile_only(self, *arguments, warmup, **options):
    kernel = run(self, *arguments, warmup=True, **options)
    assert kernel.asm["cubin"] and ".ftz" not in kernel.asm["ptx"], self.__name__
    compiled.add(self.__name__)

JITFunction.run = compile_only

from billhook_kernels import triton_masks, triton_packed, triton_statistics

BF16 = torch.bfloat16
triton_masks.remove_lowest(torch.zeros(2, 4096, dtype=torch.int32), torch.ones(2))
triton_masks.remove_lowest(torch.zeros(2, 65536, dtype=torch.int32), torch.ones(2))
triton_masks.remove_lowest_of_columns(torch.zeros(4, 4096, dtype=torch.int32), 2)
try:
    triton_masks.select_wanda(torch.zeros(1, 1, dtype=BF16), torch.zeros(1), torch.ones(1))
except ValueError:
    pass  # nothing was run, so that its results are what lay in memory
weight_OI = torch.zeros(3, 4096, dtype=BF16)
mask_OW, counts_OK = triton_packed.pack_bits(weight_OI == 0)
triton_packed.collect_kept(weight_OI, weight_OI == 0, counts_OK * 0, 32)
for dtype in (BF16, torch.float32):
    x_TI, part_OI = torch.zeros(64, 96, dtype=dtype), torch.zeros(48, 96, dtype=dtype)
    triton_statistics.add_second_moment(torch.zeros(96, 96), x_TI)
    triton_statistics.sum_changes(x_TI, part_OI, torch.zeros(64, 48, dtype=dtype))
texts = [open(module.__file__).read() for module in (triton_masks, triton_packed, triton_statistics)]
kernels = {name for text in texts for name in re.findall(r"^@triton.jit\\ndef (\\w+)", text, re.M)}
print(*sorted(kernels - compiled))
"""
"""Calls all that launches kernels, on the CPU, and compiles instead of launching."""


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_every_kernel_compiles(tmp_path: Path) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-W", "error", "-c", COMPILE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["_load_chunk"], "a part of other kernels"
