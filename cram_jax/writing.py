"""Files and folders that appear whole or not at all.

They are written under another name and then renamed.
"""

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path


def check_folder(path: Path) -> None:
    """Raises a FileNotFoundError unless there is a folder for a file."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {str(path.parent)!r}")


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside a file or folder, renamed to it if all goes well.

    Args:
      path: what is to be written; an existing one is replaced at the end.

    Yields:
      A path in the same folder, with the same suffix. After an error nothing is left.

    Raises:
      FileNotFoundError: the folder does not exist.
    """
    path = Path(path)
    check_folder(path)
    # Other threads, processes and machines may write the same file.
    unique = f"{os.getpid()}-{secrets.token_hex(4)}"
    beside = path.with_name(f".{path.stem}.{unique}.part{path.suffix}")
    try:
        yield beside
        if beside.is_dir() and path.is_dir():
            shutil.rmtree(path)
        os.replace(beside, path)
    finally:
        if beside.is_dir():
            shutil.rmtree(beside)
        else:
            beside.unlink(missing_ok=True)
