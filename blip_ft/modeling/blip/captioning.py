"""BLIP that writes captions."""

from __future__ import annotations

import torch
from transformers.models.blip import modeling_blip
from transformers.utils import can_return_tuple

from blip_ft.modeling.blip.base import IGNORED, BlipBase, smoothed_token_losses


class BlipForConditionalGeneration(BlipBase, modeling_blip.BlipForConditionalGeneration):
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
            image_index: (num_captions,), the image of each caption; None: one each.
            labels: (num_captions, length), -100 on prompt and padding; what attention_mask hides is not counted.
            num_items_in_batch: targets of the whole step, over accumulation and processes; default those of this batch.
            image_states: (num_images, patches + 1, width), what encode_images gave, instead of pixel_values.
        Returns: loss, and logits (num_captions, length, vocabulary) where there are no labels.
        Source: BLIP models/blip.py BLIP_Decoder.forward.
        """
        kwargs.pop("readable", None)  # what a collator tells evaluation
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
