"""On-disk cache of the outputs of a frozen vision encoder, or of a frozen Q-Former."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import compress, takewhile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from datasets.config import HF_CACHE_HOME
from filelock import FileLock, Timeout
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import distributed, nn
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm
from transformers import PreTrainedModel, ProcessorMixin

from blip_ft.arguments import BlipTrainingArguments
from blip_ft.data.batches import match_rows
from blip_ft.data.checks import ImageHashes
from blip_ft.data.collators import ImageCollator
from blip_ft.data.tables import number_images
from blip_ft.modeling.blip.retrieval import BlipForImageTextRetrieval
from blip_ft.modeling.blip2.base import QFormerModel
from blip_ft.training.signals import ignore_signals_in_worker

logger = logging.getLogger(__name__)

FORMAT = 2  # raise it if images are decoded, resized or named in another way, so that old features are not read

KEY_BYTES = 41  # 40 hexadecimal digits and a newline

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

GB = 10**9

# what is stored: the outputs of the Q-Former, or of the vision model
Level = Literal["qformer", "vision"]

# level -> the name of its features in a batch
BATCH_NAMES: dict[Level, str] = {"qformer": "query_states", "vision": "image_states"}

# level -> the modules that compute its features
PARTS: dict[Level, tuple[str, ...]] = {"qformer": ("vision_model", "qformer"), "vision": ("vision_model",)}


@dataclass
class FeatureStore:
    """Features in a folder: `states` has a row of fixed shape for each image, and `keys` a line for each row.

    A key is written after its row is on the disk. If a run is killed, the store is valid up to the last key.

    Args:
        shape: of a row, e.g. (patches + 1, width) or (queries, width).
    """

    folder: Path
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @contextmanager
    def writing(self) -> Iterator[None]:
        """A lock for appending; other processes wait here. Incomplete data of a killed process is removed."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / "lock")  # the system releases it when the process ends
        try:
            held = lock.acquire(timeout=0)
        except Timeout:
            logger.info("Waiting for another process, which is encoding images into %s.", self.folder)
            held = lock.acquire()
        with held:
            for name in ("states", "keys"):
                (self.folder / name).touch()
            num_rows = len(self.rows())
            os.truncate(self.folder / "states", num_rows * self.row_bytes)
            os.truncate(self.folder / "keys", num_rows * KEY_BYTES)
            yield

    def rows(self) -> dict[str, int]:
        """Key -> row, of all complete rows."""
        lines = (self.folder / "keys").read_bytes().split(b"\n")[:-1]  # text after the last newline is incomplete
        num_rows = (self.folder / "states").stat().st_size // self.row_bytes
        keys = takewhile(re.compile(rb"[0-9a-f]{40}").fullmatch, lines[:num_rows])
        return {key.decode(): row for row, key in enumerate(keys)}

    def append(self, keys: Sequence[str], states: torch.Tensor) -> None:
        """Add a row for each key; the keys must be new. states: (len(keys), *shape), any float type."""
        content = states.to("cpu", self.dtype).contiguous().view(torch.uint8).numpy().tobytes()
        lines = "".join(f"{key}\n" for key in keys).encode()
        for name, part in (("states", content), ("keys", lines)):
            with (self.folder / name).open("ab") as file:
                file.write(part)
                file.flush()
                os.fsync(file.fileno())  # otherwise a power cut may keep a key and lose its row

    def read(self, rows: Sequence[int | None]) -> torch.Tensor:
        """(len(rows), *shape) in the dtype of the store; zeros for None."""
        content = np.zeros((len(rows), self.row_bytes), np.uint8)  # numpy has no bfloat16
        for index, row in enumerate(rows):
            if row is not None:
                # mapped again for each row, in microseconds: pickle would copy a permanent map into every worker
                offset = row * self.row_bytes
                content[index] = np.memmap(self.folder / "states", np.uint8, "r", offset, (self.row_bytes,))
        return torch.from_numpy(content).view(self.dtype).view(-1, *self.shape)


@dataclass
class StoredImages:
    """Reads the features of a batch's images instead of decoding the images.

    Args:
        row_of: image_id -> row in store, without images that could not be read.
        level: of the features, which have the name BATCH_NAMES[level] in a batch.
    """

    store: FeatureStore
    row_of: dict[str, int]
    level: Level

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """The features (I, *store.shape), each image once; image_index (rows,); readable (rows,)."""
        image_ids = [row["image_id"] for row in rows]
        position = {image_id: index for index, image_id in enumerate(dict.fromkeys(image_ids))}
        return {
            BATCH_NAMES[self.level]: self.store.read([self.row_of.get(image_id) for image_id in position]),
            "image_index": torch.tensor([position[image_id] for image_id in image_ids]),
            "readable": torch.tensor([image_id in self.row_of for image_id in image_ids]),
        }


