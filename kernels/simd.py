"""Vectors of eight float32 lanes for Numba, and the exponentials of the scans on them.

A compiler's loop vectoriser gives up on loops as long as a scan's, for the aliasing checks alone. Here the vector is a
type: ``load``, ``store``, arithmetic and ``fmadd`` become one LLVM instruction each, which LLVM splits on machines with
narrower registers.

Memory is addressed as in C, by a pointer (``Tensor.data_ptr()``, an integer) and an index in elements: nothing is
checked, and nothing is counted, which for Numba's arrays would cost more than the arithmetic on short runs.
"""

# Numba's functions take their types from Numba.
# mypy: allow-untyped-defs

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import extending
from numba.core import cgutils, types
from numba.core.typing import signature
from numba.core.typing.templates import ConcreteTemplate, infer_global
from numba.extending import lower_builtin, models, register_model

from seqssm.kernels.compiled import inlined

LANES = 8
_FLOAT, _INT = ir.FloatType(), ir.IntType(32)
_VECTOR, _INTS = ir.VectorType(_FLOAT, LANES), ir.VectorType(_INT, LANES)
ZERO, ONE, LN_2, LOG2_E = (np.float32(x) for x in (0.0, 1.0, 0.6931471805599453, 1.4426950408889634))
_TWO = np.float32(2.0)
_LOWEST, _HIGHEST = np.float32(-127.0), np.float32(128.0)
_LOWEST_E, _HIGHEST_E = np.float32(-88.0297), np.float32(88.7229)
_SHIFT = np.float32(1.5 * 2.0**23)  # adding it rounds to an integer
_LN2_HIGH, _LN2_LOW = np.float32(0.693145751953125), np.float32(1.428606765330187e-06)
_P1, _P2, _P3 = np.float32(0.6931469775394191), np.float32(0.24022242074404995), np.float32(0.055507337953461036)
_P4, _P5 = np.float32(0.009671513144505284), np.float32(0.001326471635921237)
_L1, _L2 = np.float32(0.33333157340913855), np.float32(0.20012455144261193)
_L3, _L4 = np.float32(0.13980301332660994), np.float32(0.14089167649712858)


class VectorType(types.Type):
    """Numba's type of a vector of eight float32 lanes."""

    def __init__(self) -> None:
        super().__init__(name="float32x8")


vector = VectorType()


@register_model(VectorType)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, type_):
        super().__init__(manager, type_, _VECTOR)


def intrinsic(function: Callable) -> Any:
    """``numba.extending.intrinsic``; the typing context in front of its arguments is Numba's affair."""
    return extending.intrinsic(function)


def _constant(value: float) -> ir.Constant:
    return ir.Constant(_VECTOR, [ir.Constant(_FLOAT, value)] * LANES)


def _define_operator(function: Callable, method: str) -> None:
    @infer_global(function)
    class _Template(ConcreteTemplate):
        cases = [signature(vector, vector, vector)]  # noqa: RUF012

    @lower_builtin(function, VectorType, VectorType)
    def _lower(context, builder, sig, args):
        return getattr(builder, method)(*args, flags=("contract",))


for _function, _method in (
    (operator.add, "fadd"),
    (operator.sub, "fsub"),
    (operator.mul, "fmul"),
    (operator.truediv, "fdiv"),
):
    _define_operator(_function, _method)


def _element(builder, pointer, index, kind):
    return builder.gep(builder.inttoptr(pointer, kind.as_pointer()), [index])


def _getter(number: types.Type, kind: ir.Type) -> Any:
    def typing(typingctx, pointer, index):
        def codegen(context, builder, sig, args):
            return builder.load(_element(builder, args[0], args[1], kind))

        return number(types.int64, types.int64), codegen

    return intrinsic(typing)


def _setter(number: types.Type, kind: ir.Type) -> Any:
    def typing(typingctx, pointer, index, value):
        def codegen(context, builder, sig, args):
            builder.store(args[2], _element(builder, args[0], args[1], kind))
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, number), codegen

    return intrinsic(typing)


# pointer, index -> element; and pointer, index, element to write one.
get, put = _getter(types.float32, _FLOAT), _setter(types.float32, _FLOAT)
get_double, put_double = _getter(types.float64, ir.DoubleType()), _setter(types.float64, ir.DoubleType())
get_byte = _getter(types.uint8, ir.IntType(8))


@intrinsic
def splat(typingctx, x):
    """A scalar in every lane."""

    def codegen(context, builder, sig, args):
        undefined = ir.Constant(_VECTOR, ir.Undefined)
        first = builder.insert_element(undefined, args[0], ir.Constant(_INT, 0))
        return builder.shuffle_vector(first, undefined, ir.Constant(_INTS, [0] * LANES))

    return vector(types.float32), codegen


