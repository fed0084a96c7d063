"""The base of all argument classes: ranges of values, and settings without effect."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

AT_LEAST_ONE = (1, math.inf)

NOT_NEGATIVE = (0, math.inf)

SHARE = (0, 1)

TOKENS = (3, 512)  # at least the first token, a word and [SEP]; at most BERT's positions

# setting -> smallest and largest value, in every program
RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(
        (
            *("label_smoothing", "dropout", "drop_path", "max_bad_fraction", "lora_dropout", "momentum", "alpha"),
            *("threshold", "keep_share"),
        ),
        SHARE,
    ),
    **dict.fromkeys(
        (
            *("image_size", "lora_alpha", "max_train_samples", "max_eval_samples", "shuffle_buffer"),
            *("k_test", "top_texts", "num_captions", "per_device_train_batch_size", "per_device_eval_batch_size"),
            *("gradient_accumulation_steps", "generation_num_beams", "save_total_limit", "early_stopping_patience"),
        ),
        AT_LEAST_ONE,
    ),
    **dict.fromkeys(("max_question_tokens", "max_answer_tokens", "max_caption_tokens"), TOKENS),
    "generation_max_length": TOKENS,
    "generation_min_length": (0, 512),
    **dict.fromkeys(
        (
            *("queue_size", "sample_steps", "dataloader_num_workers", "learning_rate", "weight_decay"),
            *("cache_limit_gb", "max_grad_norm", "warmup_steps", "logging_steps", "eval_delay"),
        ),
        NOT_NEGATIVE,
    ),
    "lora_r": (1, 1024),  # width of the largest BLIP; a larger rank has more weights than the layer itself
    "adam_epsilon": (1e-20, math.inf),  # with 0, the update of a weight without gradient is 0 / 0
    "num_train_epochs": (1e-6, math.inf),
    "save_steps": (1e-6, math.inf),
    "eval_steps": (1e-6, math.inf),  # 0 would mean logging_steps
    "seed": (0, 2**32 - 1),
    "data_seed": (0, 2**32 - 1),
}

WITHOUT_LARGEST = ("dropout", "lora_dropout", "drop_path")  # a dropout of 1 would drop everything


class Settings:
    """Base of all argument classes: checks values, and refuses settings that nothing reads."""

    _argument_group_name: ClassVar[str]  # its title in --help
    # settings of a base class that no program of this class reads -> what to do instead; refused, and not in --help
    without_effect: ClassVar[dict[str, str]] = {}
    # replaces the help of a base class if that is wrong here
    help_texts: ClassVar[dict[str, str]] = {}
    # title -> settings that --help shows; None: all of them. --help-all shows the others too
    help_groups: ClassVar[dict[str, tuple[str, ...]] | None] = None

    def __post_init__(self) -> None:
        self.check_values()

    def check_values(self) -> None:
        """Raise ValueError for a value outside RANGES, for NaN and for infinity."""
        for entry in dataclasses.fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                continue
            least, most = RANGES.get(entry.name, (-math.inf, math.inf))
            is_excluded = entry.name in WITHOUT_LARGEST and value == most
            if math.isfinite(value) and least <= value <= most and not is_excluded:
                continue
            wanted = f"between {least} and {most}" if most < math.inf else f"at least {least}"
            wanted = "a finite number" if least == -math.inf else wanted
            excluded = f", {most} excluded" if entry.name in WITHOUT_LARGEST else ""
            raise ValueError(f"{entry.name} must be {wanted}{excluded}, found {value}.")

    def require_effect(self) -> None:
        """Raise ValueError for a setting in without_effect whose value differs from its default."""
        for name in changed_settings(self):
            if name in self.without_effect:
                raise ValueError(f"{name} has no effect here. {self.without_effect[name]}")

    def require_use(self) -> None:
        """Raise ValueError for a changed setting that nothing reads, because of the value of another setting.

        Not part of __post_init__: code that replaces one of several settings that belong together must not fail.
        """
        changed = changed_settings(self)
        for name, reason in self.unread().items():
            if name in changed:
                raise ValueError(
                    f"{name} {changed[name]} has no effect {reason}. Leave it out, or change the other setting."
                )

    def unread(self) -> dict[str, str]:
        """Settings that nothing reads because of the values of others -> "without ..." or "beside ..."."""
        return {}


def _default(entry: dataclasses.Field) -> Any:
    return entry.default if entry.default_factory is dataclasses.MISSING else entry.default_factory()


def changed_settings(part: Settings) -> dict[str, Any]:
    """The fields whose value differs from their default."""
    values = {entry: getattr(part, entry.name) for entry in dataclasses.fields(part)}
    return {entry.name: value for entry, value in values.items() if value != _default(entry)}
