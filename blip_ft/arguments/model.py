"""Which checkpoint to train, and how: full fine-tuning, LoRA or quantized."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers.hf_argparser import HfArg

from blip_ft.arguments.settings import Settings


@dataclass
class ModelArguments(Settings):
    """Which checkpoint to load, and what to change in it before training."""

    _argument_group_name = "Model"

    model_name_or_path: str | None = HfArg(
        default=None,
        help="Hub id or folder of a checkpoint or PEFT adapter, or `demo`, a small new model.",
    )
    model_revision: str = HfArg(default="main", help="Branch, tag or commit of the checkpoint.")
    image_size: int | None = HfArg(
        default=None,
        help="Image height and width in pixels. Position embeddings are resized. Default: the checkpoint's.",
    )
    label_smoothing: float | None = HfArg(
        default=None, help="Label smoothing of BLIP's language-modeling loss. In [0, 1]. Default: 0.1, as the paper."
    )
    dropout: float | None = HfArg(
        default=None, help="Dropout of text states and attention. Paper: 0.1. Default: the checkpoint's, 0 on the Hub."
    )
    drop_path: float | None = HfArg(
        default=None,
        help="Stochastic depth of BLIP's vision model, rising from 0 to this rate in the last layer. Paper: 0.1 for "
        "vqa and large models. Default: the checkpoint's, 0 on the Hub.",
    )
    freeze: str | None = HfArg(
        default=None,
        help="Modules to freeze, separated by commas, or none. E.g. vision_model,text_encoder.encoder.layer.0. "
        "Default: none for BLIP, the language model for BLIP-2, also the vision model for InstructBLIP.",
    )
    allow_pickle: bool = HfArg(
        default=False, help="Also load weights that exist only as .bin. These pickles are read with weights_only."
    )
    allow_new_weights: bool = HfArg(
        default=False, help="Accept missing or unexpected weights. Missing weights are randomly initialized."
    )

    def unread(self) -> dict[str, str]:
        # without a name, DataPipeline and the recipes load a checkpoint of the Hub
        is_local = self.model_name_or_path is not None and self.hub_id is None
        return {"model_revision": "without a checkpoint of the Hub"} if is_local else {}

    @property
    def hub_id(self) -> str | None:
        """The checkpoint's id on the Hub; None for a folder and for the demo."""
        name = self.model_name_or_path
        return None if name == "demo" or Path(name).exists() else name


@dataclass
class PeftArguments(Settings):
    """LoRA and quantization options; names follow TRL's ModelConfig."""

    _argument_group_name = "PEFT and quantization"

    use_peft: bool = HfArg(default=False, help="Train a LoRA adapter.")
    lora_r: int = HfArg(default=16, help="Rank of the LoRA adapter.")
    lora_alpha: int = HfArg(default=32, help="LoRA scale. The adapter's output is multiplied by alpha / r.")
    lora_dropout: float = HfArg(default=0.05, help="Dropout of the LoRA adapter's input.")
    lora_target_modules: list[str] | None = HfArg(
        default=None,
        help="Layers with an adapter. Default: all linear layers of attention and feed-forward, not the head. For "
        "BLIP-2 and InstructBLIP those of the language model.",
    )
    load_in_8bit: bool = HfArg(default=False, help="8-bit weights (bitsandbytes). Requires --use_peft.")
    load_in_4bit: bool = HfArg(default=False, help="4-bit NF4 weights (bitsandbytes). Requires --use_peft.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.load_in_8bit and self.load_in_4bit:
            raise ValueError("load_in_8bit and load_in_4bit are mutually exclusive. Choose one.")
        if (self.load_in_8bit or self.load_in_4bit) and not self.use_peft:
            name = "load_in_8bit" if self.load_in_8bit else "load_in_4bit"
            raise ValueError(f"Quantized weights cannot be trained. {name} requires --use_peft.")

    def unread(self) -> dict[str, str]:
        names = () if self.use_peft else ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules")
        return dict.fromkeys(names, "without --use_peft")