@intrinsic
def load(typingctx, pointer, index):
    """Eight consecutive floats from ``index`` on."""

    def codegen(context, builder, sig, args):
        address = _element(builder, args[0], args[1], _FLOAT)
        return builder.load(builder.bitcast(address, _VECTOR.as_pointer()), align=4)

    return vector(types.int64, types.int64), codegen


@intrinsic
def store(typingctx, pointer, index, value):
    """Write eight consecutive floats from ``index`` on."""

    def codegen(context, builder, sig, args):
        address = _element(builder, args[0], args[1], _FLOAT)
        builder.store(args[2], builder.bitcast(address, _VECTOR.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, vector), codegen


@inlined
def load_some(pointer, index, stride, count, spare):
    """``count`` lanes from every ``stride``-th float, zeros in the others; ``spare`` points to eight floats to use."""
    if count == LANES and stride == 1:
        return load(pointer, index)
    store(spare, 0, splat(ZERO))
    for lane in range(count):
        put(spare, lane, get(pointer, index + lane * stride))
    return load(spare, 0)


@inlined
def store_some(pointer, index, stride, value, count, spare):
    """Write the first ``count`` lanes to every ``stride``-th float."""
    if count == LANES and stride == 1:
        store(pointer, index, value)
    else:
        store(spare, 0, value)
        for lane in range(count):
            put(pointer, index + lane * stride, get(spare, lane))


@inlined
def add_doubles(pointer, index, stride, value, count, spare):
    """Add the first ``count`` lanes to every ``stride``-th float64."""
    store(spare, 0, value)
    for lane in range(count):
        at = index + lane * stride
        put_double(pointer, at, get_double(pointer, at) + get(spare, lane))


@intrinsic
def fmadd(typingctx, a, b, c):
    """a b + c, fused where the machine has it."""

    def codegen(context, builder, sig, args):
        kind = ir.FunctionType(_VECTOR, [_VECTOR] * 3)
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.fmuladd.v8f32"), args)

    return vector(vector, vector, vector), codegen


def _bound(comparison: str) -> Any:
    def typing(typingctx, x, bound):
        def codegen(context, builder, sig, args):
            return builder.select(builder.fcmp_ordered(comparison, *args), args[1], args[0])

        return vector(vector, vector), codegen

    return intrinsic(typing)


# max(x, bound) and min(x, bound) in which a NaN of x stays: a comparison with it is false.
at_least, at_most = _bound("<"), _bound(">")


def _total(builder, x):
    for half in (4, 2, 1):
        lanes = [i + half if i < half else i for i in range(LANES)]
        x = builder.fadd(x, builder.shuffle_vector(x, x, ir.Constant(_INTS, lanes)))
    return builder.extract_element(x, ir.Constant(_INT, 0))


@intrinsic
def total(typingctx, x):
    """Sum of the lanes, in a fixed order: halves, then quarters, then neighbours."""

    def codegen(context, builder, sig, args):
        return _total(builder, args[0])

    return types.float32(vector), codegen


@intrinsic
def add_totals(typingctx, pointer, index, a, b):
    """Add the sums of the lanes of ``a`` and ``b``, in a fixed order, to the floats at ``index`` and ``index + 1``."""
    kind = ir.VectorType(_FLOAT, 2)

    def codegen(context, builder, sig, args):
        def pick(x, y, lanes):
            return builder.shuffle_vector(x, y, ir.Constant(ir.VectorType(_INT, len(lanes)), lanes))

        a4, b4 = [builder.fadd(pick(x, x, [0, 1, 2, 3]), pick(x, x, [4, 5, 6, 7])) for x in args[2:]]
        pairs = builder.fadd(pick(a4, b4, [0, 1, 4, 5]), pick(a4, b4, [2, 3, 6, 7]))
        sums = builder.fadd(pick(pairs, pairs, [0, 2]), pick(pairs, pairs, [1, 3]))
        address = builder.bitcast(_element(builder, args[0], args[1], _FLOAT), kind.as_pointer())
        builder.store(builder.fadd(builder.load(address, align=4), sums), address, align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, vector, vector), codegen


def _products(tokens: int, rows: int) -> Any:
    def typing(typingctx, out, out_by, weight, columns, x, by):
        def codegen(context, builder, sig, args):
            out, out_by, weight, columns, x, by = args
            number = columns.type
            mask = ir.VectorType(ir.IntType(1), LANES)
            masked = cgutils.get_or_insert_function(
                builder.module,
                ir.FunctionType(_VECTOR, [_VECTOR.as_pointer(), _INT, mask, _VECTOR]),
                "llvm.masked.load.v8f32.p0v8f32",
            )
            multiply_add = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(_VECTOR, [_VECTOR] * 3), "llvm.fmuladd.v8f32"
            )
            sums = [[cgutils.alloca_once_value(builder, _constant(0.0)) for _ in range(rows)] for _ in range(tokens)]

            def add(read):
                weights = [read(weight, builder.mul(columns, number(i))) for i in range(rows)]
                for t in range(tokens):
                    value = read(x, builder.mul(by, number(t)))
                    for i in range(rows):
                        total = builder.call(multiply_add, [weights[i], value, builder.load(sums[t][i])])
                        builder.store(total, sums[t][i])

            def vector_at(pointer, index):
                return builder.bitcast(_element(builder, pointer, index, _FLOAT), _VECTOR.as_pointer())

            with cgutils.for_range(builder, builder.udiv(columns, number(LANES))) as loop:
                start = builder.mul(loop.index, number(LANES))
                add(lambda pointer, index: builder.load(vector_at(pointer, builder.add(index, start)), align=4))
            rest = builder.urem(columns, number(LANES))
            with builder.if_then(builder.icmp_unsigned("!=", rest, number(0))):
                start = builder.sub(columns, rest)
                undefined = ir.Constant(_INTS, ir.Undefined)
                count = builder.insert_element(undefined, builder.trunc(rest, _INT), ir.Constant(_INT, 0))
                count = builder.shuffle_vector(count, undefined, ir.Constant(_INTS, [0] * LANES))
                inside = builder.icmp_unsigned("<", ir.Constant(_INTS, list(range(LANES))), count)
                add(
                    lambda pointer, index: builder.call(
                        masked, [vector_at(pointer, builder.add(index, start)), _INT(4), inside, _constant(0.0)]
                    )
                )
            for t in range(tokens):
                for i in range(rows):
                    index = builder.add(builder.mul(out_by, number(t)), number(i))
                    builder.store(_total(builder, builder.load(sums[t][i])), _element(builder, out, index, _FLOAT))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 6), codegen

    return intrinsic(typing)


