"""Where programs write, each alone and agreed between processes, and files that are whole or not there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout

LOCK = "_in_use.lock"  # the Trainer uploads nothing that begins with _

Result = TypeVar("Result")

# the folders that this process holds, and whether it has made them
_claimed: list[tuple[FileLock, bool]] = []


def decided_by_main(decide: Callable[[], Result]) -> Result:
    """What decide() gives in the main process, in all of them; a ValueError or OSError of it is raised in all."""
    choice: list[Any] = [None]
    if PartialState().is_main_process:
        try:
            choice = [decide()]
        except (ValueError, OSError) as error:
            choice = [error]
    broadcast_object_list(choice)
    if isinstance(choice[0], (ValueError, OSError)):
        raise choice[0]
    return choice[0]


def numbered_folders(program: str) -> Iterator[Path]:
    """outputs/<program>, outputs/<program>-2, -3, ... without end."""
    return (Path("outputs") / (program if number == 1 else f"{program}-{number}") for number in count(1))


def is_free(folder: Path) -> bool:
    """Whether nothing of an earlier run is in the way."""
    return not folder.exists() or (folder.is_dir() and not names_in(folder))


def names_in(folder: Path) -> set[str]:
    """What a folder holds, apart from the lock of claim()."""
    return {path.name for path in folder.iterdir()} - {LOCK}


def claim(folder: Path) -> bool:
    """Make a folder if there is none, and let no other program write there.

    The folder is held until release_folders(), or until this process ends, however that ends.

    Returns: False if another program holds it. Raises: OSError if the folder cannot be made.
    """
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return False
    _claimed.append((lock, is_new))
    return True


def require_claim(folder: Path) -> None:
    """Raises: ValueError if another program holds the folder, and as claim()."""
    if not claim(folder):
        raise ValueError(
            f"output_dir {folder} is in use by another program that is still running. Choose another --output_dir, or "
            "wait until that has ended."
        )


def release_folders() -> None:
    """Let others write where this process has; a folder made in vain is removed."""
    while _claimed:
        lock, is_new = _claimed.pop()
        file = Path(lock.lock_file)
        with suppress(OSError):
            file.unlink()
        lock.release()
        if is_new:
            with suppress(OSError):  # not empty
                file.parent.rmdir()
