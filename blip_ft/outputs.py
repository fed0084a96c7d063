"""Where programs write, agreed between processes, and files that are whole or not there."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

Result = TypeVar("Result")


def decided_by_main(decide: Callable[[], Result]) -> Result:
    """What decide() gives in the main process, in all of them; a ValueError of it is raised in all."""
    choice: list[Any] = [None]
    if PartialState().is_main_process:
        try:
            choice = [decide()]
        except ValueError as error:
            choice = [error]
    broadcast_object_list(choice)
    if isinstance(choice[0], ValueError):
        raise choice[0]
    return choice[0]


def numbered_folders(program: str) -> Iterator[Path]:
    """outputs/<program>, outputs/<program>-2, -3, ... without end."""
    return (Path("outputs") / (program if number == 1 else f"{program}-{number}") for number in count(1))


def is_free(folder: Path) -> bool:
    """Whether nothing of an earlier run is in the way."""
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))


def write_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """JSON lines: all of them or no file."""
    unfinished = path.with_suffix(".unfinished")
    with unfinished.open("w", encoding="utf-8") as file:
        for line in lines:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    unfinished.replace(path)
