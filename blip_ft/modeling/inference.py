"""Batches in, strings out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    ProcessorMixin,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from blip_ft.arguments.families import family_of
from blip_ft.data.images import longest_side, open_image, resize_to_uint8
from blip_ft.data.text_formats import Texts, texts_of_checkpoint
from blip_ft.modeling.checkpoint_files import longest_text

# what encode_questions of a model reads
READ = (
    *("pixel_values", "image_states", "query_states", "image_index"),
    *("input_ids", "attention_mask", "qformer_input_ids", "qformer_attention_mask"),
)


def encode_questions(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> Any:
    """Encode the images of a batch, then its questions.

    Args:
        batch: on the model's device; pixel_values (num_images, 3, height, width), or image_states
            (num_images, patches, width) if the images are encoded already; input_ids and attention_mask
            (num_questions, question_length); image_index (num_questions,), the image of each question.
    Returns: what answer() and rank() read.
    """
    return model.encode_questions(**{name: batch[name] for name in READ if name in batch})


def answer(
    model: torch.nn.Module, texts: Texts, read: Any, generation: dict[str, Any]
) -> tuple[list[str], list[float]]:
    """Generate an answer to each question, and its probability: the product of the probabilities of its tokens.

    Args:
        read: from encode_questions.
        generation: from texts.generation.
    """
    ids = model.generate_answers(read, **generation)
    return texts.decode(ids), model.sequence_probabilities(read, ids, texts.end_token_id).tolist()


def rank(
    model: torch.nn.Module, texts: Texts, read: Any, candidates: Sequence[str], k: int = 128, max_tokens: int = 30
) -> list[str]:
    """The most probable candidate for each question, chosen as rank_answer of the original does."""
    ids = texts.encode_answers(candidates, max_tokens).to(model.device)
    _, order = model.rank_answers(read, ids, k)
    return [candidates[best] for best in order[:, 0].tolist()]


def caption(
    model: torch.nn.Module, texts: Texts, pixel_values: torch.Tensor, generation: dict[str, Any]
) -> tuple[list[str], list[float]]:
    """Generate a caption for each image. Captions and their probabilities do not include the prompt.

    Args:
        pixel_values: (num_images, 3, height, width).
        generation: from texts.generation.
    """
    return answer(model, texts, _encode_caption_prompts(model, texts, "pixel_values", pixel_values), generation)


def _encode_caption_prompts(model: torch.nn.Module, texts: Texts, name: str, images: torch.Tensor) -> Any:
    """What answer() reads to write a caption for each image.

    Args:
        name: of the images in a batch, as in READ.
    """
    prompts = texts.encode_caption_prompts(len(images))
    return encode_questions(model, {name: images, **{key: ids.to(images.device) for key, ids in prompts.items()}})


class SeededChoice(LogitsProcessor):
    """Draw the next token of each row, and rule out all others, so that greedy search takes it.

    With do_sample, generate draws for all rows of a batch from one generator, so that a text depends on the others.

    Args:
        draws: (rows, steps), 0 to 1, 1 excluded: one for each token to draw.
    """

    def __init__(self, draws: torch.Tensor) -> None:
        self.draws, self.step = draws, 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        probabilities, tokens = scores.softmax(-1).sort(dim=-1, descending=True, stable=True)
        sums = probabilities.cumsum(-1)
        # below the last sum, even if rounding makes the product equal to it: no token of probability 0 is drawn
        limit = (self.draws[:, self.step, None] * sums[:, -1:]).minimum(sums[:, -1:].nextafter(sums.new_zeros(())))
        chosen = tokens.gather(1, (sums <= limit).sum(1, keepdim=True))
        self.step += 1
        return torch.full_like(scores, -torch.inf).scatter(1, chosen, 0.0)


def sampling(seed: int, image_ids: Sequence[str], number: int, steps: int, device: torch.device) -> LogitsProcessorList:
    """For generate with do_sample=False: `number` rows for each image, drawn by seed, image_id and number alone.

    generate applies it after its own repetition penalty and minimum length.

    Args:
        steps: the largest number of tokens that are generated.
    Source: BLIP models/blip.py BLIP_Decoder.generate with sample=True: top_p 0.9, and top_k 50, which was the default
        of transformers then.
    """
    keys = [f"{seed} {copy} {image_id}" for image_id in image_ids for copy in range(number)]
    digests = [hashlib.sha256(key.encode()).digest() for key in keys]
    draws = [np.random.default_rng(int.from_bytes(digest, "big")).random(steps, dtype=np.float32) for digest in digests]
    choice = SeededChoice(torch.from_numpy(np.stack(draws)).to(device))
    return LogitsProcessorList([TopKLogitsWarper(50), TopPLogitsWarper(0.9), choice])


def caption_several(
    model: torch.nn.Module, texts: Texts, pixel_values: torch.Tensor, generation: dict[str, Any], number: int
) -> list[list[str]]:
    """Generate `number` captions for each image, which is encoded once.

    Args:
        pixel_values: (num_images, 3, height, width).
        generation: from texts.generation.
    """
    image_states = model.encode_images(pixel_values).last_hidden_state.repeat_interleave(number, 0)
    read = _encode_caption_prompts(model, texts, "image_states", image_states)
    captions = texts.decode(model.generate_answers(read, **generation))
    return [captions[start : start + number] for start in range(0, len(captions), number)]


def match_texts(
    model: torch.nn.Module,
    pixel_values: torch.Tensor,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    image_index: torch.Tensor,
    texts_at_once: int = 256,
) -> list[float]:
    """The probability, 0 to 1, that each text describes its image, by the matching head.

    Args:
        pixel_values: (num_images, 3, height, width). Each image is encoded once for all its texts.
        input_ids, attention_mask: (num_texts, length).
        image_index: (num_texts,), the image of each text.
        texts_at_once: limits the memory.
    Source: BLIP models/blip_itm.py, match_head "itm".
    """
    image_states = model.encode_images(pixel_values).last_hidden_state
    scores: list[float] = []
    for part in zip(*(tensor.split(texts_at_once) for tensor in (input_ids, attention_mask, image_index)), strict=True):
        ids, mask, index = (tensor.to(model.device) for tensor in part)
        states = model.encode_pairs(image_states, ids, mask, index)
        scores += model.itm_head(states[:, 0]).float().softmax(-1)[:, 1].tolist()
    return scores


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
    processor: ProcessorMixin,
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
    family = family_of(model.config)
    texts = texts_of_checkpoint(processor, model.config, "vqa")
    generation = texts.generation(max_length, num_beams)
    # BLIP's question and answer are read by two networks
    longest = longest_text(model.config) - (max_length if family.reads_prompts else 0)
    size = longest_side(processor.image_processor)
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
                batch = texts.encode_questions([questions[p] for p in positions], longest)
                batch["image_index"] = torch.tensor(rows)
                batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
                read = encode_questions(model, {"image_states": states, **batch})
                # answer() would also compute probabilities, which takes one more pass of the decoder
                ids = model.generate_answers(read, **generation)
                for position, text in zip(positions, texts.decode(ids), strict=True):
                    answers[position] = text
    return answers
