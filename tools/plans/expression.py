"""A factor for the KL curve of every layer, as a formula over what the profile says of it: `exp(0.3 * wanda_z)`.

Python's parser reads it and the functions below compute it, node by node, over vectors of layers: nothing of it is ever
run as Python. There are numbers, names of columns, + - * / **, comparisons (1 where they hold, else 0) and `FUNCTIONS`.
A formula of the right form may still name a column that a model does not have, or give a layer no factor.

Shape suffix: L layers.
"""

import ast
import keyword
import math
import operator
import re
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Annotated, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, Field

from tools.base.errors import ImpossiblePlan
from tools.base.words import count
from tools.plans.layer_profile import LEVELS, Array, LayerProfile, level_curve
from tools.plans.recipe import LEAST_FACTOR, MOST_FACTOR

MAX_LENGTH = 200
MAX_NODES = 100
MAX_DEPTH = 20
MOST_EXPONENT = 10.0
"""Exponents of ** are at most this, up or down: more than that is no weight but a switch."""
MAX_PARTS = 40
"""Parts of layers' names that are columns, at most; and letters of one."""

_TOKEN = re.compile(r"[A-Za-z_]\w*|(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?(?![\w.])|[-+*/()<>=!, ]", re.ASCII)


Places = NDArray[np.int64]


class _Function(NamedTuple):
    """One that a formula may call."""

    compute: Callable[[Sequence[Array], Places], Array]
    """Of its arguments and the neighbours of every layer, as `_find_neighbours` gives them."""
    least: int
    most: int
    """How many arguments it takes."""


def _smooth(values_L: Array, neighbours_NL: Places) -> Array:
    """The mean of a layer and of those of its kind in the blocks before and behind."""
    known_NL = neighbours_NL >= 0
    mean_L: Array = np.where(known_NL, values_L[neighbours_NL], 0.0).sum(0) / known_NL.sum(0)
    return mean_L


FUNCTIONS = {
    "exp": _Function(lambda given, _: np.exp(given[0]), 1, 1),
    "log": _Function(lambda given, _: np.log(given[0]), 1, 1),
    "sqrt": _Function(lambda given, _: np.sqrt(given[0]), 1, 1),
    "abs": _Function(lambda given, _: np.abs(given[0]), 1, 1),
    "min": _Function(lambda given, _: reduce(np.minimum, given), 2, 9),
    "max": _Function(lambda given, _: reduce(np.maximum, given), 2, 9),
    "mean": _Function(lambda given, _: np.full_like(given[0], given[0].mean()), 1, 1),
    "where": _Function(lambda given, _: np.where(given[0] != 0, given[1], given[2]), 3, 3),
    "clip": _Function(lambda given, _: np.minimum(np.maximum(given[0], given[1]), given[2]), 3, 3),
    "smooth": _Function(lambda given, neighbours_NL: _smooth(given[0], neighbours_NL), 1, 1),
}
"""By name. `mean` is over all layers, `smooth` over neighbouring blocks that have the kind of layer."""

_OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}


_SIGNS = ast.operator | ast.unaryop | ast.cmpop | ast.expr_context


# Its form


def check_expression(text: str) -> str:
    """The formula as it was given. Raises ValueError, in one line, where it is none."""
    if text:
        _parse(text)
    return text


Expression = Annotated[str, Field(max_length=MAX_LENGTH), AfterValidator(check_expression)]
"""A formula of the right form, or nothing."""


def tidy_expression(expression: str) -> str:
    """The formula in one way of writing, whatever its spaces and brackets were; nothing where there is none."""
    return ast.unparse(_parse(expression)) if expression else ""


def _parse(text: str) -> ast.expr:
    """Raises ValueError with what is not allowed."""
    if len(text) > MAX_LENGTH:
        raise ValueError(f"an expression has at most {MAX_LENGTH} characters, not {len(text)}")
    line = " ".join(text.split())
    if rest := "".join(_TOKEN.sub("", line).split()):  # so that the parser meets nothing that it would warn of
        raise ValueError(f"{rest[:20]!a} is not allowed in an expression; {_tell_form()}")
    try:
        root = ast.parse(line, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"expression {line[:60]!r} cannot be read: {_name_fault(error)}") from error
    _refuse_size(root)
    nodes = [root]
    while nodes:
        nodes += _list_inner(nodes.pop())
    return root


def _name_fault(error: BaseException) -> str:
    return error.msg if isinstance(error, SyntaxError) else "it is nested too deeply"


def _refuse_size(root: ast.expr) -> None:
    level: list[ast.AST] = [root]
    depth = parts = 0
    while level:
        depth, parts = depth + 1, parts + len(level)
        if depth > MAX_DEPTH or parts > MAX_NODES:
            raise ValueError(f"an expression has at most {MAX_NODES} parts, nested at most {MAX_DEPTH} deep")
        inner = [child for node in level for child in ast.iter_child_nodes(node)]
        level = [child for child in inner if not isinstance(child, _SIGNS)]


def _list_inner(node: ast.expr) -> list[ast.expr]:
    """What a node is made of. Raises ValueError where it is not allowed."""
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool) and math.isfinite(value):
            return []
        case ast.Name():
            return []
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _OPERATORS:
            return [operand]
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return [left, right]
        case ast.Compare(left=left, ops=ops, comparators=others) if all(type(op) in _OPERATORS for op in ops):
            return [left, *others]
        case ast.Call(func=ast.Name(id=name), args=given, keywords=[]) if name in FUNCTIONS:
            function = FUNCTIONS[name]
            if not function.least <= len(given) <= function.most:
                more = "" if function.least == function.most else " or more"
                raise ValueError(f"{name}() takes {count(function.least, 'value')}{more}, not {len(given)}")
            return given
    raise ValueError(f"{ast.unparse(node)[:60]!r} is not allowed in an expression; {_tell_form()}")


