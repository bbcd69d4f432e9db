"""LLVM through llvmlite, which is imported only here."""

import ctypes
import importlib
import threading
from functools import cache
from types import ModuleType
from typing import Any

_MESSAGE = (
    "cram_jax.engine needs llvmlite, which is not installed; "
    "pip install 'cram_jax[engine]'"
)
# LLVM compiles one module at a time.
lock = threading.Lock()


@cache
def binding() -> ModuleType:
    """llvmlite.binding, ready to compile for this processor.

    Raises:
      ImportError: llvmlite is not installed; it says what to install.
    """
    try:
        llvm = importlib.import_module("llvmlite.binding")
    except ImportError as error:
        raise ImportError(_MESSAGE) from error
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm


@cache
def ir() -> ModuleType:
    """llvmlite.ir.

    Raises:
      ImportError: llvmlite is not installed; it says what to install.
    """
    try:
        return importlib.import_module("llvmlite.ir")
    except ImportError as error:
        raise ImportError(_MESSAGE) from error


def is_x86() -> bool:
    """Whether this is an x86-64 processor, as most instruction sets need."""
    return str(binding().get_default_triple()).startswith(("x86_64", "amd64"))


class Compiled:
    """Machine code of one module, alive as long as this object."""

    def __init__(self, module: Any, engine: Any):
        self._module = module
        self._engine = engine

    def address(self, name: str) -> int:
        """Where a function starts."""
        return int(self._engine.get_function_address(name))


def machine(cpu: str = "", features: str = "") -> Any:
    """A target machine for this processor, or for another of the same family.

    Args:
      cpu: LLVM's name of a processor; by default this one with its features.
      features: to add or to remove, as LLVM writes them.

    Returns:
      llvmlite's TargetMachine.
    """
    llvm = binding()
    if not cpu:
        cpu = llvm.get_host_cpu_name()
        features = ",".join(
            filter(None, (llvm.get_host_cpu_features().flatten(), features))
        )
    target = llvm.Target.from_default_triple()
    return target.create_target_machine(cpu=cpu, features=features, opt=2, jit=True)


def optimise(text: str, target_machine: Any) -> Any:
    """Parses, verifies and optimises the text of a module."""
    llvm = binding()
    module = llvm.parse_assembly(text)
    module.verify()
    # The kernels are already vectorised and unrolled.
    options = llvm.create_pipeline_tuning_options(speed_level=2)
    options.loop_vectorization = options.slp_vectorization = False
    options.loop_unrolling = False
    builder = llvm.create_pass_builder(target_machine, options)
    builder.getModulePassManager().run(module, builder)
    return module


def compile_text(text: str, features: str = "") -> Compiled:
    """Machine code of the text of a module, for this processor."""
    llvm = binding()
    with lock:
        target_machine = machine(features=features)
        module = optimise(text, target_machine)
        engine = llvm.create_mcjit_compiler(module, target_machine)
        engine.finalize_object()
        del target_machine  # under the lock, because LLVM frees it
    return Compiled(module, engine)


def assembly(text: str, cpu: str, features: str = "") -> str:
    """The assembly of the text of a module for a named processor."""
    with lock:
        target_machine = machine(cpu, features)
        return str(target_machine.emit_assembly(optimise(text, target_machine)))


def function(address: int, *arguments: Any) -> Any:
    """A Python callable of a void function; it releases the interpreter's lock."""
    return ctypes.CFUNCTYPE(None, *arguments)(address)
