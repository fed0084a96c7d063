"""Code shared by BLIP-2 and InstructBLIP: reading images and prompts, the loss of answers, and generation."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.blip_2.modeling_blip_2 import Blip2ForConditionalGenerationModelOutput
from transformers.utils import can_return_tuple

from blip_ft.data.texts import IGNORED
from blip_ft.modeling.blip2.labels import count_tokens, require_answers
from blip_ft.modeling.blip2.packing import pack
from blip_ft.modeling.blip2.untie import untie_head
from blip_ft.modeling.vision import ImageEncoder


@dataclass
class Prompts:
    """What the language model reads before an answer; made by encode_questions.

    Args:
        queries: (num_prefixes, queries, width) image prefixes, in the width of the language model.
        prefix_index: (num_questions,), the prefix of each question.
        input_ids, attention_mask: (num_questions, prompt_length).
        encoder_states, encoder_mask: (num_questions, queries + prompt_length, ...), of an encoder-decoder model.
    """

    queries: torch.Tensor
    prefix_index: torch.Tensor
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    encoder_states: torch.Tensor | None = None
    encoder_mask: torch.Tensor | None = None


class QFormerModel(ImageEncoder):
    """Mixin of BLIP-2 and InstructBLIP. It comes before the class of transformers in their bases."""

    contrastive = None
    # the Q-Former reads the prompt, so its outputs belong to a question, not to an image
    qformer_reads_prompts = False

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        untie_head(self)

    def post_init(self) -> None:
        super().post_init()
        # transformers 5.23 adds the list of the vision model, with attention modules and classes that are not there
        self._no_split_modules = {*type(self)._no_split_modules, *self.language_model._no_split_modules}

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_index: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        question_index: torch.Tensor | None = None,
        answer_weights: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | float | None = None,
        **inputs: Any,
    ) -> Blip2ForConditionalGenerationModelOutput:
        """Compute the loss: weighted mean cross-entropy over the tokens of all answers, in float32.

        A batch as in transformers also works: input_ids with `<image>` placeholders, and labels.

        Args:
            pixel_values: (num_images, 3, height, width), float as the processor returns it, or uint8.
            input_ids, attention_mask: (num_questions, prompt_length), prompts without answers and without `<image>`.
            image_index: (num_questions,), the image of each prompt. None: one prompt per image.
            labels: (num_answers, answer_length), answers with their end token; -100 on padding.
            question_index: (num_answers,), the prompt of each answer. None: one answer per prompt.
            answer_weights: (num_answers,). None: each weight is 1.
            answer_shares: (num_answers,), the weights by which tokens are counted. Default: answer_weights. With the
                weights of whole rows in answer_weights only, a row of weight 0.2 has a fifth of its gradient, even
                where all rows of a step have this weight.
            image_states: (num_images, patches + 1, width), from encode_images, instead of pixel_values.
            query_states: (num_images, queries, width), from encode_queries, instead of pixel_values. BLIP-2 only.
            qformer_input_ids, qformer_attention_mask: (num_questions, length), the prompts for InstructBLIP's Q-Former.
            num_items_in_batch: sum over answers of share x tokens, over accumulation and processes. Default: those of
                this batch.
        Raises: ValueError if labels repeat the prompt, or a row has another number of placeholders than queries.
        Source: LAVIS models/blip2_models/blip2_opt.py forward, for one answer per question. With several, the loss is
            the expectation of LAVIS's random choice of an answer (datasets/coco_vqa_datasets.py).
        """
        inputs.pop("readable", None)  # the collator adds it for evaluation
        shares = inputs.pop("answer_shares", answer_weights)
        inputs |= {"pixel_values": pixel_values, "input_ids": input_ids, "attention_mask": attention_mask}
        has_placeholders = self._has_placeholders(input_ids)
        require_answers(input_ids, labels, has_placeholders)
        if has_placeholders:
            ours = {"image_index": image_index, "question_index": question_index, "answer_weights": answer_weights}
            return self._forward_with_placeholders(labels, num_items_in_batch, **ours, **inputs)
        read = self.encode_questions(**inputs, image_index=image_index)
        losses = self.answer_losses(read, labels, question_index)
        if answer_weights is not None:
            losses = losses * answer_weights
        if num_items_in_batch is None:
            num_items_in_batch = count_tokens(labels, shares)
        return Blip2ForConditionalGenerationModelOutput(loss=losses.sum() / num_items_in_batch)

    @staticmethod
    def loss_items(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """(num_questions,) weighted number of tokens of each question's answers, by whose sum the loss is divided."""
        tokens = (batch["labels"] != IGNORED).sum(1) * batch.get("answer_shares", batch["answer_weights"])
        return tokens.new_zeros(len(batch["input_ids"])).index_add(0, batch["question_index"], tokens)

    def encode_questions(
        self,
        pixel_values: torch.Tensor | None = None,
        image_states: torch.Tensor | None = None,
        query_states: torch.Tensor | None = None,
        *,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_index: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        **qformer: torch.Tensor,
    ) -> Prompts:
        """Read images and prompts; arguments as in forward. answer_losses and generate_answers use the result."""
        if sum(given is not None for given in (pixel_values, image_states, query_states)) != 1:
            raise ValueError("The model needs exactly one of pixel_values, image_states and query_states.")
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        input_ids, attention_mask = _pad_right(input_ids, attention_mask)
        if query_states is None:
            if image_states is None:
                with _constant(self.vision_model):
                    image_states = self.encode_images(pixel_values, interpolate_pos_encoding).last_hidden_state
            index = self._require_index(image_index, len(image_states), len(input_ids))
            query_states = self.encode_queries(image_states, index, **qformer)
        elif self.qformer_reads_prompts:
            raise ValueError("query_states do not exist for InstructBLIP: its Q-Former reads each question.")
        else:
            index = self._require_index(image_index, len(query_states), len(input_ids))
        if self.qformer_reads_prompts:
            index = torch.arange(len(input_ids), device=input_ids.device)
        queries = self.language_projection(_as_weight(query_states, self.language_projection.weight))
        read = Prompts(queries, index, input_ids, attention_mask)
        if self.config.use_decoder_only_language_model:
            return read
        embeds = self._embed(queries[index], input_ids)
        read.encoder_mask = torch.cat([attention_mask.new_ones(queries[index].shape[:2]), attention_mask], 1)
        read.encoder_states = self.language_model.get_encoder()(
            inputs_embeds=embeds, attention_mask=read.encoder_mask
        ).last_hidden_state
        return read

    def encode_queries(self, image_states: torch.Tensor, image_index: torch.Tensor, **qformer: Any) -> torch.Tensor:
        """Run the Q-Former on image_states (num_images, patches + 1, width).

        Returns: (num_images, queries, width) for BLIP-2; (num_questions, queries, width) for InstructBLIP, whose
            Q-Former also reads the prompts. image_index: (num_questions,).
        """
        # query_tokens and word embeddings can be in float32 while the rest of the Q-Former is in float16
        key = self.qformer.encoder.layer[0].crossattention.attention.key
        image_states = _as_weight(image_states, key.weight)
        with _constant(self.qformer, self.query_tokens, image_states):
            if self.qformer_reads_prompts:
                image_states = image_states[image_index]
            query_tokens = self.query_tokens.expand(len(image_states), -1, -1)
            states = self.qformer(
                query_embeds=query_tokens,
                encoder_hidden_states=image_states,
                **self._qformer_prompts(query_tokens, **qformer),
            ).last_hidden_state
        return states[:, : query_tokens.shape[1]]

    def _qformer_prompts(self, query_tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        return {}

    def answer_losses(
        self, read: Prompts, labels: torch.Tensor, question_index: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Cross-entropy of each answer, summed over its tokens: (num_answers,) float32. Arguments as in forward."""
        if question_index is None and len(labels) != len(read.input_ids):
            raise ValueError(
                f"Found {len(read.input_ids)} questions and {len(labels)} answers: pass question_index, the question "
                "of each answer."
            )
        if question_index is None:
            question_index = torch.arange(len(labels), device=labels.device)
        counted = labels != IGNORED
        states = (
            self._states_of_answers(read, labels, question_index)
            if read.encoder_states is None
            else self._decoder_states(read, labels, question_index)[counted]
        )
        # apply the head only to positions that count: the vocabulary makes it the largest matrix product
        logits = self.language_model.get_output_embeddings()(states)
        # autocast would do this, but DeepSpeed's bf16 mode does not use autocast
        losses = F.cross_entropy(
            logits.to(torch.promote_types(logits.dtype, torch.float32)), labels[counted], reduction="none"
        )
        return losses.new_zeros(labels.shape).masked_scatter(counted, losses).sum(1)

    def _states_of_answers(self, read: Prompts, labels: torch.Tensor, question_index: torch.Tensor) -> torch.Tensor:
        """(num_targets, width) states of a decoder-only model that predict the tokens of the answers."""
        num_queries = read.queries.shape[1]
        packed = pack(
            *(num_queries, read.prefix_index, len(read.queries), read.input_ids, read.attention_mask),
            *(labels, question_index),
            multiple=8 if labels.is_cuda else 1,
        )
        settings = {"attention_mask": packed.mask}
        embeds = self._embed(read.queries, packed.input_ids)
        if packed.mask.dim() == 4:
            implementation = self.language_model.config._attn_implementation
            if implementation not in ("sdpa", "eager"):
                raise ValueError(
                    f"Several questions or answers about one image need attn_implementation sdpa or eager; this model "
                    f"was loaded with {implementation}."
                )
            if implementation == "eager":  # it adds the mask
                lowest = torch.finfo(embeds.dtype).min
                settings["attention_mask"] = torch.zeros_like(packed.mask, dtype=embeds.dtype).masked_fill(
                    ~packed.mask, lowest
                )
            settings["position_ids"] = packed.position_ids
        states = self.language_model.model(inputs_embeds=embeds, use_cache=False, **settings).last_hidden_state
        return states[packed.target_row, packed.target_column]

    def _decoder_states(self, read: Prompts, labels: torch.Tensor, question_index: torch.Tensor) -> torch.Tensor:
        """(num_answers, answer_length, width) states of an encoder-decoder model that predict labels."""
        text = self.config.text_config
        # the start token, then the answers without their last token
        input_ids = labels.masked_fill(labels == IGNORED, text.pad_token_id).roll(1, 1)
        input_ids[:, 0] = text.decoder_start_token_id
        states = self.language_model.get_decoder()(
            input_ids=input_ids,
            encoder_hidden_states=read.encoder_states[question_index],
            encoder_attention_mask=read.encoder_mask[question_index],
            use_cache=False,
        ).last_hidden_state
        # T5 v1.0 ties its head to the embeddings and scales what it reads; Flan-T5 does neither
        return states * self.language_model.model_dim**-0.5 if text.scale_decoder_outputs else states

    def _embed(self, queries: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        """(rows, queries + length, width) of image prefixes (rows, queries, width) and tokens (rows, length)."""
        tokens = self.get_input_embeddings()(input_ids)
        return torch.cat([queries.to(tokens.device, tokens.dtype), tokens], 1)

    @torch.no_grad()
    def generate(
        self,
        pixel_values: torch.Tensor,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_index: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        qformer_input_ids: torch.Tensor | None = None,
        qformer_attention_mask: torch.Tensor | None = None,
        **generate_kwargs: Any,
    ) -> torch.Tensor:
        """Generate one text per prompt. Unlike in transformers, the result has no placeholders and no prompt.

        Args:
            pixel_values: (num_images, 3, height, width).
            input_ids, attention_mask: (num_questions, prompt_length), with `<image>` placeholders or without. None: no
                prompt.
            generate_kwargs: passed to the language model's generate.
        Returns: (num_questions, new_tokens) token ids.
        """
        if input_ids is None:
            text = self.config.text_config
            start = text.bos_token_id if self.config.use_decoder_only_language_model else text.eos_token_id
            input_ids = torch.full((len(pixel_values), 1), start, device=pixel_values.device)
        if self._has_placeholders(input_ids):
            input_ids, attention_mask = self._without_placeholders(input_ids, attention_mask)
        qformer = {"qformer_input_ids": qformer_input_ids, "qformer_attention_mask": qformer_attention_mask}
        read = self.encode_questions(
            pixel_values,
            input_ids=input_ids,
            attention_mask=attention_mask,
            image_index=image_index,
            interpolate_pos_encoding=interpolate_pos_encoding,
            **{name: tensor for name, tensor in qformer.items() if tensor is not None},
        )
        return self.generate_answers(read, **generate_kwargs)

    @torch.no_grad()
    def generate_answers(self, read: Prompts, **generate_kwargs: Any) -> torch.Tensor:
        """Generate an answer to each question that encode_questions has read: (num_questions, new_tokens) ids.

        generate_kwargs: passed to the language model's generate, e.g. max_new_tokens, num_beams, eos_token_id.
        """
        if read.encoder_states is not None:
            ids = self.language_model.generate(
                encoder_outputs=BaseModelOutput(last_hidden_state=read.encoder_states),
                attention_mask=read.encoder_mask,
                decoder_start_token_id=self.config.text_config.decoder_start_token_id,
                **generate_kwargs,
            )
            return ids[:, 1:]
        # padding between image and prompt, so that prompts end in the same column
        length = read.input_ids.shape[1]
        column = torch.arange(length, device=read.input_ids.device) - (length - read.attention_mask.sum(1))[:, None]
        mask = (column >= 0).long()
        queries = read.queries[read.prefix_index]
        with warnings.catch_warnings():
            # without ids, the penalty sees the new tokens only, as in LAVIS
            warnings.filterwarnings("ignore", "Passing `repetition_penalty` with `inputs_embeds`")
            return self.language_model.generate(
                inputs_embeds=self._embed(queries, read.input_ids.gather(1, column.clamp(min=0))),
                attention_mask=torch.cat([mask.new_ones(queries.shape[:2]), mask], 1),
                **generate_kwargs,
            )

    @torch.no_grad()
    def sequence_probabilities(self, read: Prompts, ids: torch.Tensor, end: int) -> torch.Tensor:
        """(num_questions,), the product of the probabilities of the generated ids, up to the first `end` inclusive."""
        is_end = (ids == end).long()
        labels = ids.masked_fill(is_end.cumsum(1) > is_end, IGNORED)
        return self.answer_losses(read, labels).neg().exp()

    def train(self, mode: bool = True) -> nn.Module:
        """Set the mode of all parts; frozen parts stay in evaluation mode, so that what they compute is constant."""
        super().train(mode)
        for part in self.children():
            if mode and _is_frozen(part):
                part.eval()
        return self

    def _require_index(self, image_index: torch.Tensor | None, num_images: int, num_questions: int) -> torch.Tensor:
        if image_index is None:
            if num_questions != num_images and num_images != 1:
                raise ValueError(
                    f"Found {num_images} images and {num_questions} texts: pass image_index, the image of each text."
                )
            image_index = torch.arange(num_questions, device=self.device)
            return image_index if num_images == num_questions else torch.zeros_like(image_index)
        if len(image_index) != num_questions:
            raise ValueError(
                f"image_index needs one entry for each of {num_questions} texts, found {len(image_index)}."
            )
        return image_index

    def _has_placeholders(self, input_ids: torch.Tensor) -> bool:
        token = getattr(self.config, "image_token_index", None)
        return token is not None and bool((input_ids == token).any())

    def _require_placeholders(self, input_ids: torch.Tensor) -> torch.Tensor:
        """True at the placeholders of input_ids. Raises: ValueError for a row with another number of them."""
        is_image = input_ids == self.config.image_token_index
        wanted = self.config.num_query_tokens
        if wrong := sorted(set(is_image.sum(1).tolist()) - {wanted}):
            raise ValueError(
                f"Each row of input_ids needs {wanted} `<image>` placeholders (num_query_tokens), found "
                f"{', '.join(map(str, wrong))}. With fewer, a row would read the image of the next row."
            )
        return is_image

    def _without_placeholders(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The prompts of a batch as in transformers, padded on the right, and their mask."""
        kept = ~self._require_placeholders(input_ids)
        if attention_mask is not None:
            kept &= attention_mask.bool()
        return _pad_right(input_ids, kept)

    def _forward_with_placeholders(
        self, labels: torch.Tensor | None, num_items_in_batch: torch.Tensor | float | None, **inputs: Any
    ) -> Blip2ForConditionalGenerationModelOutput:
        """The forward of transformers, with a loss that is divided by the target tokens of the whole step."""
        ours = ("image_index", "question_index", "answer_weights", "image_states", "query_states")
        if any(inputs.pop(name, None) is not None for name in ours):
            raise ValueError(
                "input_ids with `<image>` need pixel_values, one image per row, and labels aligned with input_ids. "
                f"Remove `<image>` to use {', '.join(ours)}."
            )
        self._require_placeholders(inputs["input_ids"])
        inputs["pixel_values"] = self.normalize(inputs["pixel_values"])
        targets = labels
        if labels is not None and self.config.use_decoder_only_language_model:
            targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        elif labels is not None and "decoder_input_ids" not in inputs:
            inputs["decoder_input_ids"] = self.language_model.prepare_decoder_input_ids_from_labels(labels)
        outputs = super().forward(**inputs)
        if labels is not None:
            logits = outputs.logits
            if self.config.use_decoder_only_language_model:
                logits = logits[:, -labels.shape[1] :]
            losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")
            outputs.loss = losses / (count_tokens(targets) if num_items_in_batch is None else num_items_in_batch)
        return outputs


def _pad_right(input_ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens of each row (rows, length) where mask is not 0, padded on the right, and their mask."""
    mask = mask.bool().long()
    order = mask.argsort(dim=1, descending=True, stable=True)[:, : int(mask.sum(1).max())]
    return input_ids.gather(1, order), mask.gather(1, order)


def _as_weight(states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """states in the dtype of a layer's weight. A quantized layer has packed integers, and casts its inputs itself."""
    return states.to(weight.dtype) if weight.is_floating_point() else states


def _is_frozen(part: nn.Module) -> bool:
    return not any(parameter.requires_grad for parameter in part.parameters())


@contextmanager
def _constant(part: nn.Module, *inputs: torch.Tensor) -> Iterator[None]:
    """No gradient inside, if neither the part nor an input of it is trained.

    PEFT's preparation of quantized models makes the outputs of embeddings require a gradient, and the backward pass
    would then run through a frozen vision model.
    """
    is_trained = not _is_frozen(part) or any(tensor.requires_grad for tensor in inputs)
    with torch.set_grad_enabled(torch.is_grad_enabled() and is_trained):
        yield
