"""A small builder for kernels: vectors, loops and named arguments over llvmlite.ir."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np

from cram_jax.engine.llvm import ir
from cram_jax.engine.targets import Target

Value: TypeAlias = Any
"""A value in LLVM's sense: a scalar, a vector or a pointer in the code being built."""

MAGIC = 12582912.0  # 1.5 * 2**23: adding it rounds to an integer, in the lowest bits
MAGIC_BITS = 0x4B400000


class Kernel:
    """The code of one ``void kernel(i64 *words, i64 job, i64 thread)``.

    ``words`` are the kernel's arguments, 64 bits each, by the names of ``arguments``;
    pointers, integers and, in the lower half, floats.
    """

    def __init__(
        self, module: Any, name: str, arguments: Sequence[str], target: Target
    ):
        types = ir()
        self.target = target
        self.lanes = target.lanes
        self.i8, self.i16 = types.IntType(8), types.IntType(16)
        self.i32, self.i64 = types.IntType(32), types.IntType(64)
        self.f32 = types.FloatType()
        self.pointer = types.PointerType()
        self.ints = types.VectorType(self.i32, self.lanes)
        self.floats = types.VectorType(self.f32, self.lanes)
        kind = types.FunctionType(types.VoidType(), [self.pointer, self.i64, self.i64])
        self.function = types.Function(module, kind, name)
        self.module = module
        self._arguments = {name: i for i, name in enumerate(arguments)}
        self._words, self.job, self.thread = self.function.args
        self.build = types.IRBuilder(self.function.append_basic_block("entry"))

    # ------------------------------------------------------------ arguments, constants
    def _argument(self, name: str, kind: Any) -> Value:
        where = self.at(self._words, self._arguments[name], self.i64)
        return self.build.load(where, name=name, align=4, typ=kind)

    def pointer_argument(self, name: str) -> Value:
        """A pointer among the arguments."""
        return self._argument(name, self.pointer)

    def int_argument(self, name: str) -> Value:
        """A 64-bit integer among the arguments."""
        return self._argument(name, self.i64)

    def float_argument(self, name: str) -> Value:
        """A float among the arguments, in every lane."""
        return self.splat(self._argument(name, self.f32))

    def word_argument(self, name: str) -> Value:
        """A 32-bit integer among the arguments, in every lane."""
        return self.splat(self._argument(name, self.i32))

    def integer(self, value: int | Value) -> Value:
        """A 64-bit integer."""
        return ir().Constant(self.i64, value) if isinstance(value, int) else value

    def constant(self, value: float) -> Value:
        """A float in every lane."""
        return ir().Constant(self.floats, [float(np.float32(value))] * self.lanes)

    def int_constant(self, value: int) -> Value:
        """A 32-bit integer in every lane."""
        value = (value + 2**31) % 2**32 - 2**31
        return ir().Constant(self.ints, [value] * self.lanes)

    # ------------------------------------------------------------------- integer maths
    def plus(self, *terms: int | Value) -> Value:
        """The sum of 64-bit integers."""
        total = self.integer(terms[0])
        for term in terms[1:]:
            total = self.build.add(total, self.integer(term))
        return total

    def times(self, x: int | Value, y: int | Value) -> Value:
        """The product of 64-bit integers."""
        return self.build.mul(self.integer(x), self.integer(y))

    def divide(self, x: Value, y: int | Value) -> tuple[Value, Value]:
        """Quotient and remainder of non-negative integers."""
        y = self.integer(y)
        return self.build.udiv(x, y), self.build.urem(x, y)

    # -------------------------------------------------------------------------- memory
    def at(self, base: Value, index: int | Value, kind: Any = None) -> Value:
        """The address of an entry of an array, by default of 32-bit lanes."""
        return self.build.gep(
            base, [self.integer(index)], source_etype=kind or self.i32
        )

    def load(self, base: Value, index: int | Value, kind: Any = None) -> Value:
        """A vector, by default of floats, from lane ``index`` on."""
        return self.build.load(self.at(base, index), align=4, typ=kind or self.floats)

    def store(self, value: Value, base: Value, index: int | Value) -> None:
        """Stores a vector from lane ``index`` on."""
        self.build.store(value, self.at(base, index), align=4)

    def scalar(self, base: Value, index: int | Value, kind: Any = None) -> Value:
        """One lane, by default a float."""
        return self.build.load(self.at(base, index), align=4, typ=kind or self.f32)

    def index(self, base: Value, index: int | Value) -> Value:
        """A 32-bit entry of an array of integers, as 64 bits."""
        return self.build.sext(self.scalar(base, index, self.i32), self.i64)

    def store_scalar(self, value: Value, base: Value, index: int | Value) -> None:
        """Stores one lane."""
        self.build.store(value, self.at(base, index), align=4)

    def gather(self, base: Value, indices: Value, kind: Any = None) -> Value:
        """The lanes at a vector of indices."""
        kind = kind or self.floats
        types = ir()
        element = kind.element
        pointers = types.VectorType(self.pointer, self.lanes)
        wide = self.build.sext(indices, types.VectorType(self.i64, self.lanes))
        where = self.build.gep(base, [wide], source_etype=self.i32)
        where.type = pointers
        suffix = "i32" if element == self.i32 else "f32"
        mask = types.VectorType(types.IntType(1), self.lanes)
        return self.call(
            f"llvm.masked.gather.v{self.lanes}{suffix}.v{self.lanes}p0",
            kind,
            where,
            types.Constant(self.i32, 4),
            types.Constant(mask, [1] * self.lanes),
            types.Constant(kind, types.Undefined),
        )

    # ------------------------------------------------------------------------- vectors
    def splat(self, scalar: Value) -> Value:
        """A scalar in every lane."""
        types = ir()
        kind = types.VectorType(scalar.type, self.lanes)
        one = self.build.insert_element(
            types.Constant(kind, types.Undefined), scalar, types.Constant(self.i32, 0)
        )
        zeros = types.Constant(self.ints, [0] * self.lanes)
        return self.build.shuffle_vector(
            one, types.Constant(kind, types.Undefined), zeros
        )

    def lane_numbers(self) -> Value:
        """0, 1, 2 and so on."""
        return ir().Constant(self.ints, list(range(self.lanes)))

    def cast(self, value: Value, kind: Any) -> Value:
        """The same bits as another type."""
        return value if value.type == kind else self.build.bitcast(value, kind)

    def call(self, name: str, result: Any, *arguments: Value) -> Value:
        """Calls an intrinsic of LLVM."""
        types = ir()
        kind = types.FunctionType(result, [a.type for a in arguments])
        function = self.module.globals.get(name) or types.Function(
            self.module, kind, name
        )
        return self.build.call(function, arguments)

    def fma(self, x: Value, y: Value, z: Value) -> Value:
        """``x * y + z``, fused if the processor can."""
        return self.call(f"llvm.fmuladd.v{self.lanes}f32", self.floats, x, y, z)

    def add(self, x: Value, y: Value) -> Value:
        """The sum of floats."""
        return self.build.fadd(x, y)

    def sub(self, x: Value, y: Value) -> Value:
        """The difference of floats."""
        return self.build.fsub(x, y)

    def mul(self, x: Value, y: Value) -> Value:
        """The product of floats, rounded."""
        return self.build.fmul(x, y)

    def div(self, x: Value, y: Value) -> Value:
        """The quotient of floats."""
        return self.build.fdiv(x, y)

    def max(self, x: Value, y: Value) -> Value:
        """The larger float; y where x is not a number."""
        return self.build.select(self.build.fcmp_ordered(">", x, y), x, y)

    def min(self, x: Value, y: Value) -> Value:
        """The smaller float; y where x is not a number."""
        return self.build.select(self.build.fcmp_ordered("<", x, y), x, y)

    def maximum(self, x: Value, y: Value) -> Value:
        """The larger float; not a number where one of them is none."""
        return self.call(f"llvm.maximum.v{self.lanes}f32", self.floats, x, y)

    def to_float(self, x: Value) -> Value:
        """Integers as floats."""
        return self.build.sitofp(x, self.floats)

    def where(self, mask: Value, x: Value, y: Value) -> Value:
        """X where the lanes of an integer mask are not zero, else y."""
        chosen = self.build.icmp_signed("!=", mask, self.int_constant(0))
        return self.build.select(chosen, x, y)

    # --------------------------------------------------------------------------- loops
    def loop(
        self,
        start: int | Value,
        stop: int | Value,
        body: Callable[..., Sequence[Value] | None],
        carried: Sequence[Value] = (),
        step: int = 1,
    ) -> list[Value]:
        """``for i in range(start, stop, step): carried = body(i, *carried)``.

        Returns:
          What is carried out of the last round.
        """
        build = self.build
        before = build.block
        test, inside, after = (
            self.function.append_basic_block(part) for part in ("test", "loop", "after")
        )
        build.branch(test)
        build.position_at_end(test)
        i = build.phi(self.i64)
        i.add_incoming(self.integer(start), before)
        phis = [build.phi(value.type) for value in carried]
        for phi, value in zip(phis, carried, strict=True):
            phi.add_incoming(value, before)
        build.cbranch(build.icmp_signed("<", i, self.integer(stop)), inside, after)
        build.position_at_end(inside)
        results = body(i, *phis) or ()
        for phi, value in zip(phis, results, strict=True):
            phi.add_incoming(value, build.block)
        i.add_incoming(self.plus(i, step), build.block)
        build.branch(test)
        build.position_at_end(after)
        return phis

    def finish(self) -> None:
        """Ends the function."""
        self.build.ret_void()
