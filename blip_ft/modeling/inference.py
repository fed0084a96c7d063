"""Batches in, strings out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import BlipProcessor, PreTrainedTokenizerBase

from blip_ft.data.images import longest_side, open_image, resize_to_uint8
from blip_ft.data.texts import decode_texts, encode_labels, encode_prompt, encode_texts


def encode_questions(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode the images of a batch, then its questions.

    Args:
        batch: on the model's device; pixel_values (num_images, 3, height, width), or image_states
            (num_images, patches, width) if the images are encoded already; input_ids and attention_mask
            (num_questions, question_length); image_index (num_questions,), the image of each question.
    Returns: what answer() and rank() read: question_states (num_questions, question_length, width) and
        attention_mask.
    """
    image_states = batch.get("image_states")
    if image_states is None:
        image_states = model.encode_images(batch["pixel_values"]).last_hidden_state
    mask = batch["attention_mask"]
    return model.encode_pairs(image_states, batch["input_ids"], mask, batch["image_index"]), mask


def answer(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    question_states: torch.Tensor,
    attention_mask: torch.Tensor,
    max_length: int = 20,
    num_beams: int = 3,
) -> tuple[list[str], list[float]]:
    """Generate an answer to each question, and its probability; see sequence_probabilities.

    Args:
        question_states, attention_mask: from encode_questions.
        max_length: number of tokens of an answer, [DEC] and [SEP] included.
    """
    ids = model.generate_answers(
        question_states, attention_mask, max_length=max_length, num_beams=num_beams, do_sample=False
    )
    return decode_texts(ids, tokenizer), sequence_probabilities(model, ids, 1, question_states, attention_mask)


@torch.no_grad()
def sequence_probabilities(
    model: torch.nn.Module,
    ids: torch.Tensor,
    start: int,
    states: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
) -> list[float]:
    """0 to 1, the product of the token probabilities of each row, from column `start` to the first [SEP] inclusive.

    The model reads the finished row once more. So the number does not depend on the number of beams, label smoothing
    or the constraints of generation (min_length, repetition). If a row was cut before its [SEP], all its tokens count.

    Args:
        ids: (rows, length), [DEC] first, as generate returns them.
        states, attention_mask: (rows, encoder_length, ...), what the decoder reads.
    """
    hidden = model.text_decoder.bert(
        input_ids=ids[:, :-1],
        encoder_hidden_states=states,
        encoder_attention_mask=attention_mask,
        is_decoder=True,
    ).last_hidden_state
    targets = ids[:, start:]
    logs = model.text_decoder.cls(hidden[:, start - 1 :]).float().log_softmax(-1)
    logs = logs.gather(-1, targets[..., None]).squeeze(-1)  # (rows, length - start)
    is_end = (targets == model.config.text_config.sep_token_id).long()
    return logs.masked_fill(is_end.cumsum(1) > is_end, 0).sum(1).exp().tolist()


def rank(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    question_states: torch.Tensor,
    attention_mask: torch.Tensor,
    candidates: Sequence[str],
    k: int = 128,
    max_tokens: int = 30,
) -> list[str]:
    """The most probable candidate for each question, chosen as rank_answer of the original does."""
    ids = encode_labels(candidates, tokenizer, max_tokens).to(question_states.device)
    _, order = model.rank_answers(question_states, attention_mask, ids, k)
    return [candidates[best] for best in order[:, 0].tolist()]


def caption(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    pixel_values: torch.Tensor,
    prompt: str = "a picture of ",
    max_length: int = 20,
    num_beams: int = 3,
    min_length: int = 5,
    repetition_penalty: float = 1.0,
) -> tuple[list[str], list[float]]:
    """Generate a caption for each image. Captions and their probabilities do not include the prompt.

    Args:
        pixel_values: (num_images, 3, height, width).
        max_length, min_length: number of tokens, prompt and [SEP] included.
    """
    start = torch.tensor([encode_prompt(prompt, tokenizer)] * len(pixel_values), device=pixel_values.device)
    image_states = model.encode_images(pixel_values).last_hidden_state
    ids = model.generate_captions(
        image_states,
        start,
        max_length=max_length,
        min_length=min_length,
        num_beams=num_beams,
        repetition_penalty=repetition_penalty,
        do_sample=False,
    )
    prompt_length = start.shape[1]
    return decode_texts(ids[:, prompt_length:], tokenizer), sequence_probabilities(
        model, ids, prompt_length, image_states
    )


