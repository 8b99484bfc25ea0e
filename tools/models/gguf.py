"""Reading .gguf files, by transformers and the package gguf."""

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_REPEATED = ("GGUFReader", "get_tensor_name_map")
"""What transformers asks of the package gguf again and again while it loads one file."""

_turn = threading.RLock()


@contextmanager
def reading_once() -> Iterator[None]:
    """Inside, the head of a .gguf file is parsed once, and the names of its tensors are made once.

    transformers parses it anew for the tokenizer, the config and the weights, and makes the names of all tensors at
    every module of the model: more than half of the time in which a small model is loaded. Only one thread is inside.
    """
    import gguf

    with _turn:
        before = {name: getattr(gguf, name) for name in _REPEATED}
        for name, function in before.items():
            setattr(gguf, name, functools.cache(function))
        try:
            yield
        finally:
            for name, function in before.items():
                setattr(gguf, name, function)
