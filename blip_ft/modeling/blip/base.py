"""Code shared by the three BLIP models: encoding texts with images, and the token loss."""

from __future__ import annotations

import torch
from torch.nn import functional as F
from transformers import BlipConfig
from transformers.models.blip import modeling_blip

from blip_ft.data.texts import IGNORED
from blip_ft.modeling.blip.attention import fuse_attention
from blip_ft.modeling.blip.contrastive import Contrastive
from blip_ft.modeling.blip.drop_path import set_drop_path
from blip_ft.modeling.vision import ImageEncoder


class BlipBase(ImageEncoder):
    """Mixin of the three BLIP classes. It comes before the class of transformers in their bases."""

    # momentum weights, queue and temperature; retrieval sets it if the loss is needed
    contrastive: Contrastive | None = None
    # name of the config entry, "cls" or "enc", that decides which token the text encoder starts a text with
    start_token_setting: str
    # modules that a device_map must not split; transformers leaves out those of the text models
    _no_split_modules = ["BlipEncoderLayer", "BlipTextLayer", "OutOfPlaceTextEmbeddings"]

    def __init__(self, config: BlipConfig) -> None:
        super().__init__(config)
        fuse_attention(self)
        # an entry of ours, which stock transformers keeps and does not read
        set_drop_path(self.vision_model, getattr(config.vision_config, "drop_path", 0.0))

    def _encode_or_reuse(
        self,
        pixel_values: torch.Tensor | None,
        image_states: torch.Tensor | None,
        interpolate_pos_encoding: bool,
        **kwargs,
    ) -> modeling_blip.BaseModelOutputWithPooling:
        """Encode the images, or use image_states from an earlier call of encode_images, in the dtype of the weights."""
        if (pixel_values is None) == (image_states is None):
            raise ValueError("forward needs exactly one of pixel_values and image_states, found both or neither.")
        if image_states is None:
            return self.encode_images(pixel_values, interpolate_pos_encoding, **kwargs)
        return modeling_blip.BaseModelOutputWithPooling(last_hidden_state=image_states.to(self.dtype))

    def encode_pairs(
        self,
        image_states: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_index: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """Encode each text together with its image, by the text encoder's cross-attention.

        Args:
            image_states: (num_images, patches + 1, width), from encode_images.
            input_ids, attention_mask: (num_texts, length).
            image_index: (num_texts,), the image of each text. None: one text per image, or the same number of texts
                for each image, in the images' order.
        Returns: (num_texts, length, width). The answer decoder reads all positions, itm_head position 0.
        """
        if getattr(self.config, self.start_token_setting, "cls") == "enc":
            input_ids = input_ids.clone()
            input_ids[:, 0] = self.config.text_config.bos_token_id + 1  # the original adds [ENC] right after [DEC]
        return self.text_encoder(
            input_ids=input_ids,
            attention_mask=attention_mask,
            encoder_hidden_states=image_states,
            image_index=self._drop_trivial_index(image_index, len(image_states), len(input_ids)),
            **kwargs,
        ).last_hidden_state

    def _drop_trivial_index(
        self, image_index: torch.Tensor | None, num_images: int, num_texts: int
    ) -> torch.Tensor | None:
        """Return image_index, or None if texts are in the order of images, with the same number for each image."""
        if image_index is None:
            if num_texts != num_images and num_images != 1:
                raise ValueError(
                    f"Found {num_images} images and {num_texts} texts: pass image_index, the image of each text."
                )
            return None
        if len(image_index) != num_texts:
            raise ValueError(f"image_index needs one entry for each of {num_texts} texts, found {len(image_index)}.")
        if num_texts % num_images == 0:
            in_turn = torch.arange(num_images, device=image_index.device).repeat_interleave(num_texts // num_images)
            if torch.equal(image_index, in_turn):
                return None
        return image_index


def smoothed_token_losses(decoder, states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each target token, with label smoothing.

    Args:
        decoder: the text decoder, whose head maps states to logits.
        states: (rows, length, width), the decoder's last hidden states.
        targets: (rows, length) token ids, -100 for positions that do not count.
    Returns: (rows, length), 0 if the target is -100.
    Source: BLIP models/med.py BertLMHeadModel.forward, label smoothing 0.1.
    """
    counted = targets != IGNORED
    # apply the head only to positions that count: the vocabulary makes it the largest matrix product of the model
    logits = decoder.cls(states[counted])
    # autocast would do this, but DeepSpeed's bf16 mode does not use autocast
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = F.cross_entropy(logits, targets[counted], label_smoothing=decoder.label_smoothing, reduction="none")
    return losses.new_zeros(targets.shape).masked_scatter(counted, losses)


@torch.no_grad()
def sequence_probabilities(
    model: torch.nn.Module,
    ids: torch.Tensor,
    start: int,
    end: int,
    states: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """(rows,) 0 to 1, the product of the token probabilities from column `start` to the first `end` inclusive.

    The model reads the finished row once more. So the number does not depend on the number of beams, label smoothing
    or the constraints of generation (min_length, repetition). If a row was cut before its end, all its tokens count.

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
    is_end = (targets == end).long()
    return logs.masked_fill(is_end.cumsum(1) > is_end, 0).sum(1).exp()
