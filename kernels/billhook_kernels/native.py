"""Packed products on this machine's processor: LLVM IR, compiled by llvmlite when it is first needed.

The heart is one instruction, expand-load: it reads as many values as a run of mask bits has ones and puts each into
its lane, zeros into the others. For 16-bit values that is VPEXPANDW of AVX-512 VBMI2, for 32-bit ones VPEXPANDD of
AVX-512F; elsewhere LLVM makes of it a loop that is slower than a dense product, so other processors are refused.

The functions behind addresses check nothing: `billhook_kernels.packed` makes and checks what they read.

Shape suffixes: B rows of x, O output features (rows), I input features (columns), W = ceil(I / 32) words of a mask row.
"""

import ctypes
import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from billhook_kernels.threads import share_rows

WORD = 32
"""Mask bits that are read at once: a row of a mask is padded to whole words of this many."""

MOST_ROWS = 8
"""Rows of x that one pass over the weight serves; more take several passes."""

PREFETCH_BYTES = 8192
MASK_PREFETCH_BYTES = 1024
"""How far ahead of what is read more is fetched, of the values and of the mask: the processor's own guess stops at
each page. Any distance from 4 kB to 64 kB is as good; without them a cold product takes a third longer."""

FEATURES = {torch.bfloat16: ("avx512f", "avx512bw", "avx512vbmi2"), torch.float32: ("avx512f", "avx512bw")}
"""What a processor must have, in LLVM's names, for weights of each dtype."""


class Kernels(NamedTuple):
    """The compiled functions of one dtype; they take addresses and int64, and rows `first` to `last` - 1 of W."""

    multiply: dict[int, Callable[..., None]]
    """By B: (mask_OW, values, offsets_O, bias_O, x, y, first, last, W, O), x (B, 32 W) and y (B, O) in the weight's
    dtype as the bias is, whose address may be 0."""
    unpack: Callable[..., None]
    """(mask_OW, values, offsets_O, weight, first, last, W), weight (O, 32 W)."""
    engine: object
    """Owns the machine code."""


@functools.cache
def explain_absence(dtype: torch.dtype) -> str:
    """Why there is no native kernel for weights of a dtype on this machine; "" where there is one."""
    if dtype not in FEATURES:
        return f"there is no native kernel for {str(dtype).removeprefix('torch.')}"
    try:
        import llvmlite.binding as llvm
    except ImportError:
        return "llvmlite is not installed (pip install 'billhook[fast]')"
    try:
        features = llvm.get_host_cpu_features()
    except RuntimeError:  # LLVM cannot tell on every system
        return "the features of this processor are not known"
    lacking = [name for name in FEATURES[dtype] if not features.get(name)]
    return f"this processor lacks {', '.join(lacking)}" if lacking else ""


@functools.cache
def compile_kernels(dtype: torch.dtype) -> Kernels:
    """The kernels for a dtype that `explain_absence` says nothing against; compiled once in a process."""
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=3
    )
    module = llvm.parse_assembly(write_ir(dtype))
    module.verify()
    engine = llvm.create_mcjit_compiler(module, machine)
    engine.finalize_object()

    def find(name: str, arguments: int) -> Callable[..., None]:
        # Functions of this kind let go of Python's lock while they run.
        function = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * arguments)(engine.get_function_address(name))
        return function

    multiply = {rows: find(f"multiply_{rows}", 10) for rows in range(1, MOST_ROWS + 1)}
    return Kernels(multiply, find("unpack", 7), engine)


# --- calls -------------------------------------------------------------------------------------------------------


def multiply_rows(
    mask_OW: Tensor, values: Tensor, offsets_O: Tensor, x: Tensor, bias_O: Tensor | None = None
) -> Tensor:
    """x W^T + b of a checked packed weight: x (…, I), b and the result (…, O) in the values' dtype, sums in fp32.

    One call does it all: behind a product that sweeps the caches, each small operation of torch takes 50 us.
    """
    rows, words = mask_OW.shape
    *batch, columns = x.shape
    count = x.numel() // columns
    if columns != words * WORD:
        x = torch.nn.functional.pad(x, (0, words * WORD - columns))
    x = x.contiguous()
    y = x.new_empty(*batch, rows)
    if bias_O is not None:
        bias_O = bias_O.to(values.dtype).contiguous()
    multiply = compile_kernels(values.dtype).multiply
    bias = 0 if bias_O is None else bias_O.data_ptr()
    weight = mask_OW.data_ptr(), values.data_ptr(), offsets_O.data_ptr(), bias
    x_first, y_first = x.data_ptr(), y.data_ptr()

    def run(first: int, last: int) -> None:
        for start in range(0, count, MOST_ROWS):
            function = multiply[min(MOST_ROWS, count - start)]
            x_at, y_at = x_first + start * words * WORD * x.itemsize, y_first + start * rows * y.itemsize
            function(*weight, x_at, y_at, first, last, words, rows)

    share_rows(run, rows, mask_OW.nbytes + values.nbytes)
    return y


