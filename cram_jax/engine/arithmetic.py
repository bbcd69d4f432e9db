"""Vector arithmetic beyond single instructions: exp, GELU, INT8 dot and packing.

Every form of an INT8 operation gives the same bits as `dot` and `pack` in plain LLVM.
"""

from collections.abc import Sequence

from cram_jax.engine.code import MAGIC, MAGIC_BITS, Kernel, Value
from cram_jax.engine.llvm import binding, ir

_EXP = (
    *(1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3),
    *(4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1),
)
# (Phi(x) - 1/2) / x = P(x**2) / Q(x**2) for |x| < 5.4: least squares, reweighted until
# the error of x * Phi(x) was even, 3e-7. From the highest power down.
_PHI_LIMIT = 5.4
_PHI_P = (9.257428129e-6, 5.098371907e-4, 6.730890751e-3, 6.666861861e-2, 0.3989385511)
_PHI_Q = (
    *(7.517215381e-7, 1.863343241e-4, 3.798996242e-3),
    *(4.754859909e-2, 0.3337417131, 1.0),
)
# (tanh(x) - x) / x**3 = P(x**2) for |x| < 5/8: least squares, reweighted until the
# relative error of tanh(x) was even, 4e-9.
_TANH_LIMIT = 0.625
_TANH_P = (
    *(-5.704910767e-3, 2.06390222e-2, -5.373969619e-2),
    *(0.1333144199, -0.3333328193),
)


def exp(k: Kernel, x: Value) -> Value:
    """``exp(x)`` to about 1e-7, for x up to 88; 0 becomes exactly 1."""
    # `max` and `min` give the second where one is not a number, which so stays one.
    x = k.max(k.constant(-87.3), x)
    shifted = k.fma(x, k.constant(1.44269504), k.constant(MAGIC))
    power = k.sub(shifted, k.constant(MAGIC))
    rest = k.fma(power, k.constant(-0.693359375), x)
    rest = k.fma(power, k.constant(2.12194440e-4), rest)
    p = polynomial(k, _EXP, rest)
    p = k.fma(k.mul(p, rest), rest, k.add(rest, k.constant(1)))
    # The integer power is in the lowest bits; shifting it out leaves an exponent.
    exponent = k.build.shl(k.cast(shifted, k.ints), k.int_constant(23))
    return k.cast(k.build.add(k.cast(p, k.ints), exponent), k.floats)


def gelu(k: Kernel, x: Value) -> Value:
    """The exact GELU, ``x * Phi(x)``, to about 4e-7 times the larger of 1 and abs(x).

    Where x is negative the error is at most 1e-6, however large x is.
    """
    x = k.max(k.constant(-_PHI_LIMIT), x)
    inside = k.min(x, k.constant(_PHI_LIMIT))
    square = k.mul(inside, inside)
    ratio = k.div(polynomial(k, _PHI_P, square), polynomial(k, _PHI_Q, square))
    return k.mul(x, k.fma(inside, ratio, k.constant(0.5)))


def polynomial(k: Kernel, coefficients: Sequence[float], x: Value) -> Value:
    """A polynomial; the coefficient of the highest power comes first."""
    total = k.constant(coefficients[0])
    for coefficient in coefficients[1:]:
        total = k.fma(total, x, k.constant(coefficient))
    return total


def tanh(k: Kernel, x: Value) -> Value:
    """The hyperbolic tangent, to about 3e-7 of its value."""
    square = k.mul(x, x)
    small = k.fma(k.mul(x, square), polynomial(k, _TANH_P, square), x)
    inside = k.min(k.constant(10), k.max(k.constant(-10), x))
    e = exp(k, k.add(inside, inside))
    one = k.constant(1)
    large = k.sub(one, k.div(k.constant(2), k.add(e, one)))
    # Not a number: `small`, which then is none either.
    is_small = k.build.fcmp_unordered("<", square, k.constant(_TANH_LIMIT**2))
    return k.build.select(is_small, small, large)


