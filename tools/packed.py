"""What model cards and `kernels/FORMAT.md` name: `from tools.packed import load_packed`."""

from tools.models.packed import load_packed as load_packed