def rank_pairs(
    collect: Callable[[Callable, str], list[dict[str, Any] | None]],
    owner: np.ndarray,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    k: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Score each pair of image and text: by cosine, and the best pairs again by the matching head.

    Each image is encoded twice, once for each ranking, because keeping its patches would take too much memory. If an
    image cannot be read, its scores with all texts and the scores of its texts with all images are -inf.

    Args:
        collect: calls a function of model, batch (pixel_values) and positions for all images; see trainer.Collect.
        owner: (num_texts,), the position of the image of each text, in ascending order.
        input_ids, attention_mask: (num_texts, length).
        k: number of texts per image, and of images per text, that the matching head ranks again.
    Returns: three arrays (num_images, num_texts): cosines; cosine + matching logit for the k best texts of each image;
        the same for the k best images of each text. The last two are -inf elsewhere.
    Source: BLIP train_retrieval.py evaluation.
    """

    def embed(model: torch.nn.Module, batch: dict[str, torch.Tensor], positions: list[int]) -> list[dict]:
        images = model.project_images(model.encode_images(batch["pixel_values"]).last_hidden_state)
        own = np.flatnonzero(np.isin(owner, positions))
        tokens = {"input_ids": input_ids[own], "attention_mask": attention_mask[own]}
        states = model.text_encoder(**{name: tensor.to(model.device) for name, tensor in tokens.items()})
        texts = model.project_texts(states.last_hidden_state).float().cpu().numpy()
        return [
            {"image": image, "texts": texts[owner[own] == position]}
            for image, position in zip(images.float().cpu().numpy(), positions, strict=True)
        ]

    features = collect(embed, "Encoding")
    if not any(features):
        raise ValueError("None of the images to evaluate on can be read. Check that the files exist.")
    width = next(result for result in features if result)["image"].shape
    nothing = np.full(width, np.nan, np.float32)
    texts = np.concatenate(
        [result["texts"] if result else [nothing] * (owner == row).sum() for row, result in enumerate(features)]
    )
    cosines = np.stack([result["image"] if result else nothing for result in features]) @ texts.T
    cosines[np.isnan(cosines)] = -np.inf
    of_images, of_texts = _top_k(cosines, k), _top_k(cosines.T, k).T
    chosen = of_images | of_texts

    def match(model: torch.nn.Module, batch: dict[str, torch.Tensor], positions: list[int]) -> list[dict]:
        image_states = model.encode_images(batch["pixel_values"]).last_hidden_state
        return [
            {"logits": _match(model, image_states[row : row + 1], input_ids[kept], attention_mask[kept])}
            for row, kept in enumerate(chosen[positions])
        ]

    matched = np.full_like(cosines, -np.inf)
    for row, result in enumerate(collect(match, "Matching")):
        if result:
            matched[row, chosen[row]] = cosines[row, chosen[row]] + result["logits"]
    return cosines, np.where(of_images, matched, -np.inf), np.where(of_texts, matched, -np.inf)


def embed_texts(
    model: torch.nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor, texts_at_once: int = 256
) -> torch.Tensor:
    """(num_texts, width), normalized, on the model's device; the dot product with image features is the cosine."""
    parts = [
        model.project_texts(
            model.text_encoder(input_ids=ids.to(model.device), attention_mask=mask.to(model.device)).last_hidden_state
        )
        for ids, mask in zip(input_ids.split(texts_at_once), attention_mask.split(texts_at_once), strict=True)
    ]
    return torch.cat(parts)


def rank_texts(
    model: torch.nn.Module,
    pixel_values: torch.Tensor,
    text_features: torch.Tensor,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    k: int,
) -> list[list[tuple[int, float]]]:
    """For each image, the k texts with the largest cosine as (position, cosine + matching logit), best first.

    Args:
        pixel_values: (num_images, 3, height, width).
        text_features: (num_texts, width), from embed_texts. input_ids, attention_mask: (num_texts, length).
    """
    image_states = model.encode_images(pixel_values).last_hidden_state
    cosines = (model.project_images(image_states) @ text_features.T).float().cpu().numpy()
    ranked = []
    for row, kept in enumerate(_top_k(cosines, k)):
        kept = np.flatnonzero(kept)
        scores = cosines[row, kept] + _match(model, image_states[row : row + 1], input_ids[kept], attention_mask[kept])
        order = np.argsort(-scores, kind="stable")
        ranked.append(list(zip(kept[order].tolist(), scores[order].tolist(), strict=True)))
    return ranked


def _match(
    model: torch.nn.Module,
    image_states: torch.Tensor,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    texts_at_once: int = 256,
) -> np.ndarray:
    """(num_texts,) matching logits of one image, given its states (1, patches, width), and many texts."""
    parts = []
    for ids, mask in zip(input_ids.split(texts_at_once), attention_mask.split(texts_at_once), strict=True):
        states = model.encode_pairs(image_states, ids.to(model.device), mask.to(model.device))
        parts.append(model.itm_head(states[:, 0])[:, 1].float().cpu().numpy())
    return np.concatenate(parts)


def _top_k(similarity: np.ndarray, k: int, rows_at_once: int = 256) -> np.ndarray:
    """(rows, columns), True at the k largest values of each row."""
    kept = np.zeros(similarity.shape, bool)
    for start in range(0, len(similarity), rows_at_once):
        chunk = -similarity[start : start + rows_at_once]
        best = np.argpartition(chunk, min(k, chunk.shape[1]) - 1, axis=1)[:, :k]
        np.put_along_axis(kept[start : start + rows_at_once], best, True, axis=1)
    return kept


def answer_questions(
    model: torch.nn.Module,
    processor: BlipProcessor,
    images: Sequence[Any],
    questions: Sequence[str],
    max_length: int = 20,
    num_beams: int = 3,
    images_at_once: int = 16,
    questions_at_once: int = 64,
) -> list[str]:
    """An answer to each pair of image and question, in their order; each distinct image is encoded once.

    Args:
        images: paths, bytes or PIL images, one per question; equal paths or bytes, or the same object, are one image.
        images_at_once, questions_at_once: limit the memory; the answers do not depend on them.
    """
    # PIL images cannot be hashed
    keys = [image if isinstance(image, (str, bytes, Path)) else id(image) for image in images]
    asked: dict[Any, list[int]] = {}
    for position, key in enumerate(keys):
        asked.setdefault(key, []).append(position)
    longest, size = model.config.text_config.max_position_embeddings, longest_side(processor.image_processor)
    answers = [""] * len(questions)
    groups = list(asked.values())
    for start in range(0, len(groups), images_at_once):
        chunk = groups[start : start + images_at_once]
        pixels = resize_to_uint8([open_image(images[group[0]], size) for group in chunk], processor.image_processor)
        pairs = [(row, position) for row, group in enumerate(chunk) for position in group]
        with torch.no_grad():
            states = model.encode_images(pixels.to(model.device)).last_hidden_state
            for first in range(0, len(pairs), questions_at_once):
                rows, positions = zip(*pairs[first : first + questions_at_once], strict=True)
                batch = encode_texts([questions[p] for p in positions], processor.tokenizer, longest)
                batch["image_index"] = torch.tensor(rows)
                batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
                encoded = encode_questions(model, {"image_states": states, **batch})
                # answer() would also compute probabilities, which takes one more pass of the decoder
                ids = model.generate_answers(*encoded, max_length=max_length, num_beams=num_beams, do_sample=False)
                for position, text in zip(positions, decode_texts(ids, processor.tokenizer), strict=True):
                    answers[position] = text
    return answers
