"""Config and processor of a small BLIP that learns simple images in minutes on a CPU."""

from __future__ import annotations

import string
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import BertTokenizer, BlipConfig, BlipImageProcessor, BlipProcessor, PreTrainedModel


def build_small_processor(words: Iterable[str], image_size: int) -> BlipProcessor:
    """A processor whose tokenizer knows the given words and spells any other word with their or ASCII characters."""
    # split and normalize texts as BERT's tokenizer does
    split = BertTokenizer(vocab={"[UNK]": 0}).backend_tokenizer
    texts = (split.normalizer.normalize_str(word) for word in words)
    known = {word for text in texts for word, _ in split.pre_tokenizer.pre_tokenize_str(text)}
    ascii_characters = [*string.ascii_lowercase, *string.digits, *string.punctuation]
    characters = [*ascii_characters, *sorted(set("".join(known)) - set(ascii_characters))]
    pieces = [*characters, *(f"##{character}" for character in characters)]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(known - set(characters)), *pieces]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vocab.txt"
        path.write_text("\n".join(vocabulary), encoding="utf-8")
        tokenizer = BertTokenizer(vocab=str(path))
    return BlipProcessor(BlipImageProcessor(size={"height": image_size, "width": image_size}), tokenizer)


def build_small_config(
    processor: BlipProcessor,
    patch_size: int,
    width: int = 128,
    num_heads: int = 4,
    vision_layers: int = 3,
    text_layers: int = 2,
    max_tokens: int = 64,
    initializer_range: float = 0.08,
) -> BlipConfig:
    """For the arguments see build_small_blip. [DEC] and [ENC] come after the tokenizer's words, as on the Hub."""
    tokenizer, image_size = processor.tokenizer, processor.image_processor.size["height"]
    if patch_size < 1 or image_size % patch_size:
        raise ValueError(f"image_size must be a multiple of patch_size, found {image_size} and {patch_size}.")
    if num_heads < 1 or width % num_heads:
        raise ValueError(f"width must be a multiple of num_heads, found {width} and {num_heads}.")
    return BlipConfig(
        vision_config={
            "image_size": image_size,
            "patch_size": patch_size,
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": vision_layers,
            "num_attention_heads": num_heads,
            "initializer_range": initializer_range,
            "layer_norm_eps": 1e-6,
        },
        text_config={
            "vocab_size": len(tokenizer) + 2,
            "bos_token_id": len(tokenizer),
            "pad_token_id": tokenizer.pad_token_id,
            "sep_token_id": tokenizer.sep_token_id,
            "eos_token_id": tokenizer.sep_token_id,
            "hidden_size": width,
            "encoder_hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": text_layers,
            "num_attention_heads": num_heads,
            "initializer_range": initializer_range,
            "max_position_embeddings": max_tokens,
        },
        image_text_hidden_size=width,
    )


def init_position_embeddings(model: PreTrainedModel) -> None:
    """Draw new position embeddings with standard deviation 1, similar in size to the patch embeddings.

    With the usual 0.02 the model learns positions slowly.
    """
    torch.nn.init.normal_(model.vision_model.embeddings.position_embedding)
