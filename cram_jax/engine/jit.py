"""Machine code of kernels, compiled once for a process and shared by all plans."""

import threading
from collections.abc import Iterable

from cram_jax.engine import llvm
from cram_jax.engine.code import Kernel
from cram_jax.engine.kernels import KernelSpec
from cram_jax.engine.targets import Target

_addresses: dict[tuple[Target, KernelSpec], int] = {}
# The code lives as long as the process: plans hold bare addresses.
_code: list[llvm.Compiled] = []
lock = threading.RLock()


def write_kernels(specs: Iterable[KernelSpec], target: Target) -> tuple[str, list[str]]:
    """The text of a module with these kernels, and their names in it."""
    module = llvm.ir().Module("cram_jax_engine")
    names = []
    for number, spec in enumerate(specs):
        kernel = Kernel(module, f"kernel{number}", spec.arguments, target)
        spec.emit(kernel)
        kernel.finish()
        names.append(f"kernel{number}")
    return str(module), names


def compile_kernels(specs: Iterable[KernelSpec], target: Target) -> None:
    """Compiles the kernels that are not there yet, as one module."""
    with lock:
        wanted = dict.fromkeys(specs)
        missing = [spec for spec in wanted if (target, spec) not in _addresses]
        if missing:
            text, names = write_kernels(missing, target)
            compiled = llvm.compile_text(text, features(target))
            _code.append(compiled)
            for spec, name in zip(missing, names, strict=True):
                _addresses[target, spec] = compiled.address(name)


def kernel_address(spec: KernelSpec, target: Target) -> int:
    """Where a compiled kernel starts."""
    return _addresses[target, spec]


def features(target: Target) -> str:
    """LLVM features that make vectors of the target's width legal."""
    return "-prefer-256-bit" if target.lanes == 16 and target.features else ""