def unpack_rows(mask_OW: Tensor, values: Tensor, offsets_O: Tensor, room: Tensor | None = None) -> Tensor:
    """A checked packed weight as (O, 32 W) in the values' dtype, zeros behind column I.

    In the first rows of `room` if some is given: to write to fresh memory takes five times as long.
    """
    rows, words = mask_OW.shape
    weight = values.new_empty(rows, words * WORD) if room is None else room[:rows]
    unpack = compile_kernels(values.dtype).unpack
    pointers = mask_OW.data_ptr(), values.data_ptr(), offsets_O.data_ptr(), weight.data_ptr()
    share_rows(lambda first, last: unpack(*pointers, first, last, words), rows, weight.nbytes)
    return weight


# --- the code ----------------------------------------------------------------------------------------------------


def write_ir(dtype: torch.dtype) -> str:
    """The kernels of a dtype in LLVM's language."""
    # The values of one expand-load, whose lanes fill one register of 512 bits.
    lanes, item = (32, "i16") if dtype == torch.bfloat16 else (16, "i32")
    multiply = [_write_multiply(lanes, item, rows) for rows in range(1, MOST_ROWS + 1)]
    return "\n".join([_HEAD.format(lanes=lanes, item=item), *multiply, _write_unpack(lanes, item)])


_HEAD = """
declare <{lanes} x {item}> @llvm.masked.expandload.v{lanes}{item}(ptr, <{lanes} x i1>, <{lanes} x {item}>)
declare i{lanes} @llvm.ctpop.i{lanes}(i{lanes})
declare <16 x float> @llvm.fma.v16f32(<16 x float>, <16 x float>, <16 x float>)
declare float @llvm.vector.reduce.fadd.v16f32(float, <16 x float>)
declare void @llvm.prefetch.p0(ptr, i32, i32, i32)
attributes #0 = {{ nounwind "min-legal-vector-width"="512" "prefer-vector-width"="512" }}
"""


