"""A small BLIP with new weights, for tests, lessons and the demo."""

from __future__ import annotations

import string
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import BertTokenizer, BlipConfig, BlipImageProcessor, BlipProcessor, PreTrainedModel

from blip_ft.data.demo import COLORS, IMAGE_SIZE, NUMBERS, PLACES, QUESTIONS, SHAPES
from blip_ft.modeling.blip import TASKS
from blip_ft.modeling.checkpoint_files import fit_processor


def build_small_blip(
    task: str,
    texts: Iterable[str],
    image_size: int = 64,
    patch_size: int = 8,
    width: int = 128,
    num_heads: int = 4,
    vision_layers: int = 3,
    text_layers: int = 2,
    max_tokens: int = 64,
    initializer_range: float = 0.08,
) -> tuple[PreTrainedModel, BlipProcessor]:
    """Build a BLIP of about 2 M parameters with new weights, and its processor. save_model writes them as a checkpoint.

    It suits small, plain images and few words: to test a data set, to teach, or to work without the Hub. It is not
    pretrained, so for photographs and free text start from a checkpoint on the Hub. `demo` is such a model with patches
    of 32 pixels, which suit the demo's images only: patches must not be larger than the things that are asked about.

    Args:
        task: a key of MODEL_REGISTRY["blip"].
        texts: questions, answers and captions of the training data. Their words become tokens; other words are spelled.
        image_size, patch_size: side length in pixels. image_size must be a multiple of patch_size.
        width, num_heads: size of the hidden states and number of attention heads, for both images and texts.
        max_tokens: length of the longest text. max_question_tokens and similar settings must not exceed it.
        initializer_range: standard deviation of the new weights. With the usual 0.02, a model this small learns from
            the texts alone for a long time. On data where 67 % can be answered without the images, it reached 65.5 and
            71.8 % after 300 steps (two seeds), and 79.3 and 84.4 % with 0.08.
    Raises: ValueError if the task is unknown or the sizes do not fit together.
    """
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, found {task!r}.")
    processor = build_small_processor(texts, image_size)
    config = build_small_config(
        *(processor, patch_size, width, num_heads, vision_layers, text_layers, max_tokens, initializer_range)
    )
    model = build_new_model(task, config)
    fit_processor(processor, model.config, "build_small_blip")
    return model.eval(), processor


def build_new_model(task: str, config: BlipConfig) -> PreTrainedModel:
    """Build a small model with new weights from its config.

    The position embeddings have a standard deviation of 1, similar in size to the patch embeddings: with the usual 0.02
    the model learns positions slowly.
    """
    model = TASKS[task](config)
    torch.nn.init.normal_(model.vision_model.embeddings.position_embedding)
    return model


def build_demo_processor() -> BlipProcessor:
    """A processor for images of 64 x 64 pixels.

    The tokenizer knows the demo's words and spells any other English text with single characters.
    """
    words = {word for sentence in (*QUESTIONS, "a picture of and") for word in sentence.split() if word.isalpha()}
    words |= {*COLORS, *SHAPES, *NUMBERS, *(word for place in PLACES for word in place.split()), "yes", "no"}
    return build_small_processor(words, IMAGE_SIZE)


def build_demo_config() -> BlipConfig:
    """A BLIP with 2.1 M parameters and four patches, one per cell of the demo's images."""
    return build_small_config(build_demo_processor(), patch_size=IMAGE_SIZE // 2)


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
