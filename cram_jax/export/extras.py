"""Optional packages, imported when they are used."""

import contextlib
import importlib
import io
import logging
import threading
import warnings
from collections.abc import Iterator
from types import ModuleType

# Streams and logging belong to the process: two threads would restore each other's.
silencing = threading.RLock()


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


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences progress bars and advice of other packages."""
    with silencing:
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
                warnings.simplefilter("ignore")
                yield
        finally:
            logging.disable(before)