def activate(k: Kernel, x: Value, activation: str) -> Value:
    """Applies "", "relu", "gelu" or "tanh"."""
    if activation == "relu":
        return k.max(k.constant(0), x)
    if activation:
        return {"gelu": gelu, "tanh": tanh}[activation](k, x)
    return x


# ------------------------------------------------------------------------------- INT8
def split_bytes(k: Kernel, x: Value) -> list[Value]:
    """What `dot` multiplies: the bytes unchanged, or the even and the odd ones."""
    if k.target.words == 1:
        return [x]
    even = k.build.and_(x, k.int_constant(0x00FF00FF))
    odd = k.build.lshr(k.cast(x, _halves(k)), _half_constant(k, 8))
    return [even, k.cast(odd, k.ints)]


def split_weights(k: Kernel, w: Value) -> list[Value]:
    """Signed bytes, in as many words as `dot` takes."""
    return [w] if k.target.words == 1 else _even_odd(k, w, signed=True)


def ones(k: Kernel) -> list[Value]:
    """Weights of one, with which `dot` adds up bytes."""
    if k.target.words == 1:
        return [k.int_constant(0x01010101)]
    return [k.int_constant(0x00010001)] * 2


def dot(k: Kernel, total: Value, x: Sequence[Value], w: Sequence[Value]) -> Value:
    """``total`` plus, in each 32-bit lane, four unsigned times four signed bytes.

    Args:
      k: the kernel.
      total: 32-bit integers.
      x: the unsigned bytes, from `split_bytes`; unsplit if the pairs of w are known
        to be small, see `Target.pairs`.
      w: the signed ones in as many words.
    """
    bits = 32 * k.lanes
    if k.target.dot == "vpdpbusd":
        name = f"llvm.x86.avx512.vpdpbusd.{bits}"
        kind = _bytes(k) if _dot_takes_bytes() else k.ints
        return k.call(name, k.ints, total, k.cast(x[0], kind), k.cast(w[0], kind))
    if len(x) == 1 and k.target.pairs:
        sums = _pair_sums(k, x[0], w[0])
        return k.build.add(total, _pair_products(k, sums, k.int_constant(0x00010001)))
    if len(x) == 1:
        x = _even_odd(k, x[0], signed=False)
        w = _even_odd(k, w[0], signed=True)
    for x_half, w_half in zip(x, w, strict=True):
        total = k.build.add(total, _pair_products(k, x_half, w_half))
    return total


def pack(k: Kernel, rows: Sequence[Value], low: Value | None = None) -> Value:
    """Packs four rows of floats into one of unsigned bytes: rounded to even, clipped.

    Args:
      k: the kernel.
      rows: four vectors of floats.
      low: the smallest result, 1 to 255, as floats; None: 0.
    """
    if k.target.pack:
        return _pack_by_instructions(k, rows, low)
    packed = k.int_constant(0)
    for place, row in enumerate(rows):
        least = k.constant(0) if low is None else low
        clipped = k.min(k.max(row, least), k.constant(255))
        rounded = k.cast(k.add(clipped, k.constant(MAGIC)), k.ints)
        number = k.build.sub(rounded, k.int_constant(MAGIC_BITS))
        packed = k.build.or_(packed, k.build.shl(number, k.int_constant(8 * place)))
    return packed


def unpack(k: Kernel, packed: Value, place: int) -> Value:
    """One of the four unsigned bytes of every lane, as 32-bit integers."""
    shifted = k.build.lshr(packed, k.int_constant(8 * place))
    return k.build.and_(shifted, k.int_constant(255))


