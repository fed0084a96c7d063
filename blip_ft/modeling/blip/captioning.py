"""BLIP for image captioning."""

from __future__ import annotations

import torch
from transformers.models.blip import modeling_blip
from transformers.utils import can_return_tuple

from blip_ft.data.texts import IGNORED
from blip_ft.modeling.blip.base import BlipBase, sequence_probabilities, smoothed_token_losses

# image_states (num_images, patches + 1, width), and prompts (num_images, prompt_length) without [SEP]
ImagesAndPrompts = tuple[torch.Tensor, torch.Tensor]


class BlipForConditionalGeneration(BlipBase, modeling_blip.BlipForConditionalGeneration):
    """Image captioning, trained as the original is."""

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
        """Compute the loss: mean cross-entropy with label smoothing over the target tokens of all captions.

        Args:
            pixel_values: (num_images, 3, height, width), float as the processor returns it, or uint8.
            input_ids, attention_mask: (num_captions, length). Position 0 is always read as [DEC].
            image_index: (num_captions,), the image of each caption. None: one caption per image.
            labels: (num_captions, length), -100 on the prompt and on padding. Positions with attention_mask 0 do not
                count.
            num_items_in_batch: number of target tokens of the optimizer step, over accumulation and processes.
                Default: those of this batch.
            image_states: (num_images, patches + 1, width), from encode_images, instead of pixel_values.
        Returns: loss if labels are given, else logits (num_captions, length, vocabulary).
        Source: BLIP models/blip.py BLIP_Decoder.forward.
        """
        kwargs.pop("readable", None)  # the collator adds it for evaluation
        text = self.config.text_config
        vision = self._encode_or_reuse(pixel_values, image_states, interpolate_pos_encoding, **kwargs)
        input_ids = input_ids.clone()
        input_ids[:, 0] = text.bos_token_id
        states = self.text_decoder.bert(
            input_ids=input_ids,
            attention_mask=attention_mask,
            encoder_hidden_states=vision.last_hidden_state,
            image_index=self._drop_trivial_index(image_index, len(vision.last_hidden_state), len(input_ids)),
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
            loss = smoothed_token_losses(self.text_decoder, states[:, :-1], targets).sum() / num_items
        return modeling_blip.BlipForConditionalGenerationModelOutput(
            loss=loss,
            logits=logits,
            image_embeds=vision.last_hidden_state,
            last_hidden_state=vision.last_hidden_state,
            hidden_states=vision.hidden_states,
            attentions=vision.attentions,
        )

    @staticmethod
    def loss_items(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """(num_captions,) number of target tokens, by which the loss is divided. Targets are shifted by one."""
        return (batch["labels"][:, 1:] != IGNORED).sum(1)

    def encode_questions(
        self,
        pixel_values: torch.Tensor | None = None,
        image_states: torch.Tensor | None = None,
        *,
        input_ids: torch.Tensor,
    ) -> ImagesAndPrompts:
        """Read images and prompts (num_images, prompt_length); generate_answers continues them."""
        return self._encode_or_reuse(pixel_values, image_states, False).last_hidden_state, input_ids

    def generate_answers(self, read: ImagesAndPrompts, **generate_kwargs) -> torch.Tensor:
        """Generate captions as generate does, without the prompt: (num_images, new_tokens)."""
        return self.generate_captions(*read, **generate_kwargs)[:, read[1].shape[1] :]

    def sequence_probabilities(self, read: ImagesAndPrompts, ids: torch.Tensor, end: int) -> torch.Tensor:
        """(num_images,), see blip.base.sequence_probabilities. ids: from generate_answers."""
        image_states, prompts = read
        prompts = prompts.clone()
        prompts[:, 0] = self.config.text_config.bos_token_id
        return sequence_probabilities(self, torch.cat([prompts, ids], 1), prompts.shape[1], end, image_states)

    @torch.no_grad()
    def generate(
        self,
        pixel_values: torch.Tensor,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        **generate_kwargs,
    ) -> torch.Tensor:
        """Generate one caption per image.

        Args:
            pixel_values: (num_images, 3, height, width).
            input_ids, attention_mask: (num_images, prompt_length), the prompts. Each starts with [CLS] or [DEC]; [SEP]
                at the end is optional. Pad prompts of different lengths on the right. None: no prompt.
            generate_kwargs: passed to the text decoder's generate.
        Returns: (num_images, length) token ids: [DEC], the prompt and its continuation.
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
        """Generate captions as generate does, from the image states that encode_images returned."""
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
        """Remove [SEP] and padding from the prompts, pad them on the left, and return them with their mask."""
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
