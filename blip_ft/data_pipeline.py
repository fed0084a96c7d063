"""Data for your own training loop: DataPipeline gives data loaders, load_vqa and load_captions give rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import DataLoader, RandomSampler, Sampler
from transformers import ProcessorMixin

from blip_ft.arguments import BlipTrainingArguments, DataArguments, ModelArguments, PeftArguments, VqaArguments
from blip_ft.arguments.families import family_of, fill_defaults
from blip_ft.cli import parse
from blip_ft.data.augmentation import Augmentation, build_augmentation
from blip_ft.data.collators import VqaCollator
from blip_ft.data.images import encode_row_images
from blip_ft.data.loading import load_captions, load_vqa
from blip_ft.data.sampling import GroupedSampler
from blip_ft.data.tables import Row, number_images
from blip_ft.data.text_formats import texts_of_checkpoint
from blip_ft.modeling.checkpoint_files import longest_text
from blip_ft.models import ModelLoader

__all__ = ["DataPipeline", "load_captions", "load_vqa"]


class _CountedPasses(Sampler[int]):
    """The order of another sampler. Each pass starts the next epoch, for training loops that do not call set_epoch.

    Args:
        followers: what the epoch is set of.
    """

    def __init__(self, sampler: Sampler[int], followers: Sequence[GroupedSampler | Augmentation]) -> None:
        self.sampler, self.followers, self.passes = sampler, followers, 0

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        for follower in self.followers:
            follower.set_epoch(self.passes)
        self.passes += 1
        return iter(list(self.sampler))  # now, before another pass begins


class DataPipeline:
    """Data loaders for your own training loop, configured by the same YAML as a recipe's --config.

    Batches have pixel_values (rows, 3, height, width), input_ids and attention_mask (rows, question_length), and labels
    (rows, answer_length) of the most frequent answer, with -100 on padding; for InstructBLIP also qformer_input_ids and
    qformer_attention_mask. Questions of BLIP-2 and InstructBLIP stand in their prompt. With `group_questions: true`,
    they are the batches of VqaCollator, with each image only once; only these have the weights of answers and rows.
    With `augment: true`, each pass over the training loader has other views of the images.

    Args:
        config: path of the YAML file, or its content.
    """

    def __init__(self, config: str | Path | dict[str, Any]) -> None:
        self.model_args, _, self.data_args, self.task_args, self.training_args = parse(
            *(ModelArguments, PeftArguments, DataArguments, VqaArguments, BlipTrainingArguments),
            # batches are made on the CPU; without the flag, `bf16: true` needs a GPU
            argv=["--use_cpu"],
            config=config,
        )
        self.processor: ProcessorMixin | None = None

    def setup(self) -> None:
        """Read the rows, and load the processor of model_name_or_path (default: the checkpoint of recipes/vqa.py)."""
        name = self.model_args.model_name_or_path or "Salesforce/blip-vqa-base"
        if self.data_args.streaming:
            raise ValueError("DataPipeline does not support streaming; only the recipes do. Remove it from the YAML.")
        self.train_rows, self.eval_rows = load_vqa(self.data_args, seed=self.training_args.seed)
        loader = ModelLoader(
            name,
            task="vqa",
            device="cpu",
            image_size=self.model_args.image_size,
            revision=self.model_args.model_revision,
            allow_pickle=self.model_args.allow_pickle,
        )
        _, config, _ = loader._prepare()
        self.processor = loader.get_processor()
        fill_defaults(family_of(config), "vqa", longest_text(config), self.task_args)
        args = self.training_args
        given = (self.task_args.question_prompt, self.task_args.clean_questions)
        self.texts = texts_of_checkpoint(self.processor, config, "vqa", *given)
        self.texts.require_room_for_questions(self.task_args.max_question_tokens, self.task_args.max_answer_tokens)
        self._shuffle = torch.Generator().manual_seed(args.seed)
        self._augmentation = build_augmentation(self.data_args, args)
        followers = [self._augmentation] if self._augmentation else []
        if self.data_args.group_questions:
            sampler = GroupedSampler(number_images(self.train_rows), args.per_device_train_batch_size, args.seed)
            followers.append(sampler)
        else:
            sampler = RandomSampler(self.train_rows, generator=self._shuffle)
        self._sampler = _CountedPasses(sampler, followers)

    def get_train_dataloader(self) -> DataLoader:
        """All training rows, in a new random order each epoch. With grouping, only whole batches."""
        self._require_setup()
        return self._loader(
            self.train_rows,
            self.training_args.per_device_train_batch_size,
            self._augmentation,
            sampler=self._sampler,
            generator=None if self.data_args.group_questions else self._shuffle,
        )

    def get_eval_dataloader(self) -> DataLoader:
        """All evaluation rows, in the order of the data."""
        self._require_setup()
        return self._loader(self.eval_rows, self.training_args.per_device_eval_batch_size)

    def _require_setup(self) -> None:
        if self.processor is None:
            raise ValueError("Call setup() first: it reads the rows and loads the processor.")

    def _loader(
        self, rows: Dataset, batch_size: int, augmentation: Augmentation | None = None, **kwargs: Any
    ) -> DataLoader:
        limits = (self.task_args.max_question_tokens, self.task_args.max_answer_tokens)
        grouped = VqaCollator(self.processor, *limits, texts=self.texts, augmentation=augmentation)
        pairs = partial(self._collate_pairs, augmentation=augmentation)
        return DataLoader(
            rows,
            batch_size,
            collate_fn=grouped if self.data_args.group_questions else pairs,
            num_workers=self.training_args.dataloader_num_workers,
            **kwargs,
        )

    def _collate_pairs(self, rows: list[Row], augmentation: Augmentation | None) -> dict[str, torch.Tensor]:
        answers = [max(row["answers"], key=row["answers"].count) for row in rows]  # on a tie, max returns the first
        task, image_processor = self.task_args, self.processor.image_processor
        images = encode_row_images(rows, image_processor, augmentation)
        pixels = images["pixel_values"][images["image_index"]]
        mean, std = (
            torch.tensor(values).view(3, 1, 1) for values in (image_processor.image_mean, image_processor.image_std)
        )
        return {
            "pixel_values": (pixels / 255 - mean) / std,
            **self.texts.encode_questions([row["question"] for row in rows], task.max_question_tokens),
            "labels": self.texts.encode_answers(answers, task.max_answer_tokens),
        }