def _pack_by_instructions(k: Kernel, rows: Sequence[Value], low: Value | None) -> Value:
    bits = 32 * k.lanes
    prefix = {256: "llvm.x86.avx2", 512: "llvm.x86.avx512"}[bits]
    suffix = {256: "", 512: ".512"}[bits]
    convert = {256: "llvm.x86.avx.cvt.ps2dq.256", 512: ""}[bits]
    numbers = []
    for row in rows:
        # The last instruction turns negative numbers and NaN into 0; but above
        # 2**31 the conversion would turn negative.
        if low is None and convert:
            clipped = k.min(k.constant(255), row)
        else:
            clipped = k.max(row, k.constant(0) if low is None else low)
            clipped = k.min(clipped, k.constant(255))
        if convert:
            numbers.append(k.call(convert, k.ints, clipped))
        else:
            rounded = k.cast(k.add(clipped, k.constant(MAGIC)), k.ints)
            numbers.append(k.build.sub(rounded, k.int_constant(MAGIC_BITS)))
    halves, octets = _halves(k), _bytes(k)
    first, second = (
        k.call(f"{prefix}.packssdw{suffix}", halves, *numbers[i : i + 2])
        for i in (0, 2)
    )
    packed = k.call(f"{prefix}.packuswb{suffix}", octets, first, second)
    # Within each 128 bits: four bytes of each row become one byte of each.
    order = [16 * (i // 16) + 4 * (i % 4) + i % 16 // 4 for i in range(4 * k.lanes)]
    types = ir()
    indices = types.Constant(types.VectorType(k.i32, 4 * k.lanes), order)
    undefined = types.Constant(octets, types.Undefined)
    return k.cast(k.build.shuffle_vector(packed, undefined, indices), k.ints)


def _pair_products(k: Kernel, x: Value, w: Value) -> Value:
    """In each lane the sum of two products of 16-bit integers."""
    if k.target.dot == "pmaddwd":
        wide = k.lanes == 16
        name = "llvm.x86.avx512.pmaddw.d.512" if wide else "llvm.x86.avx2.pmadd.wd"
        return k.call(name, k.ints, k.cast(x, _halves(k)), k.cast(w, _halves(k)))
    # 255 * 128 still fits into 16 bits.
    products = k.build.mul(k.cast(x, _halves(k)), k.cast(w, _halves(k)))
    products = k.cast(products, k.ints)
    low = k.build.ashr(k.build.shl(products, k.int_constant(16)), k.int_constant(16))
    return k.build.add(low, k.build.ashr(products, k.int_constant(16)))


def _pair_sums(k: Kernel, x: Value, w: Value) -> Value:
    """The sums of two products of bytes, as 16-bit integers; they saturate."""
    if k.target.dot == "pmaddwd":
        wide = k.lanes == 16
        name = "llvm.x86.avx512.pmaddubs.w.512" if wide else "llvm.x86.avx2.pmadd.ub.sw"
        return k.call(name, _halves(k), k.cast(x, _bytes(k)), k.cast(w, _bytes(k)))
    halves = zip(_even_odd(k, x, False), _even_odd(k, w, True), strict=True)
    even, odd = (
        k.build.mul(k.cast(x_half, _halves(k)), k.cast(w_half, _halves(k)))
        for x_half, w_half in halves
    )
    return k.call(f"llvm.sadd.sat.v{2 * k.lanes}i16", _halves(k), even, odd)


def _even_odd(k: Kernel, x: Value, signed: bool) -> list[Value]:
    """The even and the odd bytes of every lane as 16-bit integers."""
    halves = k.cast(x, _halves(k))
    eight = _half_constant(k, 8)
    shift = k.build.ashr if signed else k.build.lshr
    even = shift(k.build.shl(halves, eight), eight)
    return [k.cast(even, k.ints), k.cast(shift(halves, eight), k.ints)]


def _halves(k: Kernel) -> Value:
    return ir().VectorType(k.i16, 2 * k.lanes)


def _bytes(k: Kernel) -> Value:
    return ir().VectorType(k.i8, 4 * k.lanes)


def _half_constant(k: Kernel, value: int) -> Value:
    return ir().Constant(_halves(k), [value] * (2 * k.lanes))


def _dot_takes_bytes() -> bool:
    """LLVM 22 changed the operands of vpdpbusd from <16 x i32> to <64 x i8>."""
    return bool(binding().llvm_version_info[0] >= 22)
