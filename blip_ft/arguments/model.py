"""Which checkpoint to train, and how: whole, LoRA, quantized."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from blip_ft.arguments.settings import Settings


@dataclass
class ModelArguments(Settings):
    """Which checkpoint, and what to change in it before training."""

    _argument_group_name = "Model"

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Hub id or folder of a BLIP checkpoint or PEFT adapter; `demo`: a small new model."},
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the checkpoint."})
    image_size: int | None = field(
        default=None,
        metadata={"help": "Pixels a side. The position table is resized once and stored. Default: the checkpoint's."},
    )
    label_smoothing: float = field(
        default=0.1, metadata={"help": "Of the language-modelling loss, 0 to 1. Paper: 0.1. Stored in text_config."}
    )
    dropout: float | None = field(
        default=None,
        metadata={"help": "Of text states and attention. Paper: 0.1. Default: the checkpoint's (0 on the Hub)."},
    )
    freeze: str | None = field(
        default=None,
        metadata={
            "help": "Comma-separated parts that are not trained, e.g. vision_model or text_encoder.encoder.layer.0"
        },
    )
    allow_pickle: bool = field(
        default=False,
        metadata={"help": "Also take weights that lie there as .bin only, a pickle; they are read with weights_only."},
    )
    allow_new_weights: bool = field(
        default=False,
        metadata={"help": "Also take a checkpoint that lacks weights, which start from random numbers, or has others."},
    )

    def unread(self) -> dict[str, str]:
        # DataPipeline's and the recipes' default lies on the Hub
        is_local = self.model_name_or_path is not None and self.hub_id is None
        return {"model_revision": "without a checkpoint of the Hub"} if is_local else {}

    @property
    def hub_id(self) -> str | None:
        """The checkpoint's id where it lies on the Hub, None for a folder and for the demo."""
        name = self.model_name_or_path
        return None if name == "demo" or Path(name).exists() else name

    @property
    def frozen_parts(self) -> list[str]:
        return [name.strip() for name in (self.freeze or "").split(",") if name.strip()]


@dataclass
class PeftArguments(Settings):
    """Train an adapter instead of the model, and hold the model in few bits. Names as in TRL's ModelConfig."""

    _argument_group_name = "PEFT and quantization"

    use_peft: bool = field(default=False, metadata={"help": "Train a LoRA adapter."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale of the adapter; it is multiplied by alpha / r."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout before the adapter."})
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Names of linear layers. Default: all of attention and feed-forward, never the tied head."},
    )
    load_in_8bit: bool = field(default=False, metadata={"help": "8-bit weights (bitsandbytes); needs --use_peft."})
    load_in_4bit: bool = field(default=False, metadata={"help": "4-bit NF4 weights (bitsandbytes); needs --use_peft."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.load_in_8bit and self.load_in_4bit:
            raise ValueError("Choose one width: load_in_8bit and load_in_4bit are both on.")
        if (self.load_in_8bit or self.load_in_4bit) and not self.use_peft:
            bits = "load_in_8bit" if self.load_in_8bit else "load_in_4bit"
            raise ValueError(f"{bits} needs an adapter, for weights of few bits cannot be trained. Add --use_peft.")

    def unread(self) -> dict[str, str]:
        names = () if self.use_peft else ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules")
        return dict.fromkeys(names, "without --use_peft")
