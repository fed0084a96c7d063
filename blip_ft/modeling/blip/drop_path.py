"""Stochastic depth of the vision model: in training, layers are skipped for some images."""

from __future__ import annotations

import torch
from torch import nn
from transformers.models.blip import modeling_blip


def set_drop_path(vision_model: nn.Module, rate: float) -> None:
    """Let the layers drop their output at rates that rise linearly from 0 in the first layer to `rate` in the last.

    Source: BLIP models/vit.py VisionTransformer.
    """
    layers = vision_model.encoder.layers
    # on the CPU, also if the model is built on the meta device
    for layer, of_layer in zip(layers, torch.linspace(0, rate, len(layers), device="cpu").tolist(), strict=True):
        layer.__class__, layer.drop_path = BlipEncoderLayer, of_layer


class BlipEncoderLayer(modeling_blip.BlipEncoderLayer):  # FSDP and device_map find the layer by this class name
    """Skips attention, and independently the feed-forward, for a share `drop_path` of the images in training.

    A frozen layer skips nothing, so that its output stays constant.
    Source: BLIP models/vit.py Block.forward.
    """

    drop_path: float = 0.0

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        if not (self.drop_path and self.training and any(weight.requires_grad for weight in self.parameters())):
            return super().forward(hidden_states, **kwargs)
        attended, _ = self.self_attn(self.layer_norm1(hidden_states), **kwargs)
        hidden_states = hidden_states + drop_images(attended, self.drop_path)
        return hidden_states + drop_images(self.mlp(self.layer_norm2(hidden_states)), self.drop_path)


def drop_images(states: torch.Tensor, rate: float) -> torch.Tensor:
    """Set each image's states (num_images, patches, width) to 0 with probability `rate`; divide the others by 1 - rate.

    Source: timm 0.4.12 layers/drop.py drop_path. Unlike it, the draws are float32 in any precision: in bfloat16, a rate
    of 0.1 would round to 0.098.
    """
    draws = torch.rand((len(states), 1, 1), device=states.device)
    return (states / (1 - rate)).masked_fill((1 - rate + draws).floor() == 0, 0)
