"""Predict batch by batch, in several processes, so that a stopped run can resume.

Each process appends the lines of its rows to a file of its own in the output folder. At the end they become one file.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from blip_ft.data.batches import match_rows
from blip_ft.data.checks import why_unreadable
from blip_ft.data.tables import number_images, to_json, write_lines
from blip_ft.results.files import claim, decided_by_main, is_free, numbered_folders, require_claim

logger = logging.getLogger(__name__)

Line = dict[str, Any]
# from a batch on the device and the positions of its rows in the data to the line of each row
Predict = Callable[[dict[str, torch.Tensor], list[int]], list[Line]]

# line of a row whose image cannot be read
UNREADABLE: Line = {"prediction": "", "unreadable_image": True}


@dataclass(frozen=True)
class Output:
    """Where a program writes, and how it resumes.

    Args:
        program: its default folder is outputs/<program>, or the next free one of outputs/<program>-2, -3, ...
        file: what a finished run has written, e.g. predictions.jsonl.
        keeps_parts: keep the lines of all rows beside it, so that the same command can write it again in another way,
            if it names the folder.
    """

    program: str
    file: str
    keeps_parts: bool = False

    @property
    def settings_file(self) -> str:
        return f"{self.program}_settings.json"

    def part(self, process: int | str) -> str:
        """The file of one process; with * a pattern for those of all."""
        return f"{Path(self.file).stem}.part{process}.jsonl"

    def settle_folder(self, given: str | None, settings: Line) -> tuple[Path, set[int]]:
        """The folder to write to, and the positions of the rows that an unfinished run has predicted there.

        No other program can write to the folder until this process ends.

        Args:
            settings: a run can resume another one only if all of these are equal.
        Raises: ValueError, in all processes, if the folder contains anything but such a run, or is in use.
        """

        def settle() -> tuple[Path, set[int]]:
            folder = self._choose_folder(given, settings)
            write_lines(folder / self.settings_file, [settings])
            return folder, set(self.read_parts(folder))

        folder, done = decided_by_main(settle)
        if done:
            logger.info("Resuming in %s: %d rows are done.", folder, len(done))
        return folder, done

    def _choose_folder(self, given: str | None, settings: Line) -> Path:
        if given:
            require_claim(Path(given))
            if found := self._what_is_in_the_way(Path(given), settings, may_be_finished=self.keeps_parts):
                raise ValueError(f"output_dir {given} contains {found}. Choose another --output_dir, or remove it.")
            return Path(given)
        for folder in numbered_folders(self.program):
            if self._what_is_in_the_way(folder, settings) or not claim(folder):
                continue
            # checked again after claim(), when no other program can write there
            if not self._what_is_in_the_way(folder, settings):
                return folder

    def _what_is_in_the_way(self, folder: Path, settings: Line, may_be_finished: bool = False) -> str | None:
        if is_free(folder):
            return None
        if not (folder / self.settings_file).is_file() or ((folder / self.file).exists() and not may_be_finished):
            return "other files"
        earlier = json.loads((folder / self.settings_file).read_text(encoding="utf-8"))
        other = [name for name in settings if earlier.get(name) != settings[name]]
        return f"a run with different settings: {', '.join(other)}" if other else None

    def append_part(self, folder: Path, batches: Iterable[dict[int, Line]]) -> None:
        """Write the lines of this process, with the positions of their rows, after each batch."""
        with (folder / self.part(PartialState().process_index)).open("a", encoding="utf-8") as file:
            for batch in batches:
                for position, line in batch.items():
                    file.write(to_json({"position": position, **line}, ensure_ascii=False) + "\n")
                file.flush()

    def read_parts(self, folder: Path) -> dict[int, Line]:
        """Position -> what all processes have written. A last line that a kill has cut is removed from its file."""
        lines = {}
        for path in folder.glob(self.part("*")):
            content = path.read_bytes()
            whole = content[: content.rfind(b"\n") + 1]
            if len(whole) < len(content):
                path.write_bytes(whole)
            for text in whole.splitlines():
                line = json.loads(text)
                lines[line.pop("position")] = line
        return lines

    def finish(self, folder: Path, lines: Iterable[Line]) -> None:
        """Write the file of a finished run, and remove those that only an unfinished one needs."""
        write_lines(folder / self.file, lines)
        for path in () if self.keeps_parts else (*folder.glob(self.part("*")), folder / self.settings_file):
            path.unlink()


def settings_of(arguments: Sequence[Any], free: Sequence[str], checkpoints: Iterable[str], rows: list[Any]) -> Line:
    """Settings that must be equal for a run to resume another one.

    Args:
        arguments: dataclasses, all of whose values must be equal except those of the settings in `free`.
        checkpoints: folders or Hub ids. A folder's weights must not have changed.
        rows: what the run reads: lists of texts and ids.
    """
    values = {name: value for part in arguments for name, value in asdict(part).items()}
    weights = [file for name in checkpoints for file in Path(name).glob("*.safetensors")]
    return {
        **{name: value for name, value in values.items() if name not in free},
        "weights": sorted(file.stat().st_mtime_ns for file in weights),
        "rows": hashlib.sha1(json.dumps(rows).encode()).hexdigest(),
    }


def share_of_batches(num_rows: int, batch_size: int, done: set[int]) -> list[list[int]]:
    """The batches that this process predicts, without those that are done.

    A row is in the same batch for any number of processes and in a resumed run, so that its numbers are the same.
    """
    state = PartialState()
    batches = [list(range(start, min(start + batch_size, num_rows))) for start in range(0, num_rows, batch_size)]
    missing = [batch for batch in batches if not done.issuperset(batch)]
    return [missing[number] for number in np.array_split(range(len(missing)), state.num_processes)[state.process_index]]


def predict_batches(
    rows: Dataset,
    batches: list[list[int]],
    collate: Callable[[list[Line]], dict[str, torch.Tensor]],
    predict: Predict,
    num_workers: int,
) -> Iterator[dict[int, Line]]:
    """Yield, for each batch, the lines of its rows by position.

    Args:
        batches: positions of rows; rows of one image are adjacent.
        collate: from rows to a batch with `readable` (rows,).
    """
    state = PartialState()
    share = [position for batch in batches for position in batch]
    loader = DataLoader(rows, batch_sampler=batches, collate_fn=collate, num_workers=num_workers)
    images = number_images(rows)
    hidden = None if state.is_local_main_process else True  # None: shown in a terminal only
    with tqdm(total=len(set(images[share].tolist())), unit=" images", disable=hidden) as progress:
        last = -1
        for batch, here, readable in match_rows(loader, share):
            lines = predict({name: tensor.to(state.device) for name, tensor in batch.items()}, here)
            yield {
                position: line if good else UNREADABLE
                for position, line, good in zip(here, lines, readable, strict=True)
            }
            progress.update(len(set(images[here].tolist()) - {last}))
            last = int(images[here[-1]])


def report_unreadable(rows: Dataset, lines: Sequence[Line], bad_rows: list[Line], folder: Path) -> None:
    """Write bad_rows.jsonl, if there is any: rows that could not be used, and those whose image cannot be read.

    Args:
        lines: one for each row.
        bad_rows: rows of the data that are not in `rows`.
    """
    bad_rows = list(bad_rows)
    for position, line in enumerate(lines):
        if "unreadable_image" in line:
            row = rows[position]
            reason = why_unreadable(row["image"]) or "the image could not be read at first, but now it can"
            bad_rows.append({"split": "eval", "image_id": row["image_id"], "reason": reason})
    if bad_rows:
        write_lines(folder / "bad_rows.jsonl", bad_rows)
        logger.warning("%d rows have no prediction: %s", len(bad_rows), folder / "bad_rows.jsonl")


def require_readable(rows: Dataset, lines: Sequence[Line]) -> None:
    """Raise ValueError if no image could be read."""
    if all("unreadable_image" in line for line in lines):
        raise ValueError(
            f"None of the {len(lines)} images can be read. The first one: {why_unreadable(rows[0]['image'])}\n"
            "Check image_column, image_folder and the files."
        )
