"""BLIP with the original's losses and masks: the names, weights and configs of transformers' own classes.

A checkpoint saved here loads in stock transformers, and the other way round.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch.func import functional_call
from torch.nn import Parameter
from torch.nn import functional as F
from transformers import BlipConfig
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.models.blip import modeling_blip
from transformers.utils import can_return_tuple

from blip_ft.attention import additive_mask, fuse_attention
from blip_ft.contrastive import Contrastive, draw_negatives, gather, nearest_is_right

IGNORED = -100  # label of a position that has no target


class _Blip:
    """What the three classes below share, put before transformers' class in their bases."""

    # forward divides its loss by num_items_in_batch, so the Trainer must not divide by the accumulation steps
    accepts_loss_kwargs = True
    # momentum weights, queue and temperature of retrieval; set where its loss is wanted
    contrastive: Contrastive | None = None
    # what a device_map must not cut through: stock forgets the text layers
    _no_split_modules = ["BlipEncoderLayer", "BlipTextLayer", "OutOfPlaceTextEmbeddings"]

    def __init__(self, config: BlipConfig) -> None:
        vision = config.vision_config
        # lists in the config, not buffers: a buffer beyond stock's would be an unexpected key there
        vision.image_mean = list(getattr(vision, "image_mean", OPENAI_CLIP_MEAN))
        vision.image_std = list(getattr(vision, "image_std", OPENAI_CLIP_STD))
        super().__init__(config)
        fuse_attention(self)

    def encode_images(
        self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False, **kwargs
    ) -> modeling_blip.BaseModelOutputWithPooling:
        """last_hidden_state (num_images, patches + 1, width) of pixel_values (num_images, 3, height, width).

        uint8 pixels are normalised here with the processor's mean and deviation; floats are taken as normalised.
        """
        vision = self.config.vision_config
        if pixel_values.shape[-2:] != (vision.image_size, vision.image_size) and not interpolate_pos_encoding:
            # transformers 5.23 reads the first rows of the position table for a smaller picture, without a word
            raise ValueError(
                f"The model takes pictures of {vision.image_size} x {vision.image_size} pixels, found "
                f"{pixel_values.shape[-2]} x {pixel_values.shape[-1]}. Resize them, load the model with "
                "image_size=..., or pass interpolate_pos_encoding=True."
            )
        if pixel_values.dtype == torch.uint8:
            mean = torch.tensor(vision.image_mean, device=pixel_values.device).view(3, 1, 1)
            std = torch.tensor(vision.image_std, device=pixel_values.device).view(3, 1, 1)
            pixel_values = (pixel_values / 255 - mean) / std
        return self.vision_model(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, **kwargs)

    def _see_pictures(
        self,
        pixel_values: torch.Tensor | None,
        image_states: torch.Tensor | None,
        interpolate_pos_encoding: bool,
        **kwargs,
    ) -> modeling_blip.BaseModelOutputWithPooling:
        """encode_images, or image_states as what it gave earlier, in the weights' dtype."""
        if (pixel_values is None) == (image_states is None):
            raise ValueError("forward takes pixel_values or image_states: one of them, found both or neither.")
        if image_states is None:
            return self.encode_images(pixel_values, interpolate_pos_encoding, **kwargs)
        return modeling_blip.BaseModelOutputWithPooling(last_hidden_state=image_states.to(self.dtype))

    def resize_images(self, image_size: int) -> None:
        """Take pictures of image_size x image_size from now on: the position table is interpolated once and stored."""
        embeddings = self.vision_model.embeddings
        patch = embeddings.patch_size
        if image_size < patch or image_size % patch:
            raise ValueError(f"image_size must be a multiple of the patch size {patch}, found {image_size}.")
        num_patches = (image_size // patch) ** 2
        with torch.no_grad():
            # the first argument only tells how many patches there will be
            wanted = embeddings.position_embedding.new_empty(1, num_patches + 1, embeddings.embed_dim)
            table = embeddings.interpolate_pos_encoding(wanted, image_size, image_size)
        embeddings.position_embedding = Parameter(table.clone())
        embeddings.image_size, embeddings.num_patches, embeddings.num_positions = (
            image_size,
            num_patches,
            num_patches + 1,
        )
        self.config.vision_config.image_size = image_size

    def _read_pictures(
        self,
        start_token: Literal["cls", "enc"],
        image_states: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        image_index: torch.Tensor | None,
        **kwargs,
    ) -> torch.Tensor:
        """(num_texts, length, width): states of texts that have seen their pictures."""
        if start_token == "enc":
            input_ids = input_ids.clone()
            input_ids[:, 0] = self.config.text_config.bos_token_id + 1  # the original adds [ENC] right after [DEC]
        return self.text_encoder(
            input_ids=input_ids,
            attention_mask=attention_mask,
            encoder_hidden_states=image_states,
            image_index=self._match_texts(image_index, len(image_states), len(input_ids)),
            **kwargs,
        ).last_hidden_state

    def _match_texts(self, image_index: torch.Tensor | None, num_images: int, num_texts: int) -> torch.Tensor | None:
        """image_index, or None where the texts of each picture stand side by side, equally many for each."""
        if image_index is None:
            if num_texts != num_images and num_images != 1:
                raise ValueError(
                    f"{num_images} pictures and {num_texts} texts: pass image_index, the picture of each text."
                )
            return None
        if len(image_index) != num_texts:
            raise ValueError(f"image_index names the picture of each of {num_texts} texts, found {len(image_index)}.")
        if num_texts % num_images == 0:
            in_turn = torch.arange(num_images, device=image_index.device).repeat_interleave(num_texts // num_images)
            if torch.equal(image_index, in_turn):
                return None
        return image_index


def _smoothed_token_losses(decoder, states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """(rows, length) cross-entropy of each target under the decoder's states; 0 where the target is -100.

    Source: BLIP models/med.py BertLMHeadModel.forward, label smoothing 0.1.
    """
    counted = targets != IGNORED
    # the head is applied to counted positions only: its vocabulary is the widest matrix of the model
    logits = decoder.cls(states[counted])
    # DeepSpeed's bf16 has no autocast, which would do this
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = F.cross_entropy(logits, targets[counted], label_smoothing=decoder.label_smoothing, reduction="none")
    return losses.new_zeros(targets.shape).masked_scatter(counted, losses)


class BlipForQuestionAnswering(_Blip, modeling_blip.BlipForQuestionAnswering):
    """Question answering as the original trains it."""

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
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
        image_states: torch.Tensor | None = None,
        **kwargs,
    ) -> modeling_blip.BlipTextVisionModelOutput:
        """Loss: sum over answers of weight x summed smoothed cross-entropy of its tokens, over the number of questions.

        Args:
            pixel_values: (num_images, 3, height, width), float as the processor gives it or uint8.
            input_ids, attention_mask: (num_questions, question_length).
            image_index: (num_questions,), the picture of each question; None: one each.
            labels: (num_answers, answer_length), padding -100 or the pad id. Position 0 is read as [DEC].
            question_index: (num_answers,), the question of each answer; None: one each.
            answer_weights: (num_answers,); None: 1 each.
            decoder_input_ids, decoder_attention_mask: (num_answers, answer_length) instead of those made from labels.
            num_items_in_batch: questions of the whole step, all processes and accumulation; default: of this batch.
            image_states: (num_images, patches + 1, width), what encode_images gave, instead of pixel_values.
        Source: BLIP models/blip_vqa.py and train_vqa.py.
        """
        kwargs.pop("readable", None)  # what a collator tells evaluation
        if labels is None and decoder_input_ids is None:
            raise ValueError("forward needs labels to compute a loss; to answer questions call generate.")
        vision = self._see_pictures(pixel_values, image_states, interpolate_pos_encoding, **kwargs)
        question_states = self.encode_questions(
            vision.last_hidden_state, input_ids, attention_mask, image_index, **kwargs
        )
        loss = None
        if labels is not None:
            losses = self.answer_losses(
                question_states,
                attention_mask,
                labels,
                question_index,
                decoder_input_ids,
                decoder_attention_mask,
                **kwargs,
            )
            if answer_weights is not None:
                losses = losses * answer_weights
            loss = losses.sum() / (len(input_ids) if num_items_in_batch is None else num_items_in_batch)
        return modeling_blip.BlipTextVisionModelOutput(
            loss=loss,
            image_embeds=vision.last_hidden_state,
            last_hidden_state=vision.last_hidden_state,
            hidden_states=vision.hidden_states,
            attentions=vision.attentions,
        )

    @staticmethod
    def count_loss_items(batch: dict[str, torch.Tensor]) -> int:
        """What the loss of a batch is divided by: its questions."""
        return len(batch["input_ids"])

    def encode_questions(
        self,
        image_states: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_index: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """(num_questions, question_length, width): what the decoder reads of question and picture."""
        start_token = getattr(self.config, "question_start_token", "cls")
        return self._read_pictures(start_token, image_states, input_ids, attention_mask, image_index, **kwargs)

    def answer_losses(
        self,
        question_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        labels: torch.Tensor,
        question_index: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """(num_answers,): smoothed cross-entropy of each answer, summed over its tokens. Arguments as in forward."""
        text = self.config.text_config
        if question_index is None and len(labels) != len(question_states):
            raise ValueError(
                f"{len(question_states)} questions and {len(labels)} answers: pass question_index, that of each."
            )
        question_index = self._match_texts(question_index, len(question_states), len(labels))
        if attention_mask is not None:
            attention_mask = additive_mask(attention_mask, question_states.dtype)
            attention_mask = attention_mask if question_index is None else attention_mask[question_index]
        targets = labels.masked_fill(labels == text.pad_token_id, IGNORED)[:, 1:]
        if decoder_input_ids is None:
            decoder_input_ids = labels.masked_fill(labels == IGNORED, text.pad_token_id)
            decoder_input_ids[:, 0] = text.bos_token_id
        # the last token predicts nothing; padding stands on the right, where the causal mask hides it
        states = self.text_decoder.bert(
            input_ids=decoder_input_ids[:, :-1],
            attention_mask=None if decoder_attention_mask is None else decoder_attention_mask[:, :-1],
            encoder_hidden_states=question_states,
            encoder_attention_mask=attention_mask,
            image_index=question_index,
            is_decoder=True,
            **kwargs,
        ).last_hidden_state
        return _smoothed_token_losses(self.text_decoder, states, targets).sum(1)

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        image_index: torch.Tensor | None = None,
        **generate_kwargs,
    ) -> torch.Tensor:
        """(num_questions, answer_length) ids, [DEC] first. The question's padding is masked, unlike in stock."""
        image_states = self.encode_images(pixel_values, interpolate_pos_encoding).last_hidden_state
        question_states = self.encode_questions(image_states, input_ids, attention_mask, image_index)
        return self.generate_answers(question_states, attention_mask, **generate_kwargs)

    @torch.no_grad()
    def generate_answers(
        self, question_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **generate_kwargs
    ) -> torch.Tensor:
        """generate, from the states that encode_questions gave."""
        text = self.config.text_config
        if attention_mask is None:
            attention_mask = question_states.new_ones(question_states.shape[:2], dtype=torch.long)
        start = torch.full((len(question_states), 1), text.bos_token_id, device=question_states.device)
        return self.text_decoder.generate(
            input_ids=start,
            eos_token_id=text.sep_token_id,
            pad_token_id=text.pad_token_id,
            encoder_hidden_states=question_states,
            encoder_attention_mask=attention_mask,
            **generate_kwargs,
        )

    @torch.no_grad()
    def rank_answers(
        self,
        question_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        candidates: torch.Tensor,
        k: int = 128,
        rows_per_chunk: int = 2048,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The k candidates whose first token is likeliest, best first, and minus their loss as a score.

        Args:
            candidates: (num_candidates, answer_length) ids, padding -100.
            rows_per_chunk: answers that are scored at once; bounds the memory.
        Returns: scores (num_questions, k) and positions in candidates (num_questions, k), by score, best first.
        Source: BLIP models/blip_vqa.py rank_answer; the loss includes label smoothing and is not divided by length.
        """
        num_questions, k = len(question_states), min(k, len(candidates))
        start = torch.full((num_questions, 1), self.config.text_config.bos_token_id, device=question_states.device)
        logits = self.text_decoder(
            input_ids=start, encoder_hidden_states=question_states, encoder_attention_mask=attention_mask
        ).logits[:, 0]
        kept = logits.softmax(-1)[:, candidates[:, 1]].topk(k, dim=1).indices  # (num_questions, k)
        questions = torch.arange(num_questions, device=kept.device).repeat_interleave(k)
        scores = torch.cat(
            [
                -self.answer_losses(question_states, attention_mask, candidates[chosen], question_index=asked)
                for chosen, asked in zip(
                    kept.flatten().split(rows_per_chunk), questions.split(rows_per_chunk), strict=True
                )
            ]
        ).view(num_questions, k)
        scores, order = scores.sort(dim=1, descending=True)
        return scores, kept.gather(1, order)


class BlipForConditionalGeneration(_Blip, modeling_blip.BlipForConditionalGeneration):
    """Captioning as the original trains it."""

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_index: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
        image_states: torch.Tensor | None = None,
        **kwargs,
    ) -> modeling_blip.BlipForConditionalGenerationModelOutput:
        """Loss: mean smoothed cross-entropy over the target tokens of all captions.

        Args:
            pixel_values: (num_images, 3, height, width), float as the processor gives it or uint8.
            input_ids, attention_mask: (num_captions, length). Position 0 is read as [DEC], whatever it holds.
            image_index: (num_captions,), the picture of each caption; None: one each.
            labels: (num_captions, length), -100 on prompt and padding; what attention_mask hides is not counted.
            num_items_in_batch: targets of the whole step, over accumulation and processes; default those of this batch.
            image_states: (num_images, patches + 1, width), what encode_images gave, instead of pixel_values.
        Returns: loss, and logits (num_captions, length, vocabulary) where there are no labels.
        Source: BLIP models/blip.py BLIP_Decoder.forward.
        """
        kwargs.pop("readable", None)  # what a collator tells evaluation
        text = self.config.text_config
        vision = self._see_pictures(pixel_values, image_states, interpolate_pos_encoding, **kwargs)
        input_ids = input_ids.clone()
        input_ids[:, 0] = text.bos_token_id
        states = self.text_decoder.bert(
            input_ids=input_ids,
            attention_mask=attention_mask,
            encoder_hidden_states=vision.last_hidden_state,
            image_index=self._match_texts(image_index, len(vision.last_hidden_state), len(input_ids)),
            is_decoder=True,
            **kwargs,
        ).last_hidden_state
        loss = logits = None
        if labels is None:
            logits = self.text_decoder.cls(states)
        else:
            labels = labels.masked_fill(labels == text.pad_token_id, IGNORED)
            if attention_mask is not None:
                labels = labels.masked_fill(attention_mask == 0, IGNORED)
            targets = labels[:, 1:]
            num_items = (targets != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
            loss = _smoothed_token_losses(self.text_decoder, states[:, :-1], targets).sum() / num_items
        return modeling_blip.BlipForConditionalGenerationModelOutput(
            loss=loss,
            logits=logits,
            image_embeds=vision.last_hidden_state,
            last_hidden_state=vision.last_hidden_state,
            hidden_states=vision.hidden_states,
            attentions=vision.attentions,
        )

    @staticmethod
    def count_loss_items(batch: dict[str, torch.Tensor]) -> int:
        """What the loss of a batch is divided by: its target tokens, which are shifted by one."""
        return int((batch["labels"][:, 1:] != IGNORED).sum())

    @torch.no_grad()
    def generate(
        self,
        pixel_values: torch.Tensor,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        **generate_kwargs,
    ) -> torch.Tensor:
        """(num_images, length) ids that go on from a prompt.

        input_ids, attention_mask: (num_images, prompt_length), [CLS] or [DEC] first, with or without [SEP] at the end;
        prompts of different length may be padded on the right. None: no prompt.
        """
        image_states = self.encode_images(pixel_values, interpolate_pos_encoding).last_hidden_state
        return self.generate_captions(image_states, input_ids, attention_mask, **generate_kwargs)

    @torch.no_grad()
    def generate_captions(
        self,
        image_states: torch.Tensor,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **generate_kwargs,
    ) -> torch.Tensor:
        """generate, from the states that encode_images gave."""
        text = self.config.text_config
        if input_ids is None:
            input_ids = torch.full((len(image_states), 1), text.bos_token_id, device=image_states.device)
        prompts, prompt_mask = self._left_padded(input_ids, attention_mask)
        return self.text_decoder.generate(
            input_ids=prompts,
            attention_mask=prompt_mask,
            eos_token_id=text.sep_token_id,
            pad_token_id=text.pad_token_id,
            encoder_hidden_states=image_states,
            encoder_attention_mask=image_states.new_ones(image_states.shape[:2], dtype=torch.long),
            **generate_kwargs,
        )

    def _left_padded(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Prompts without [SEP] and padding, ending in the same column, and their mask."""
        text = self.config.text_config
        visible = input_ids != text.sep_token_id
        if attention_mask is not None:
            visible &= attention_mask.bool()
        rows = [row[keep] for row, keep in zip(input_ids, visible, strict=True)]
        longest = max(len(row) for row in rows)
        prompts = input_ids.new_full((len(rows), longest), text.pad_token_id)
        mask = torch.zeros_like(prompts)
        for row, prompt in enumerate(rows):
            prompts[row, longest - len(prompt) :] = prompt
            prompts[row, longest - len(prompt)] = text.bos_token_id
            mask[row, longest - len(prompt) :] = 1
        return prompts, mask


@dataclass
class BlipImageTextRetrievalOutput(modeling_blip.BlipImageTextMatchingModelOutput):
    """Stock's output, and what the similarity and the loss are made of."""

    image_features: torch.Tensor | None = None
    text_features: torch.Tensor | None = None
    loss_itc: torch.Tensor | None = None
    loss_itm: torch.Tensor | None = None
    in_batch_accuracy: torch.Tensor | None = None


class BlipForImageTextRetrieval(_Blip, modeling_blip.BlipForImageTextRetrieval):
    """Image-text matching and similarity as stock computes them, and the original's loss."""

    # a mean over pairs whose negatives stand in the batch: the Trainer averages over accumulation and processes
    accepts_loss_kwargs = False

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_ids: torch.Tensor | None = None,
        image_index: torch.Tensor | None = None,
        use_itm_head: bool = True,
        negatives: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs,
    ) -> BlipImageTextRetrievalOutput:
        """Scores, and with image_ids the loss: loss_itc (contrast over batch and queue) + loss_itm (matching).

        A text and its picture are one pair; both losses are means over pairs. In training mode the pairs then join the
        queue. Processes share their pairs as negatives, and need not have equally many.

        Args:
            pixel_values: (num_images, 3, height, width), float as the processor gives it or uint8.
            input_ids, attention_mask: (num_texts, length), [CLS] first.
            image_ids: (num_images,) int64, equal for equal pictures in the whole data set: pairs of one picture are
                right answers to each other, never negatives.
            image_index: (num_texts,), the picture of each text; None: one each.
            use_itm_head: itm_score is (num_texts, 2), the logits of a wrong and a right pair. If False, and always with
                image_ids, it is (num_images, num_texts), cosines.
            negatives: (2, num_texts), instead of drawing them: the pair whose picture is put to this pair's text, and
                the pair whose text is put to this pair's picture; -1 for none. The pairs of all processes count, in
                rank order.
        Source: BLIP models/blip_retrieval.py, negative_all_rank.
        """
        vision = self.encode_images(pixel_values, interpolate_pos_encoding, **kwargs)
        image_states = vision.last_hidden_state
        image_features = text_features = None
        losses = {}
        if use_itm_head and image_ids is None:
            states = self.encode_pairs(image_states, input_ids, attention_mask, image_index, **kwargs)
            score = self.itm_head(states[:, 0])
        else:
            states = self.text_encoder(input_ids=input_ids, attention_mask=attention_mask, **kwargs).last_hidden_state
            image_features, text_features = self.project_images(image_states), self.project_texts(states)
            score = image_features @ text_features.T
        if image_ids is not None:
            if self.contrastive is None:
                raise ValueError(
                    "The loss needs a queue and momentum weights: set model.contrastive = Contrastive(model) before "
                    "training, or leave out image_ids to get scores only."
                )
            with torch.no_grad():
                # the momentum encoder, with the model's own dropout, as in the original. Not by exchanging
                # parameter.data: autocast would go on with the casts that it keeps of the model's weights
                keys = functional_call(
                    self,
                    {name: weight.to(self.dtype) for name, weight in self.contrastive.momentum_weights.items()},
                    (pixel_values, input_ids, attention_mask),
                    {"use_itm_head": False, "interpolate_pos_encoding": interpolate_pos_encoding},
                )
            features = (image_features, text_features, keys.image_features, keys.text_features)
            losses = self._losses(
                image_states, features, input_ids, attention_mask, image_ids, image_index, negatives, **kwargs
            )
        return BlipImageTextRetrievalOutput(
            itm_score=score,
            last_hidden_state=image_states,
            hidden_states=vision.hidden_states,
            attentions=vision.attentions,
            question_embeds=states,
            image_features=image_features,
            text_features=text_features,
            **losses,
        )

    def project_images(self, image_states: torch.Tensor) -> torch.Tensor:
        """(num_images, width) of length 1, of what encode_images gave; the product with a text's is their cosine."""
        return F.normalize(self.vision_proj(image_states[:, 0]), dim=-1)

    def project_texts(self, text_states: torch.Tensor) -> torch.Tensor:
        """(num_texts, width) of length 1, of the states that text_encoder gives without pictures."""
        return F.normalize(self.text_proj(text_states[:, 0]), dim=-1)

    def encode_pairs(
        self,
        image_states: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_index: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """(num_texts, length, width): the texts, having seen their pictures. itm_head reads position 0."""
        start_token = getattr(self.config, "itm_start_token", "cls")
        return self._read_pictures(start_token, image_states, input_ids, attention_mask, image_index, **kwargs)

    def _losses(
        self,
        image_states: torch.Tensor,
        features: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        image_ids: torch.Tensor,
        image_index: torch.Tensor | None,
        negatives: torch.Tensor | None,
        **kwargs,
    ) -> dict[str, torch.Tensor]:
        """loss, loss_itc, loss_itm, and in_batch_accuracy in percent.

        features: (num_images, width) and (num_texts, width), by the model, then both by the momentum weights.
        """
        contrastive, num_images, num_texts = self.contrastive, len(image_states), len(input_ids)
        if len(image_ids) != num_images:
            raise ValueError(f"image_ids names each of {num_images} pictures, found {len(image_ids)} ids.")
        if self._match_texts(image_index, num_images, num_texts) is None:
            image_index = torch.arange(num_texts, device=input_ids.device) * num_images // num_texts
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        image_features, text_features, image_keys, text_keys = features

        # row i of what follows is the pair of text i and its picture, in all_... those of every process
        all_states, first_image = gather(image_states)
        all_ids, all_images = gather(torch.stack([image_ids[image_index], image_index + first_image], 1))[0].unbind(1)
        all_texts, first_text = gather(torch.stack([input_ids, attention_mask], 1))  # (all pairs, 2, longest)
        own = torch.arange(first_text, first_text + num_texts, device=input_ids.device)
        pairs = torch.stack([image_features[image_index], text_features, image_keys[image_index], text_keys], 1)
        pairs = pairs.to(contrastive.image_queue.dtype)  # (num_texts, 4, width)
        all_pairs, _ = gather(pairs.detach())
        all_image_features, all_text_features, all_image_keys, all_text_keys = all_pairs.unbind(1)
        # a cosine's rounding would be divided by the temperature
        with torch.autocast(pairs.device.type, enabled=False):
            loss_itc = contrastive.loss(*pairs.unbind(1), all_ids[own])
            same = all_ids[own, None] == all_ids
            towards_images = all_text_features[own] @ all_image_features.T / contrastive.temperature
            towards_texts = all_image_features[own] @ all_text_features.T / contrastive.temperature
            in_batch_accuracy = nearest_is_right((towards_images, towards_texts), same)
            if negatives is None:
                negatives = torch.stack([draw_negatives(towards_images, same), draw_negatives(towards_texts, same)])
        if self.training:
            contrastive.enqueue(all_image_keys, all_text_keys, all_ids)

        # each text with its picture, with a wrong picture, and a wrong text with the picture; -1 takes any, uncounted
        other_images, other_texts = negatives
        images, image_index = all_images[torch.cat([own, other_images, own])].unique(return_inverse=True)
        input_ids, attention_mask = all_texts[torch.cat([own, own, other_texts])].unbind(1)
        states = self.encode_pairs(all_states[images], input_ids, attention_mask, image_index, **kwargs)
        labels = torch.cat([torch.ones_like(own), torch.where(negatives.flatten() < 0, IGNORED, 0)])
        loss_itm = F.cross_entropy(self.itm_head(states[:, 0]), labels)
        return {
            "loss": loss_itc + loss_itm,
            "loss_itc": loss_itc,
            "loss_itm": loss_itm,
            "in_batch_accuracy": in_batch_accuracy,
        }
