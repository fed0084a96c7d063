"""BLIP for visual question answering."""

from __future__ import annotations

import torch
from transformers.models.blip import modeling_blip
from transformers.utils import can_return_tuple

from blip_ft.data.texts import IGNORED
from blip_ft.modeling.blip.attention import additive_mask
from blip_ft.modeling.blip.base import BlipBase, sequence_probabilities, smoothed_token_losses

# question_states (num_questions, question_length, width) and attention_mask (num_questions, question_length)
QuestionStates = tuple[torch.Tensor, torch.Tensor | None]


class BlipForQuestionAnswering(BlipBase, modeling_blip.BlipForQuestionAnswering):
    """Visual question answering, trained as the original is."""

    start_token_setting = "question_start_token"

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
        """Compute the loss: the weighted sum of the answers' losses, divided by the number of questions.

        The loss of an answer is the sum of its tokens' cross-entropy with label smoothing.

        Args:
            pixel_values: (num_images, 3, height, width), float as the processor returns it, or uint8.
            input_ids, attention_mask: (num_questions, question_length).
            image_index: (num_questions,), the image of each question. None: one question per image.
            labels: (num_answers, answer_length), padded with -100 or the pad id. Position 0 is always read as [DEC].
            question_index: (num_answers,), the question of each answer. None: one answer per question.
            answer_weights: (num_answers,). None: each weight is 1.
            decoder_input_ids, decoder_attention_mask: (num_answers, answer_length). Default: made from labels.
            num_items_in_batch: number of questions of the optimizer step, over accumulation and processes. Default:
                those of this batch.
            image_states: (num_images, patches + 1, width), from encode_images, instead of pixel_values.
        Source: BLIP models/blip_vqa.py and train_vqa.py.
        """
        kwargs.pop("readable", None)  # the collator adds it for evaluation
        if labels is None and decoder_input_ids is None:
            raise ValueError("forward needs labels to compute the loss. To answer questions, call generate.")
        vision = self._encode_or_reuse(pixel_values, image_states, interpolate_pos_encoding, **kwargs)
        question_states = self.encode_pairs(vision.last_hidden_state, input_ids, attention_mask, image_index, **kwargs)
        loss = None
        if labels is not None:
            losses = self.answer_losses(
                (question_states, attention_mask),
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
    def loss_items(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """(num_questions,) of ones: the loss of a batch is divided by its number of questions."""
        return torch.ones_like(batch["input_ids"][:, 0])

    def encode_questions(
        self,
        pixel_values: torch.Tensor | None = None,
        image_states: torch.Tensor | None = None,
        *,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_index: torch.Tensor | None = None,
    ) -> QuestionStates:
        """Read images and questions; arguments as in forward. The other methods use the result."""
        vision = self._encode_or_reuse(pixel_values, image_states, interpolate_pos_encoding=False)
        return self.encode_pairs(vision.last_hidden_state, input_ids, attention_mask, image_index), attention_mask

    def answer_losses(
        self,
        read: QuestionStates,
        labels: torch.Tensor,
        question_index: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """Cross-entropy of each answer with label smoothing, summed over its tokens: (num_answers,).

        read: from encode_questions. Other arguments as in forward.
        """
        question_states, attention_mask = read
        text = self.config.text_config
        if question_index is None and len(labels) != len(question_states):
            raise ValueError(
                f"Found {len(question_states)} questions and {len(labels)} answers: pass question_index, the question "
                "of each answer."
            )
        question_index = self._drop_trivial_index(question_index, len(question_states), len(labels))
        if attention_mask is not None:
            attention_mask = additive_mask(attention_mask, question_states.dtype)
            attention_mask = attention_mask if question_index is None else attention_mask[question_index]
        targets = labels.masked_fill(labels == text.pad_token_id, IGNORED)[:, 1:]
        if decoder_input_ids is None:
            decoder_input_ids = labels.masked_fill(labels == IGNORED, text.pad_token_id)
            decoder_input_ids[:, 0] = text.bos_token_id
        # the last token predicts nothing; padding is on the right, where the causal mask hides it
        states = self.text_decoder.bert(
            input_ids=decoder_input_ids[:, :-1],
            attention_mask=None if decoder_attention_mask is None else decoder_attention_mask[:, :-1],
            encoder_hidden_states=question_states,
            encoder_attention_mask=attention_mask,
            image_index=question_index,
            is_decoder=True,
            **kwargs,
        ).last_hidden_state
        return smoothed_token_losses(self.text_decoder, states, targets).sum(1)

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
        """Generate one answer per question. Unlike in transformers 5.23, padding of questions is masked.

        Returns: (num_questions, answer_length) token ids, [DEC] first.
        """
        image_states = self.encode_images(pixel_values, interpolate_pos_encoding).last_hidden_state
        question_states = self.encode_pairs(image_states, input_ids, attention_mask, image_index)
        return self.generate_answers((question_states, attention_mask), **generate_kwargs)

    @torch.no_grad()
    def generate_answers(self, read: QuestionStates, **generate_kwargs) -> torch.Tensor:
        """Generate answers as generate does, from what encode_questions returned."""
        question_states, attention_mask = read
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

    def sequence_probabilities(self, read: QuestionStates, ids: torch.Tensor, end: int) -> torch.Tensor:
        """(num_questions,), see blip.base.sequence_probabilities. ids: from generate_answers."""
        return sequence_probabilities(self, ids, 1, end, *read)

    @torch.no_grad()
    def rank_answers(
        self,
        read: QuestionStates,
        candidates: torch.Tensor,
        k: int = 128,
        rows_per_chunk: int = 2048,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Score the k candidates with the most likely first token. The score is minus the loss of the candidate.

        Args:
            read: from encode_questions.
            candidates: (num_candidates, answer_length) token ids, padded with -100.
            rows_per_chunk: number of answers scored at once; limits the memory. Results do not depend on it.
        Returns: scores (num_questions, k) and positions in candidates (num_questions, k), the best first.
        Source: BLIP models/blip_vqa.py rank_answer; the loss includes label smoothing and is not divided by length.
        """
        question_states, attention_mask = read
        num_questions, k = len(question_states), min(k, len(candidates))
        start = torch.full((num_questions, 1), self.config.text_config.bos_token_id, device=question_states.device)
        logits = self.text_decoder(
            input_ids=start, encoder_hidden_states=question_states, encoder_attention_mask=attention_mask
        ).logits[:, 0]
        kept = logits.softmax(-1)[:, candidates[:, 1]].topk(k, dim=1).indices  # (num_questions, k)
        questions = torch.arange(num_questions, device=kept.device).repeat_interleave(k)
        scores = torch.cat(
            [
                -self.answer_losses(read, candidates[chosen], question_index=asked)
                for chosen, asked in zip(
                    kept.flatten().split(rows_per_chunk), questions.split(rows_per_chunk), strict=True
                )
            ]
        ).view(num_questions, k)
        scores, order = scores.sort(dim=1, descending=True)
        return scores, kept.gather(1, order)