def store_images(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    rows: Any,
    args: BlipTrainingArguments,
    after_batch: Callable[[], None] = lambda: None,
) -> StoredImages:
    """Encode the images of rows that are not stored yet.

    If several processes share the folder, one of them encodes and the others wait.

    Args:
        rows: with image and image_id, and a column of image_id.
        after_batch: called after each batch. If it raises an exception, the images encoded so far are kept.
    Raises: ValueError if features are not constant, and, before any image is encoded, if they need too much space.
    """
    level = require_constant_features(model)
    if distributed.is_initialized():
        for _, tensor in _weights(model, level):
            # DDP will copy the weights of the first process to the others; until then those of a new model differ.
            # Quantized layers also have settings there, on the CPU, which NCCL does not send
            if tensor.device == model.device:
                distributed.broadcast(tensor, 0)
    home = Path(HF_CACHE_HOME) / "blip_ft" / "image_features"
    digest, dtype = _digest(model, level, processor, args), DTYPES[args.cache_dtype]
    store = FeatureStore(home / digest, _shape(model, level), dtype)

    hashes = ImageHashes()
    key_of, row_of_key = {}, {}
    # the first row of each image
    for position in np.unique(number_images(rows), return_index=True)[1].tolist():
        row = rows[position]
        image_id = row["image_id"]
        try:
            key = key_of[image_id] = hashes.of(row["image"])
            row_of_key[key] = position
        except OSError as error:
            logger.warning("Image %s cannot be read and is not trained on: %s", image_id, error)
    hashes.remember()

    with store.writing():
        found = store.rows()
        missing = {key: row for key, row in row_of_key.items() if key not in found}
        if missing:
            _require_space(home, len(missing) * store.row_bytes, len(missing), level, args)
            _encode(model, level, processor, rows, missing, store, args, after_batch)
        stored = store.rows()
    logger.info(
        "Outputs of the %s for %d images, %d of them encoded now: %s (%.1f GB)",
        *(
            "Q-Former" if level == "qformer" else "vision model",
            len(row_of_key),
            len(stored) - len(found),
            store.folder,
            len(stored) * store.row_bytes / GB,
        ),
    )
    row_of = {image_id: stored[key] for image_id, key in key_of.items() if key in stored}
    return StoredImages(store, row_of, level)


@torch.no_grad()
def _encode(
    model: PreTrainedModel,
    level: Level,
    processor: ProcessorMixin,
    rows: Any,
    missing: dict[str, int],
    store: FeatureStore,
    args: BlipTrainingArguments,
    after_batch: Callable[[], None],
) -> None:
    """missing: key of an image -> the position of a row with it."""
    loader = DataLoader(
        Subset(rows, list(missing.values())),
        args.per_device_eval_batch_size,
        collate_fn=ImageCollator(processor),
        num_workers=args.dataloader_num_workers,
        worker_init_fn=ignore_signals_in_worker,
        generator=torch.Generator(),  # a run that finds all features draws the same dropout as the one that stored them
    )
    model.eval()
    with tqdm(total=len(missing), desc="Encoding images, once for all epochs", disable=args.disable_tqdm) as progress:
        for batch, keys, readable in match_rows(loader, missing):
            with torch.autocast(model.device.type, _autocast_dtype(args), enabled=args.bf16 or args.fp16):
                states = model.encode_images(batch["pixel_values"].to(model.device)).last_hidden_state
                if level == "qformer":
                    states = model.encode_queries(states, torch.arange(len(states), device=model.device))
            store.append(list(compress(keys, readable)), states.cpu()[torch.tensor(readable)])
            progress.update(len(keys))
            after_batch()


def _autocast_dtype(args: BlipTrainingArguments) -> torch.dtype:
    return torch.float16 if args.fp16 else torch.bfloat16