def _write_loops(head: str, lanes: int, item: str, carried: str, body: str, end: str) -> str:
    """A function: for every row o, for every word w of its mask: `body`, with its values expanded in %e0 (and %e1).

    `carried` holds what goes from word to word, `end` is done with each row. %at is the index of the word's first
    column.
    """
    parts = [f"%v0 = phi i64 [%start, %row], [%v{WORD // lanes}, %word]", carried]
    parts.append("%at = shl i64 %w, 5\n%maskp = getelementptr i32, ptr %maskrow, i64 %w\n%bits = load i32, ptr %maskp")
    parts.append(f"%maskahead = getelementptr i8, ptr %maskp, i64 {MASK_PREFETCH_BYTES}")
    parts.append("call void @llvm.prefetch.p0(ptr %maskahead, i32 0, i32 3, i32 1)")
    for i in range(WORD // lanes):
        shifted = f"%shifted{i} = lshr i32 %bits, {i * lanes}"
        narrow = f"%part{i} = trunc i32 %shifted{i} to i16" if lanes == 16 else f"%part{i} = add i32 %shifted{i}, 0"
        parts.append(f"""
        {shifted}
        {narrow}
        %keep{i} = bitcast i{lanes} %part{i} to <{lanes} x i1>
        %p{i} = getelementptr {item}, ptr %values, i64 %v{i}
        %e{i} = call <{lanes} x {item}> @llvm.masked.expandload.v{lanes}{item}(
            ptr align {2 if item == "i16" else 4} %p{i}, <{lanes} x i1> %keep{i}, <{lanes} x {item}> zeroinitializer)
        %ahead{i} = getelementptr i8, ptr %p{i}, i64 {PREFETCH_BYTES}
        call void @llvm.prefetch.p0(ptr %ahead{i}, i32 0, i32 3, i32 1)
        %count{i} = call i{lanes} @llvm.ctpop.i{lanes}(i{lanes} %part{i})
        %wide{i} = zext i{lanes} %count{i} to i64
        %v{i + 1} = add i64 %v{i}, %wide{i}""")
    word = "\n".join([*parts, body])
    return f"""
    define void {head} #0 {{
    entry:
      %some = icmp slt i64 %first, %last
      br i1 %some, label %row, label %done
    row:
      %o = phi i64 [%first, %entry], [%onext, %next]
      %startp = getelementptr i64, ptr %offsets, i64 %o
      %start = load i64, ptr %startp
      %rowat = mul i64 %o, %words
      %maskrow = getelementptr i32, ptr %mask, i64 %rowat
      br label %word
    word:
      %w = phi i64 [0, %row], [%wnext, %word]
      {word}
      %wnext = add i64 %w, 1
      %more = icmp slt i64 %wnext, %words
      br i1 %more, label %word, label %end
    end:
      {end}
      br label %next
    next:
      %onext = add i64 %o, 1
      %again = icmp slt i64 %onext, %last
      br i1 %again, label %row, label %done
    done:
      ret void
    }}"""


def _write_multiply(lanes: int, item: str, rows: int) -> str:
    """Two sums for every row of x: of even and odd columns (bf16), or of the left and right half of a word (fp32)."""
    widened = _widen("w", "%e0", "%e1", lanes)
    carried, body, end = [], [widened], [_write_bias(item)]
    for b in range(rows):
        for side in (0, 1):
            carried.append(f"%s{b}_{side} = phi <16 x float> [zeroinitializer, %row], [%t{b}_{side}, %word]")
        body.append(f"""
        %xrow{b} = mul i64 %words, {b * WORD}
        %xat{b} = add i64 %xrow{b}, %at
        %xp{b} = getelementptr {item}, ptr %x, i64 %xat{b}
        %xl{b}_0 = load <{lanes} x {item}>, ptr %xp{b}, align 2""")
        if lanes == 16:
            body.append(f"%xq{b} = getelementptr i8, ptr %xp{b}, i64 64")
            body.append(f"%xl{b}_1 = load <16 x i32>, ptr %xq{b}, align 2")
        body.append(_widen(f"x{b}_", f"%xl{b}_0", f"%xl{b}_1", lanes))
        for side in (0, 1):
            body.append(
                f"%t{b}_{side} = call <16 x float> @llvm.fma.v16f32("
                f"<16 x float> %w{side}, <16 x float> %x{b}_{side}, <16 x float> %s{b}_{side})"
            )
        end.append(f"""
        %both{b} = fadd <16 x float> %t{b}_0, %t{b}_1
        %sum{b} = call reassoc float @llvm.vector.reduce.fadd.v16f32(float -0.0, <16 x float> %both{b})
        %y{b} = fadd float %sum{b}, %offset
        %yrow{b} = mul i64 %rows, {b}
        %yat{b} = add i64 %yrow{b}, %o
        %yp{b} = getelementptr {item}, ptr %y, i64 %yat{b}""")
        end.append(_write_store(item, b))
    head = f"@multiply_{rows}(ptr %mask, ptr %values, ptr %offsets, ptr %bias, ptr %x, ptr %y, "
    head += "i64 %first, i64 %last, i64 %words, i64 %rows)"
    return _write_loops(head, lanes, item, "\n".join(carried), "\n".join(body), "\n".join(end))


def _write_bias(item: str) -> str:
    """%offset: the row's bias, or 0 where there is none."""
    word = "%biasbits = zext i16 %biasitem to i32\n%biasword = shl i32 %biasbits, 16"
    return f"""
      %biased = icmp ne ptr %bias, null
      br i1 %biased, label %load, label %store
    load:
      %biasp = getelementptr {item}, ptr %bias, i64 %o
      %biasitem = load {item}, ptr %biasp
      {word if item == "i16" else "%biasword = add i32 %biasitem, 0"}
      %biasvalue = bitcast i32 %biasword to float
      br label %store
    store:
      %offset = phi float [-0.0, %end], [%biasvalue, %load]"""


def _write_store(item: str, b: int) -> str:
    """Write %y{b}; as bf16 rounded to the nearest, ties to even, a NaN staying one."""
    if item == "i32":
        return f"store float %y{b}, ptr %yp{b}"
    return f"""
        %ybits{b} = bitcast float %y{b} to i32
        %yup{b} = lshr i32 %ybits{b}, 16
        %ylast{b} = and i32 %yup{b}, 1
        %yhalf{b} = add i32 %ylast{b}, 32767
        %yround{b} = add i32 %ybits{b}, %yhalf{b}
        %yupper{b} = lshr i32 %yround{b}, 16
        %yquiet{b} = or i32 %yup{b}, 64
        %ynan{b} = fcmp uno float %y{b}, 0.0
        %yword{b} = select i1 %ynan{b}, i32 %yquiet{b}, i32 %yupper{b}
        %yitem{b} = trunc i32 %yword{b} to i16
        store i16 %yitem{b}, ptr %yp{b}"""


def _widen(name: str, first: str, second: str, lanes: int) -> str:
    """%{name}0 and %{name}1: 32 values as fp32; a bf16 value is the upper half of the fp32 one."""
    if lanes == 16:
        return f"""
        %{name}0 = bitcast <16 x i32> {first} to <16 x float>
        %{name}1 = bitcast <16 x i32> {second} to <16 x float>"""
    return f"""
        %{name}pairs = bitcast <32 x i16> {first} to <16 x i32>
        %{name}even = shl <16 x i32> %{name}pairs, splat (i32 16)
        %{name}odd = and <16 x i32> %{name}pairs, splat (i32 -65536)
        %{name}0 = bitcast <16 x i32> %{name}even to <16 x float>
        %{name}1 = bitcast <16 x i32> %{name}odd to <16 x float>"""


def _write_unpack(lanes: int, item: str) -> str:
    body = f"""
        %rowstart = mul i64 %rowat, {WORD}
        %to = add i64 %rowstart, %at
        %q0 = getelementptr {item}, ptr %weight, i64 %to
        store <{lanes} x {item}> %e0, ptr %q0, align 2"""
    if lanes == 16:
        body += "\n%q1 = getelementptr i8, ptr %q0, i64 64\nstore <16 x i32> %e1, ptr %q1, align 2"
    head = "@unpack(ptr %mask, ptr %values, ptr %offsets, ptr %weight, i64 %first, i64 %last, i64 %words)"
    return _write_loops(head, lanes, item, "", body, "")
