"""Batches of BLIP-2 and InstructBLIP, and their loss by transformers' own classes, one answer at a time."""

import random

import pytest
import torch
import transformers
from golden_blip2 import DECODER_ONLY, expected_of
from safetensors.torch import load_file
from test_golden_blip2 import CLASSES
from torch.nn.utils.rnn import pad_sequence

ANSWERS = ("labels", "question_index", "answer_weights")
every_decoder_only_family = pytest.mark.parametrize("family", DECODER_ONLY)


def load(golden, family, **settings):
    return CLASSES[family].from_pretrained(golden / family, **settings).eval()


def load_stock(golden, family):
    return getattr(transformers, CLASSES[family].__name__).from_pretrained(golden / family).eval()


def ids_of(expected):
    """Ids that the tests put in the place of words."""
    special = {expected["image_token_id"], expected["end_token_id"], expected["pad_token_id"]}
    return [token for token in range(4, 150) if token not in special]


def make_batch(golden, family, image_index=(0, 2, 0, 1, 0), question_index=(3, 0, 2, 0, 4, 1, 0), seed=0):
    """Prompts of 1 to 8 tokens, answers of 1 to 5 with their end token, weights of 1 to 4 quarters."""
    draw, expected = random.Random(seed), expected_of(golden, family)
    words = ids_of(expected)
    prompts = [torch.tensor([2, *draw.choices(words, k=draw.randint(0, 7))]) for _ in image_index]
    answers = [
        torch.tensor([*draw.choices(words, k=i % 5), expected["end_token_id"]]) for i, _ in enumerate(question_index)
    ]
    batch = {
        "pixel_values": load_file(golden / family / "inputs.safetensors")["pixel_values"],
        "image_index": torch.tensor(image_index),
        "input_ids": pad_sequence(prompts, True, expected["pad_token_id"]),
        "attention_mask": pad_sequence([torch.ones_like(prompt) for prompt in prompts], True),
        "labels": pad_sequence(answers, True, -100),
        "question_index": torch.tensor(question_index),
        "answer_weights": torch.tensor([draw.randint(1, 4) / 4 for _ in answers]),
    }
    if family.startswith("instructblip"):
        texts = [torch.tensor(draw.choices(range(4, 130), k=draw.randint(1, 6))) for _ in image_index]
        batch["qformer_input_ids"] = pad_sequence(texts, True)
        batch["qformer_attention_mask"] = pad_sequence([torch.ones_like(text) for text in texts], True)
    return batch


def stock_row(model, batch, question, answer):
    """The inputs of transformers' class for one question and one answer."""
    prompt = batch["input_ids"][question, batch["attention_mask"][question].bool()]
    labels = batch["labels"][answer, batch["labels"][answer] != -100]
    ids = torch.cat([torch.full((model.config.num_query_tokens,), model.config.image_token_index), prompt])
    if model.config.use_decoder_only_language_model:
        labels = torch.cat([torch.full_like(ids, -100), labels])
        ids = torch.cat([ids, labels[len(ids) :]])
    row = {"pixel_values": batch["pixel_values"][batch["image_index"][question]], "input_ids": ids, "labels": labels}
    if "qformer_input_ids" in batch:
        row["qformer_input_ids"] = batch["qformer_input_ids"][
            question, batch["qformer_attention_mask"][question].bool()
        ]
    return row


def stock_batch(model, batch, left=False):
    """Rows of stock_row, one for each question, padded to one length."""
    rows = [stock_row(model, batch, question, question) for question in range(len(batch["input_ids"]))]
    side = {"padding_side": "left"} if left else {}
    masks = [torch.ones_like(row["input_ids"]) for row in rows]
    return {
        "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
        "input_ids": pad_sequence([row["input_ids"] for row in rows], True, 1, **side),
        "attention_mask": pad_sequence(masks, True, 0, **side),
        "labels": pad_sequence([row["labels"] for row in rows], True, -100, **side),
    } | {name: batch[name] for name in ("qformer_input_ids", "qformer_attention_mask") if name in batch}


def reference_loss(stock, batch):
    """The weighted mean over one call of transformers' class for each answer."""
    total = items = 0
    for answer, question in enumerate(batch["question_index"].tolist()):
        row = stock_row(stock, batch, question, answer)
        weight = batch["answer_weights"][answer] * (row["labels"] != -100).sum()
        total = total + weight * stock(**{name: values[None] for name, values in row.items()}).loss
        items = items + weight
    return total / items


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(found, wanted):
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        # float32 sums in another order; the key's third of a bias is zero apart from rounding
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-6, name


def aligned_batch(golden, family, seed=0):
    return make_batch(golden, family, (0, 1, 2, 1), (0, 1, 2, 3), seed)


def end_of(golden, family):
    expected = expected_of(golden, family)
    return {"eos_token_id": expected["end_token_id"], "pad_token_id": expected["pad_token_id"]}


def cut(ids, end):
    """Rows up to and with the end token."""
    return [row[: row.index(end) + 1] if end in row else row for row in ids.tolist()]


def prompts_of(batch):
    return {name: values for name, values in batch.items() if name not in ANSWERS}
