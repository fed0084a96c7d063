"""Small BLIP-2 and InstructBLIP with new weights, sized for the demo data: checkpoints for slow tests.

The package builds no such models, since users fine-tune pretrained ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BertTokenizer,
    Blip2Config,
    Blip2Processor,
    BlipImageProcessor,
    InstructBlipConfig,
    InstructBlipProcessor,
    PreTrainedTokenizerFast,
)

from blip_ft.data.demo import IMAGE_SIZE, load_demo
from blip_ft.modeling.blip2 import Blip2ForConditionalGeneration, InstructBlipForConditionalGeneration
from blip_ft.modeling.small_blip import build_demo_processor

WIDTH, HEADS, MAX_TOKENS, TEXT_LAYERS = 128, 4, 160, 2
QUERIES = 4  # one for each cell of the demo's images
# with 0.02 such small models learn from the texts alone for a long time, see build_small_blip
INITIALIZER_RANGE = 0.08
PROMPTS = ("Question: Short answer:", "Question: Short Answer:", "a photo of", "A short image caption.")
# the background of the demo's images becomes 0
MEAN, STD = [20 / 255, 20 / 255, 30 / 255], [0.27] * 3
SPECIAL = ("<unk>", "<pad>", "</s>", "<image>")


def save_small_blip2(family: str, folder: Path) -> None:
    """Save a model with new weights and its processor. family: "blip-2" with OPT, or "instructblip" with LLaMA."""
    torch.manual_seed(0)
    model, processor = (build_blip2 if family == "blip-2" else build_instructblip)()
    with torch.no_grad():
        _let_queries_read_cells(model)
        # closer in size to what the first layer adds to them
        model.get_input_embeddings().weight.mul_(4)
        if family == "blip-2":
            model.language_model.model.decoder.embed_positions.weight.mul_(4)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def _let_queries_read_cells(model: Blip2ForConditionalGeneration | InstructBlipForConditionalGeneration) -> None:
    """Let each query read one cell of the image from the start, as a pretrained query reads some part of it.

    Random queries blend the cells: after 750 steps, such a model knew the colors in an image, but not of which shape.
    """
    positions = model.vision_model.embeddings.position_embedding
    positions.normal_(std=16)  # larger than the content of a cell, so that queries find cells by their position
    model.query_tokens.copy_(positions[:, 1:])
    attention = model.qformer.encoder.layer[0].crossattention.attention
    attention.query.weight.copy_(attention.key.weight)
    attention.value.weight.mul_(4)  # a query forwards more of its cell than of itself


def build_blip2() -> tuple[Blip2ForConditionalGeneration, Blip2Processor]:
    tokenizer = train_tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel())
    config = Blip2Config(
        vision_config=vision_config(),
        qformer_config=qformer_config(),
        text_config={
            "model_type": "opt",
            "hidden_size": WIDTH,
            "word_embed_proj_dim": WIDTH,
            "ffn_dim": 4 * WIDTH,
            "dropout": 0.0,
            "init_std": INITIALIZER_RANGE,
            **text_config(tokenizer, end="\u010a"),  # "\n" in GPT-2's alphabet of bytes
        },
        num_query_tokens=QUERIES,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        initializer_range=INITIALIZER_RANGE,
    )
    return Blip2ForConditionalGeneration(config), Blip2Processor(image_processor(), tokenizer, QUERIES)


def build_instructblip() -> tuple[InstructBlipForConditionalGeneration, InstructBlipProcessor]:
    tokenizer = train_tokenizer(pre_tokenizers.Metaspace(), decoders.Metaspace(), truncation_side="left")
    qformer_tokenizer: BertTokenizer = build_demo_processor().tokenizer
    config = InstructBlipConfig(
        vision_config=vision_config(),
        qformer_config={
            **qformer_config(),
            "vocab_size": len(qformer_tokenizer),
            "pad_token_id": qformer_tokenizer.pad_token_id,
        },
        text_config={
            "model_type": "llama",
            "hidden_size": WIDTH,
            "intermediate_size": 3 * WIDTH,
            "num_key_value_heads": HEADS,
            "initializer_range": INITIALIZER_RANGE,
            "tie_word_embeddings": False,
            **text_config(tokenizer, end="</s>"),
        },
        num_query_tokens=QUERIES,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        initializer_range=INITIALIZER_RANGE,
    )
    model = InstructBlipForConditionalGeneration(config)
    return model, InstructBlipProcessor(image_processor(), tokenizer, qformer_tokenizer, QUERIES)


def vision_config() -> dict:
    """Patches of 32 pixels: one per cell of the demo's images."""
    return {
        "image_size": IMAGE_SIZE,
        "patch_size": IMAGE_SIZE // 2,
        "image_mean": MEAN,
        "image_std": STD,
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": 3,
        "num_attention_heads": HEADS,
        "initializer_range": INITIALIZER_RANGE,
    }


def qformer_config() -> dict:
    return {
        "hidden_size": WIDTH,
        "encoder_hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "cross_attention_frequency": 1,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": INITIALIZER_RANGE,
    }


def text_config(tokenizer: PreTrainedTokenizerFast, end: str) -> dict:
    return {
        "vocab_size": len(tokenizer),
        "num_hidden_layers": TEXT_LAYERS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": MAX_TOKENS,
        "bos_token_id": tokenizer.bos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.convert_tokens_to_ids(end),
    }


def image_processor() -> BlipImageProcessor:
    return BlipImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}, image_mean=MEAN, image_std=STD)


def train_tokenizer(pre_tokenizer, decoder, **settings) -> PreTrainedTokenizerFast:
    """Byte pairs in which each word of the demo becomes one token. Texts begin with `</s>`, as with OPT and Vicuna."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoder
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts(), trainer)
    end = tokenizer.token_to_id("</s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", end)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="</s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        extra_special_tokens=["<image>"],
        **settings,
    )


def texts() -> Iterable[str]:
    yield from PROMPTS
    for row in load_demo(num_train=200, num_eval=1)["train"]:
        yield from (f" {row['question']}", f" {row['answers'][0]}", f" {row['captions'][0]}")
