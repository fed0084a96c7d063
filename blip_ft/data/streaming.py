"""Rows that are read while training, without a copy on disk."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import chain, count, groupby, islice
from pathlib import Path

import numpy as np
import torch
from datasets import (
    Dataset,
    Image,
    IterableDataset,
)

from blip_ft.arguments import DataArguments
from blip_ft.data.schema import Schema
from blip_ft.data.tables import Row, Table, iterate, to_json

logger = logging.getLogger(__name__)


class StreamedRows(torch.utils.data.IterableDataset):
    """Rows to train on, read as they are needed and without end; rows of an image that follow each other stay so.

    A pass over the source gives each row once, among all processes and workers together. Where the Hub has a number of
    files that they can share evenly, each reads files of its own; else each reads all and keeps every n-th image.
    Rows that cannot be used are skipped, and listed in bad_rows_file during the first pass. Same seed, processes and
    workers: same order.

    The trainer sets process, num_processes, batch_size, and first_batch to begin at: those of this process before it
    are read, but no image of theirs is decoded.

    Raises: ValueError in a pass where more than max_bad_fraction of the rows cannot be used, counted from 1,000 rows.
    """

    def __init__(
        self, table: Table, schema: Schema, args: DataArguments, bad_rows_file: Path | None, seed: int
    ) -> None:
        if isinstance(table, Dataset):
            images = [name for name, feature in table.features.items() if isinstance(feature, Image)]
            for name in images:
                table = table.cast_column(name, Image(decode=False))
        if bad_rows_file is not None:
            bad_rows_file.unlink(missing_ok=True)  # of a run that is resumed: its rows are read, and listed, anew
        self.table, self.schema, self.args, self.seed = table, schema, args, seed
        self.bad_rows_file = bad_rows_file
        self.process, self.num_processes, self.batch_size, self.first_batch = 0, 1, 1, 0

    def __iter__(self) -> Iterator[Row]:
        worker = torch.utils.data.get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        # the loader takes a batch of each worker in turn, and begins with the first
        number = (number + self.first_batch) % workers
        place, places = self.process * workers + number, self.num_processes * workers
        rows = chain.from_iterable(self.read_pass(epoch, place, places) for epoch in count())
        batches_before = len(range(number, self.first_batch, workers))
        return islice(rows, batches_before * self.batch_size, None)

    def first_rows(self) -> Iterator[Row]:
        """The rows in their order in the source, to look at; none is listed as bad."""
        for row in self._good_rows(self.table, listed=False):
            yield from self.schema.to_train([row])

    def read_pass(self, epoch: int, place: int = 0, places: int = 1) -> Iterator[Row]:
        """The rows that one of `places` readers has in a pass, in random order."""
        generator = np.random.default_rng((self.seed, epoch, place))
        table, share, shares = self.table, place, places
        if isinstance(table, IterableDataset) and table.num_shards % places == 0 and not self.args.max_train_samples:
            table, share, shares = table.shard(places, place), 0, 1
        good = self._good_rows(table, listed=epoch == 0 and share == 0)
        if self.args.group_questions is False:
            groups = ([row] for row in good)
        else:
            groups = (list(rows) for _, rows in groupby(good, key=lambda row: row["image_id"]))
        held, empty = [], True
        for group in islice(groups, share, None, shares):
            empty = False
            if len(held) < self.args.shuffle_buffer:
                held.append(group)
                continue
            drawn = generator.integers(len(held))
            group, held[drawn] = held[drawn], group
            yield from self.schema.to_train(group)
        if empty:
            raise ValueError(
                f"The stream has too few rows for {places} readers (processes x --dataloader_num_workers): nothing is "
                "left for one of them. Take fewer, or leave out --streaming."
            )
        for drawn in generator.permutation(len(held)):
            yield from self.schema.to_train(held[drawn])

    def _good_rows(self, table: Table, listed: bool) -> Iterator[Row]:
        num_bad = position = 0
        for position, row in enumerate(islice(iterate(table), self.args.max_train_samples)):
            converted, reason = self.schema.convert(row, position)
            if not reason:
                yield converted
                continue
            num_bad += 1
            bad = {"split": "train", "row": position, "image_id": converted["image_id"], "reason": reason}
            if listed:
                logger.warning("train row %d (%s) is skipped: %s", position, bad["image_id"], reason)
                if self.bad_rows_file is not None:
                    with self.bad_rows_file.open("a", encoding="utf-8") as file:
                        file.write(to_json(bad) + "\n")
            self._require_few(num_bad, max(position + 1, 1000), bad)
        if num_bad:
            self._require_few(num_bad, position + 1, bad)

    def _require_few(self, num_bad: int, num_rows: int, last: Row) -> None:
        if num_bad > self.args.max_bad_fraction * num_rows:
            raise ValueError(
                f"{num_bad} of the first {num_rows} rows of the stream cannot be used, the last of them, row "
                f"{last['row']}, for: {last['reason']}. That is more than max_bad_fraction = "
                f"{self.args.max_bad_fraction:.2%}. Mend or remove them, or set --max_bad_fraction"
            )
