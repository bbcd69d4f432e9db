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
    beside = _unique(path)
    try:
        yield beside
        replace(beside, path)
    finally:
        if beside.is_dir():
            shutil.rmtree(beside)
        else:
            beside.unlink(missing_ok=True)


def replace(new: Path, path: Path) -> None:
    """Renames a file or folder to a path, and only then removes what was there.

    Args:
      new: in the same folder.
      path: the new name; a folder replaces a folder, a file a file.
    """
    if not (new.is_dir() and path.is_dir()) or path.is_symlink():
        os.replace(new, path)
        return
    # A folder that is not empty cannot be renamed over.
    before = _unique(path)
    os.replace(path, before)
    try:
        os.replace(new, path)
    except BaseException:
        os.replace(before, path)
        raise
    shutil.rmtree(before)


def _unique(path: Path) -> Path:
    # Other threads, processes and machines may write the same file.
    unique = f"{os.getpid()}-{secrets.token_hex(4)}"
    return path.with_name(f".{path.stem}.{unique}.part{path.suffix}")
