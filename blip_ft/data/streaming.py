"""Rows that are read during training, without a copy on disk."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import count, groupby, islice
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, Image, IterableDataset

from blip_ft.arguments import DataArguments
from blip_ft.data.schema import Schema
from blip_ft.data.tables import Row, Table, iterate_rows, to_json

logger = logging.getLogger(__name__)


class StreamedRows(torch.utils.data.IterableDataset):
    """Rows to train on, read as they are needed, without an end. Consecutive rows of one image stay together.

    All processes and workers together read each row once per pass over the source. If the Hub has a number of files
    that divides evenly among them, each reads its own files; otherwise each reads all rows and keeps every n-th image.
    Rows that cannot be used are skipped, and listed in bad_rows_file during the first pass. The order depends only on
    the seed and the numbers of processes and workers. Each row has the number of its pass as `epoch`, for Augmentation.

    The trainer sets process, num_processes, batch_size and first_batch. Batches of this process before first_batch are
    read and skipped, and none of their images is decoded.

    Raises: ValueError if more than max_bad_fraction of a pass's rows cannot be used, checked from 1,000 rows on and at
        the end of the pass.
    """

    def __init__(
        self, table: Table, schema: Schema, args: DataArguments, bad_rows_file: Path | None, seed: int
    ) -> None:
        if isinstance(table, Dataset):
            images = [name for name, feature in table.features.items() if isinstance(feature, Image)]
            for name in images:
                table = table.cast_column(name, Image(decode=False))
        if bad_rows_file is not None:
            bad_rows_file.unlink(missing_ok=True)  # a resumed run reads its rows, and lists the bad ones, again
        self.table, self.schema, self.args, self.seed = table, schema, args, seed
        self.bad_rows_file = bad_rows_file
        self.process, self.num_processes, self.batch_size, self.first_batch = 0, 1, 1, 0

    def __iter__(self) -> Iterator[Row]:
        worker = torch.utils.data.get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        # the loader takes batches from its workers in turn, starting with worker 0
        number = (number + self.first_batch) % workers
        shard, num_shards = self.process * workers + number, self.num_processes * workers
        rows = ({**row, "epoch": epoch} for epoch in count() for row in self.read_pass(epoch, shard, num_shards))
        batches_before = len(range(number, self.first_batch, workers))
        return islice(rows, batches_before * self.batch_size, None)

    def first_rows(self) -> Iterator[Row]:
        """The rows in the order of the source, for inspection. Bad rows are skipped and not listed."""
        for row in self._usable_rows(self.table, listed=False):
            yield from self.schema.to_train([row])

    def read_pass(self, epoch: int, shard: int = 0, num_shards: int = 1) -> Iterator[Row]:
        """The rows of one of num_shards readers in one pass, in random order."""
        generator = np.random.default_rng((self.seed, epoch, shard))
        # of the rows in `table`, this reader keeps every `step`-th image, starting from number `first`
        table, first, step = self.table, shard, num_shards
        can_share_files = isinstance(table, IterableDataset) and table.num_shards % num_shards == 0
        if can_share_files and not self.args.max_train_samples:
            table, first, step = table.shard(num_shards, shard), 0, 1
        rows = self._usable_rows(table, listed=epoch == 0 and first == 0)
        if self.args.group_questions is False:
            groups = ([row] for row in rows)
        else:
            groups = (list(group) for _, group in groupby(rows, key=lambda row: row["image_id"]))
        buffer, empty = [], True
        for group in islice(groups, first, None, step):
            empty = False
            if len(buffer) < self.args.shuffle_buffer:
                buffer.append(group)
                continue
            drawn = generator.integers(len(buffer))
            group, buffer[drawn] = buffer[drawn], group
            yield from self.schema.to_train(group)
        if empty:
            raise ValueError(
                f"The stream has too few rows for {num_shards} readers (processes x --dataloader_num_workers): one of "
                "them has no rows. Use fewer readers, or remove --streaming."
            )
        for drawn in generator.permutation(len(buffer)):
            yield from self.schema.to_train(buffer[drawn])

    def _usable_rows(self, table: Table, listed: bool) -> Iterator[Row]:
        num_bad = position = 0
        for position, row in enumerate(islice(iterate_rows(table), self.args.max_train_samples)):
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
            self._require_few_bad_rows(num_bad, max(position + 1, 1000), bad)
        if num_bad:
            self._require_few_bad_rows(num_bad, position + 1, bad)

    def _require_few_bad_rows(self, num_bad: int, num_rows: int, last: Row) -> None:
        if num_bad > self.args.max_bad_fraction * num_rows:
            raise ValueError(
                f"{num_bad} of the first {num_rows} rows of the stream cannot be used. The last one is row "
                f"{last['row']}: {last['reason']}. That is more than max_bad_fraction = "
                f"{self.args.max_bad_fraction:.2%}. Fix or remove these rows, or set --max_bad_fraction."
            )
