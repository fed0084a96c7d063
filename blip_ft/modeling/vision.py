"""Code shared by all families: normalizing and encoding images, and changing their size."""

from __future__ import annotations

import torch
from torch.nn import Parameter
from transformers import PreTrainedConfig
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.modeling_outputs import BaseModelOutputWithPooling


class ImageEncoder:
    """Mixin of all model classes. It comes before the class of transformers in their bases."""

    # forward divides its loss by num_items_in_batch, so the Trainer must not divide by the accumulation steps
    accepts_loss_kwargs = True

    def __init__(self, config: PreTrainedConfig) -> None:
        vision = config.vision_config
        # lists in the config, not buffers: transformers' class would report an extra buffer as an unexpected key
        vision.image_mean = list(getattr(vision, "image_mean", OPENAI_CLIP_MEAN))
        vision.image_std = list(getattr(vision, "image_std", OPENAI_CLIP_STD))
        super().__init__(config)

    def encode_images(
        self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False, **kwargs
    ) -> BaseModelOutputWithPooling:
        """Run the vision model on pixel_values (num_images, 3, height, width).

        uint8 pixels are normalized here with the processor's mean and standard deviation; floats must be normalized.

        Returns: last_hidden_state (num_images, patches + 1, width), and what else the vision model returns.
        """
        vision = self.config.vision_config
        if pixel_values.shape[-2:] != (vision.image_size, vision.image_size) and not interpolate_pos_encoding:
            # transformers 5.23 silently uses the first rows of the position table for a smaller image
            raise ValueError(
                f"The model needs images of {vision.image_size} x {vision.image_size} pixels, found "
                f"{pixel_values.shape[-2]} x {pixel_values.shape[-1]}. Resize the images, load the model with "
                "image_size=..., or pass interpolate_pos_encoding=True."
            )
        pixel_values = self.normalize(pixel_values)
        return self.vision_model(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, **kwargs)

    def normalize(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Normalize uint8 pixels (num_images, 3, height, width) as the processor does; floats stay as they are."""
        if pixel_values.dtype != torch.uint8:
            return pixel_values
        vision, device = self.config.vision_config, pixel_values.device
        mean, std = (torch.tensor(values, device=device) for values in (vision.image_mean, vision.image_std))
        return (pixel_values / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)

    def resize_position_embeddings(self, image_size: int) -> None:
        """Change the image size: interpolate the position table once and store the result."""
        embeddings = self.vision_model.embeddings
        patch = embeddings.patch_size
        if image_size < patch or image_size % patch:
            raise ValueError(f"image_size must be a multiple of the patch size {patch}, found {image_size}.")
        num_patches = (image_size // patch) ** 2
        with torch.no_grad():
            # of the first argument only the shape is used
            wanted = embeddings.position_embedding.new_empty(1, num_patches + 1, embeddings.embed_dim)
            table = embeddings.interpolate_pos_encoding(wanted, image_size, image_size)
        embeddings.position_embedding = Parameter(table.clone())
        embeddings.image_size, embeddings.num_patches, embeddings.num_positions = (
            image_size,
            num_patches,
            num_patches + 1,
        )
        self.config.vision_config.image_size = image_size
