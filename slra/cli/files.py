"""Whether the command line can write what it is asked to: found out before the work."""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

__all__ = ["check_targets", "require_writable"]


def require_writable(directory: Path, option: str) -> None:
    """Create the directory, and find out now rather than after the work whether it takes files."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise OSError(
            f"{option} must be a directory that can be written to, got {directory}: "
            f"{os.strerror(error.errno or 0)}"
        ) from error


def check_targets(targets: Mapping[str, Path | None], read: list[Path]) -> None:
    """Find out before the work whether files can be written, and that none is another one or read from."""
    taken = [file.resolve() for file in read]
    for option, path in targets.items():
        if path is None:
            continue
        if path.is_dir() or path.resolve() in taken:
            raise ValueError(
                f"{option} must be a file other than those that are read or written beside it, got {path}"
            )
        taken.append(path.resolve())
        if not path.parent.is_dir():
            raise OSError(f"the folder of {option} must exist, {path.parent} does not")
        require_writable(path.parent, f"the folder of {option}")