def _tell_form() -> str:
    return f"there are numbers, columns, + - * / **, comparisons and {', '.join(FUNCTIONS)}"


# What it comes to


def list_columns(layers: Sequence[LayerProfile]) -> dict[str, Array]:
    """What a formula may name, each of shape [L].

    `depth` is 0 in the first block and 1 in the last; `peak` is the strongest input channel's share, 0 where it was not
    recorded; `kl15` to `kl75` are the KL curves, in nats per token; `log_size` is the natural logarithm of the number
    of weights. A part of layers' names, such as `self_attn` or `v_proj`, is 1
    for the layers that have it inside their block, and 0 for all others.
    """
    block_L = np.array([layer.block for layer in layers], dtype=np.float64)
    curve_LG = np.stack([level_curve(layer) for layer in layers])
    columns: dict[str, Array] = {
        "depth": block_L / max(block_L.max(), 1.0),
        "block": block_L,
        "wanda_z": np.array([layer.wanda_z for layer in layers]),
        "grad_z": np.array([layer.gradient_z for layer in layers]),
        "peak": np.array([layer.peak or 0.0 for layer in layers]),
        **{f"kl{100 * level:.0f}": curve_L for level, curve_L in zip(LEVELS, curve_LG.T, strict=True)},
        "log_size": np.log([layer.weights for layer in layers]),
    }
    for part in list_parts(layers):
        columns.setdefault(part, np.array([float(part in layer.kind.split(".")) for layer in layers]))
    return columns


def list_parts(layers: Sequence[LayerProfile]) -> list[str]:
    """The parts of layers' names inside their blocks that a formula can name, in order of first appearance."""
    parts = dict.fromkeys(part for layer in layers for part in layer.kind.split("."))
    named = [part for part in parts if part.isascii() and part.isidentifier() and not keyword.iskeyword(part)]
    return [part for part in named if len(part) <= MAX_PARTS][:MAX_PARTS]


def evaluate_expression(expression: str, layers: Sequence[LayerProfile]) -> Array:
    """The factor of every layer, shape [L], float64, within those that an adjustment may have.

    What the allocation goes by is how they relate. Where some are beyond the bounds, all are divided by their geometric
    mean; what is beyond them still is the nearest that is not.

    Raises ImpossiblePlan for a name that is no column, an exponent beyond `MOST_EXPONENT`, and a layer whose factor is
    not finite or not above 0.
    """
    root, columns, neighbours_NL = _parse(expression), list_columns(layers), _find_neighbours(layers)

    def compute(node: ast.expr) -> Array:
        given = [compute(inner) for inner in _list_inner(node)]
        match node:
            case ast.Constant(value=int() | float() as value):
                return np.full(len(layers), float(value))
            case ast.Name(id=name):
                if name not in columns:
                    raise ImpossiblePlan(f"expression: {name!r} is no column; there are {', '.join(columns)}")
                return columns[name]
            case ast.Call(func=ast.Name(id=name)):
                return FUNCTIONS[name].compute(given, neighbours_NL)
            case ast.Compare(ops=ops):
                pairs = zip(ops, given, given[1:], strict=False)
                holds = [_OPERATORS[type(op)](left_L, right_L) for op, left_L, right_L in pairs]
                held_L: Array = np.all(holds, axis=0).astype(np.float64)
                return held_L
            case ast.BinOp(op=ast.Pow()):
                _refuse_exponents(given[1])
        assert isinstance(node, ast.BinOp | ast.UnaryOp), "all else was refused"
        computed: Array = _OPERATORS[type(node.op)](*given)
        return computed

    with np.errstate(all="ignore"):  # a division by zero in the arm of a `where` that is not taken, say
        factors_L = compute(root)
    for layer, factor in zip(layers, factors_L, strict=True):
        if not (math.isfinite(factor) and factor > 0):
            raise ImpossiblePlan(f"expression: {layer.name} has the factor {factor:g}, not a finite one above 0")
    if factors_L.min() < LEAST_FACTOR or factors_L.max() > MOST_FACTOR:
        factors_L = np.exp(np.log(factors_L) - np.log(factors_L).mean())
    return np.clip(factors_L, LEAST_FACTOR, MOST_FACTOR)


def _refuse_exponents(exponents_L: Array) -> None:
    if not (np.abs(exponents_L) <= MOST_EXPONENT).all():
        raise ImpossiblePlan(f"expression: an exponent is beyond -{MOST_EXPONENT:g} to {MOST_EXPONENT:g}")


def _find_neighbours(layers: Sequence[LayerProfile]) -> Places:
    """Places of a layer and of those of its kind in the blocks before and behind: [3, L], -1 for none."""
    places: dict[str, list[int]] = {}
    for place in sorted(range(len(layers)), key=lambda i: layers[i].block):
        places.setdefault(layers[place].kind, []).append(place)
    neighbours_NL: Places = np.full((3, len(layers)), -1, dtype=np.int64)
    for same in places.values():
        neighbours_NL[0, same] = same
        neighbours_NL[1, same[1:]] = same[:-1]
        neighbours_NL[2, same[:-1]] = same[1:]
    return neighbours_NL