# out, out_by, weight, columns, x, by -> out (tokens, rows) = x (tokens, columns) weight (rows, columns)^T, with as many
# floats from one token to the next. The order of a sum does not depend on how many tokens and rows there are.
product_4x2, product_4x1, product_1x4, product_1x1 = (_products(t, i) for t, i in ((4, 2), (4, 1), (1, 4), (1, 1)))


@intrinsic
def _power_of_two(typingctx, shifted):
    """2 to the integer that sits in the low bits of ``shifted`` = integer + 1.5 2^23, put into the exponent bits."""

    def codegen(context, builder, sig, args):
        bits = builder.shl(builder.bitcast(args[0], _INTS), ir.Constant(_INTS, [23] * LANES))
        bits = builder.add(bits, ir.Constant(_INTS, [127 << 23] * LANES))
        return builder.bitcast(bits, _VECTOR)

    return vector(vector), codegen


@inlined
def _exp2_reduced(f, shifted):
    # 2^f on [-1/2, 1/2], minimax in relative error (9.1e-8) with the constant term held at 1: a decay near 1, the one
    # that counts over a long sequence, has no bias.
    p = splat(_P5)
    p = fmadd(p, f, splat(_P4))
    p = fmadd(p, f, splat(_P3))
    p = fmadd(p, f, splat(_P2))
    p = fmadd(p, f, splat(_P1))
    p = fmadd(p, f, splat(ONE))
    return p * _power_of_two(shifted)


@inlined
def exp2(x):
    """2^x to 2e-7 of its value; zero below 2^-126.5, infinity from 2^127.5 on, NaN for NaN."""
    x = at_most(at_least(x, splat(_LOWEST)), splat(_HIGHEST))
    shifted = x + splat(_SHIFT)
    return _exp2_reduced(x - (shifted - splat(_SHIFT)), shifted)


@inlined
def exp(x):
    """e^x to 2e-7 of its value; limits as in ``exp2``."""
    x = at_most(at_least(x, splat(_LOWEST_E)), splat(_HIGHEST_E))
    shifted = x * splat(LOG2_E) + splat(_SHIFT)
    whole = splat(_SHIFT) - shifted  # its negative
    # Reduce with ln 2 in two parts: one rounding of x log2(e) would cost |x| of them.
    f = fmadd(whole, splat(_LN2_LOW), fmadd(whole, splat(_LN2_HIGH), x)) * splat(LOG2_E)
    return _exp2_reduced(f, shifted)


@inlined
def sigmoid(x):
    """1 / (1 + e^-x), to 3e-7 of its value."""
    one = splat(ONE)
    return one / (one + exp(splat(ZERO) - x))


@inlined
def softplus(x):
    """log(1 + e^x), to 4e-7 of its value also where e^x is tiny."""
    zero, two = splat(ZERO), splat(_TWO)
    e = exp(at_most(x, zero - x))  # e^-|x|
    # log1p(e) = 2 artanh(s) with s = e / (2 + e) <= 1/3: minimax in s^2, relative error 4e-9.
    s = e / (two + e)
    v = s * s
    p = splat(_L4)
    p = fmadd(p, v, splat(_L3))
    p = fmadd(p, v, splat(_L2))
    p = fmadd(p, v, splat(_L1))
    p = fmadd(p, v, splat(ONE))
    return fmadd(two * s, p, at_least(x, zero))
