"""Optional packages, imported when they are used."""

import importlib
from types import ModuleType


def require(module: str, extra: str) -> ModuleType:
    """Imports a module of an optional package.

    Args:
      module: its name.
      extra: of ``cram_jax``, which installs it.

    Raises:
      ImportError: it is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"this format needs {module.partition('.')[0]}: "
            f"pip install 'cram_jax[{extra}]' ({error})"
        ) from error
