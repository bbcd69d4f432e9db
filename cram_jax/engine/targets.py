"""Instruction sets: the width of a vector and the INT8 dot product of each."""

import platform
from dataclasses import dataclass, replace
from typing import Literal

from cram_jax.engine.llvm import binding


@dataclass(frozen=True)
class Target:
    """An instruction set that kernels are generated for.

    Attributes:
      name: as `compile` and `load` take it.
      lanes: 32-bit lanes of a vector.
      registers: vector registers, which bound the tiles.
      words: 32-bit words that hold the four INT8 weights of a block: 1 as bytes, or 2
        as the even and the odd ones in 16 bits.
      dot: "vpdpbusd" or "pmaddwd", the instruction that multiplies them; "generic" is
        the same arithmetic, bit for bit, in plain LLVM.
      pairs: whether products multiply bytes in pairs by pmaddubsw, in three
        instructions instead of five. Its sums are of 16 bits, so weights that could
        reach more are stored as the sum of two blocks.
      pack: whether bytes are packed by instructions of x86; else in plain LLVM.
      features: what the processor must have.
    """

    name: str
    lanes: int
    registers: int
    words: Literal[1, 2]
    dot: Literal["vpdpbusd", "pmaddwd", "generic"]
    pairs: bool = False
    pack: bool = False
    features: tuple[str, ...] = ()

    @property
    def weight_words(self) -> int:
        """32-bit words of the four INT8 weights of a block in a product."""
        return 1 if self.pairs else self.words

    def emulated(self) -> "Target":
        """The same layout and arithmetic in plain LLVM, for any processor.

        Returns:
          An instruction set of the same name, which every processor has.

        Example:
          >>> from cram_jax import engine
          >>> engine.TARGETS["avx512vnni"].emulated().is_native()
          True
        """
        return replace(self, dot="generic", pack=False, features=())

    def is_native(self) -> bool:
        """Whether this processor has it.

        Returns:
          True if the processor has all the features.

        Example:
          >>> from cram_jax import engine
          >>> engine.TARGETS["portable"].is_native()
          True
        """
        available = binding().get_host_cpu_features() if self.features else {}
        return all(available.get(feature, False) for feature in self.features)


_AVX512 = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "fma")

TARGETS = {
    target.name: target
    for target in (
        Target(
            *("avx512vnni", 16, 32, 1, "vpdpbusd"),
            pack=True,
            features=(*_AVX512, "avx512vnni"),
        ),
        Target(
            *("avx512", 16, 32, 2, "pmaddwd"), pairs=True, pack=True, features=_AVX512
        ),
        Target(
            *("avx2vnni", 8, 16, 1, "vpdpbusd"),
            pack=True,
            features=("avx2", "fma", "avxvnni"),
        ),
        Target(
            *("avx2", 8, 16, 2, "pmaddwd"),
            pairs=True,
            pack=True,
            features=("avx2", "fma"),
        ),
        Target("portable", 4, 16, 2, "generic"),
    )
}
"""The instruction sets, the fastest first."""


def choose_target(name: str | Target | None = None) -> Target:
    """The fastest instruction set of this processor, or the one asked for.

    Raises:
      ValueError: there is no such set, or this processor lacks it.
    """
    if name is None:
        return next(target for target in TARGETS.values() if target.is_native())
    if not isinstance(name, Target) and name not in TARGETS:
        raise ValueError(
            f"target must be one of {', '.join(map(repr, TARGETS))}, got {name!r}"
        )
    target = name if isinstance(name, Target) else TARGETS[name]
    if not target.is_native():
        raise ValueError(
            f"target {target.name!r} needs {', '.join(target.features)}, which this "
            f"{platform.machine()} processor lacks; leave it out to choose the best"
        )
    return target