def require_constant_features(model: PreTrainedModel) -> Level:
    """The last features that do not change during training. They need no weights: the model may be on the meta device.

    Raises: ValueError if the outputs of the vision model change.
    """
    if isinstance(model, BlipForImageTextRetrieval):
        raise ValueError(
            "cache_image_features is not supported in retrieval, where the momentum encoder also encodes the images. "
            "Leave it out."
        )
    has_qformer = isinstance(model, QFormerModel)
    vision = model.vision_model
    if any(isinstance(module, BaseTunerLayer) for module in vision.modules()):
        raise ValueError(
            "cache_image_features needs a vision model that does not change, but the adapter has layers there. Put the "
            + (
                "adapter on the language model only, the default: leave out --lora_target_modules."
                if has_qformer
                else "adapter on the text layers only: --lora_target_modules query key value dense"
            )
        )
    if trained := _trained_weights(model, "vision_model"):
        raise ValueError(
            f"cache_image_features needs a vision model that does not change, but {len(trained)} of its weights are "
            f"trained, e.g. {trained[0]}. {_how_to_freeze(model) if has_qformer else 'Add --freeze vision_model.'}"
        )
    # that of BLIP only: frozen parts of a model with a Q-Former are always in evaluation mode. Stochastic depth is off
    # in frozen layers and needs no check
    if any(module.p > 0 for module in vision.modules() if isinstance(module, nn.Dropout)):
        raise ValueError(
            "cache_image_features needs features that are the same in every epoch, but the vision model of the "
            "checkpoint has dropout. Set attention_dropout to 0 under vision_config in its config.json."
        )
    if not has_qformer or model.qformer_reads_prompts or _trained_weights(model, "qformer", "query_tokens"):
        return "vision"
    return "qformer"


def _trained_weights(model: nn.Module, *parts: str) -> list[str]:
    return [name for name, weight in model.named_parameters() if weight.requires_grad and name.split(".")[0] in parts]


def _how_to_freeze(model: QFormerModel) -> str:
    """Flags for a BLIP-2 or InstructBLIP whose vision model is trained. --freeze takes the place of its default."""
    names = dict.fromkeys(name.split(".")[0] for name, _ in model.named_parameters())
    trained = [name for name in names if _trained_weights(model, name)]
    constant = ["vision_model"] if model.qformer_reads_prompts else ["vision_model", "qformer", "query_tokens"]
    frozen = [name for name in names if name not in (*trained, *constant)]
    return (
        f"Trained are {', '.join(trained)}. Add --freeze {','.join([*constant, *frozen])}, or --use_peft, which trains "
        "only an adapter on the language model."
    )


def _shape(model: PreTrainedModel, level: Level) -> tuple[int, ...]:
    """Of the features of one image."""
    if level == "qformer":
        return tuple(model.query_tokens.shape[1:])
    return model.vision_model.embeddings.num_positions, model.config.vision_config.hidden_size


def _weights(model: PreTrainedModel, level: Level) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors of all weights that determine the features."""
    yield from model.vision_model.state_dict().items()
    if level == "qformer":
        yield from model.qformer.state_dict(prefix="qformer.").items()
        yield "query_tokens", model.query_tokens.detach()


def _digest(model: PreTrainedModel, level: Level, processor: ProcessorMixin, args: BlipTrainingArguments) -> str:
    """A hash of everything that determines the stored features, apart from the image."""
    vision = model.config.vision_config
    settings = {
        name: getattr(vision, name)
        for name in ("image_size", "num_attention_heads", "hidden_act", "layer_norm_eps", "image_mean", "image_std")
    }
    settings |= {"format": FORMAT, "resample": int(processor.image_processor.resample), "dtype": args.cache_dtype}
    settings["autocast"] = str(_autocast_dtype(args)) if args.bf16 or args.fp16 else None
    if level == "qformer":  # `vision` is not named, so that stores of earlier versions are still read
        names = ("num_attention_heads", "hidden_act", "layer_norm_eps")
        settings |= {"level": level} | {f"qformer {name}": getattr(model.config.qformer_config, name) for name in names}
    digest = hashlib.sha256(json.dumps(settings).encode())
    for name, tensor in _weights(model, level):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


def _require_space(home: Path, needed: int, num_images: int, level: Level, args: BlipTrainingArguments) -> None:
    """Raises: ValueError if the needed bytes exceed the limit or the free space of the disk."""
    # by the features of all models and image sizes
    used = sum(path.stat().st_size for path in home.rglob("*") if path.is_file())
    free = shutil.disk_usage(home).free
    if used + needed > args.cache_limit_gb * GB or needed > free:
        halve = " --cache_dtype bf16 halves it;" if args.cache_dtype == "fp32" else ""
        smaller = " needs" if level == "qformer" else " and a smaller --image_size need"
        raise ValueError(
            f"cache_image_features needs {needed / GB:.3g} GB for {num_images} images. {home} contains "
            f"{used / GB:.3g} GB, cache_limit_gb is {args.cache_limit_gb:g} for both, and the disk has {free / GB:.3g} "
            f"GB free.{halve} --max_train_samples{smaller} less; --cache_limit_gb "
            f"{(used + needed) / GB:.3g} allows it; HF_HOME moves it to another disk. Folders there from other models "
            "or image sizes can be deleted."
        )
