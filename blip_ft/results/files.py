"""Output folders: which one is free, and a lock so that only one program writes there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout

LOCK = "_in_use.lock"  # the Trainer does not upload files whose names begin with _

Result = TypeVar("Result")

# locks of the folders that this process writes to, and whether it created the folder
_claimed: list[tuple[FileLock, bool]] = []


def decided_by_main(decide: Callable[[], Result]) -> Result:
    """Call decide() in the main process, and return its result or raise its ValueError or OSError in all processes."""
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
    """outputs/<program>, then outputs/<program>-2, -3, ... without end."""
    return (Path("outputs") / (program if number == 1 else f"{program}-{number}") for number in count(1))


def is_free(folder: Path) -> bool:
    """Whether the folder does not exist, or has no files of an earlier run."""
    return not folder.exists() or (folder.is_dir() and not names_in(folder))


def names_in(folder: Path) -> set[str]:
    """Names of the files in a folder, apart from the lock of claim()."""
    return {path.name for path in folder.iterdir()} - {LOCK}


def claim(folder: Path) -> bool:
    """Create a folder if it does not exist, and lock it against other programs.

    The lock is kept until release_folders() or until this process ends, for whatever reason.

    Returns: False if another program has locked it. Raises: OSError if the folder cannot be created.
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
    """claim() the folder. Raises: ValueError if another program has locked it."""
    if not claim(folder):
        raise ValueError(
            f"output_dir {folder} is in use by another program that is still running. Choose another --output_dir, or "
            "wait until that program has ended."
        )


def release_folders() -> None:
    """Unlock the folders of this process, and remove those that it created and left empty."""
    while _claimed:
        lock, is_new = _claimed.pop()
        file = Path(lock.lock_file)
        with suppress(OSError):
            file.unlink()
        lock.release()
        if is_new:
            with suppress(OSError):  # not empty
                file.parent.rmdir()
