"""What the three BLIP models share: encoding of images, and texts that attend to them."""

from __future__ import annotations

from typing import Literal

import torch
from torch.nn import Parameter
from torch.nn import functional as F
from transformers import BlipConfig
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.models.blip import modeling_blip

from blip_ft.data.texts import IGNORED
from blip_ft.modeling.blip.attention import fuse_attention
from blip_ft.modeling.blip.contrastive import Contrastive


class BlipBase:
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
            # transformers 5.23 reads the first rows of the position table for a smaller image, without a word
            raise ValueError(
                f"The model takes images of {vision.image_size} x {vision.image_size} pixels, found "
                f"{pixel_values.shape[-2]} x {pixel_values.shape[-1]}. Resize them, load the model with "
                "image_size=..., or pass interpolate_pos_encoding=True."
            )
        if pixel_values.dtype == torch.uint8:
            mean = torch.tensor(vision.image_mean, device=pixel_values.device).view(3, 1, 1)
            std = torch.tensor(vision.image_std, device=pixel_values.device).view(3, 1, 1)
            pixel_values = (pixel_values / 255 - mean) / std
        return self.vision_model(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, **kwargs)

    def _encode_or_reuse(
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

    def resize_position_embeddings(self, image_size: int) -> None:
        """Take images of image_size x image_size from now on: the position table is interpolated once and stored."""
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

    def _encode_text_with_image(
        self,
        start_token: Literal["cls", "enc"],
        image_states: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        image_index: torch.Tensor | None,
        **kwargs,
    ) -> torch.Tensor:
        """(num_texts, length, width): states of texts that have seen their images."""
        if start_token == "enc":
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
        """image_index, or None where the texts of each image stand side by side, equally many for each."""
        if image_index is None:
            if num_texts != num_images and num_images != 1:
                raise ValueError(
                    f"{num_images} images and {num_texts} texts: pass image_index, the image of each text."
                )
            return None
        if len(image_index) != num_texts:
            raise ValueError(f"image_index names the image of each of {num_texts} texts, found {len(image_index)}.")
        if num_texts % num_images == 0:
            in_turn = torch.arange(num_images, device=image_index.device).repeat_interleave(num_texts // num_images)
            if torch.equal(image_index, in_turn):
                return None
        return image_index


def smoothed_token_losses(decoder, states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
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
