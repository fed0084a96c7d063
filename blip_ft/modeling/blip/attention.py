"""Fused attention for BLIP's vision, text and cross-attention, which also applies the cross-attention mask.

`fuse_attention(model)` replaces the class of modules that transformers built. Their weights and names stay the same.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import initialization
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.models.blip import modeling_blip, modeling_blip_text


def fuse_attention(model: nn.Module) -> None:
    """Make all attention layers of a BLIP model use `scaled_dot_product_attention`, in place."""
    for module in model.modules():
        if type(module) in _FUSED:
            module.__class__ = _FUSED[type(module)]


class FusedVisionAttention(modeling_blip.BlipAttention):
    def forward(self, hidden_states: torch.Tensor, **kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
        if _weights_wanted(self.config, kwargs):
            return super().forward(hidden_states, **kwargs)
        batch, patches, width = hidden_states.shape
        qkv = self.qkv(hidden_states).view(batch, patches, 3, self.num_heads, self.head_dim)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # (batch, heads, patches, head_dim) each
        context = _attend(query, key, value, None, self.dropout.p if self.training else 0.0)
        return self.projection(context.transpose(1, 2).reshape(batch, patches, width)), None


class FusedTextSelfAttention(modeling_blip_text.BlipTextSelfAttention):
    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        image_index: torch.Tensor | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Self-attention, or cross-attention if encoder_hidden_states is given.

        Args:
            hidden_states: (num_texts, length, width).
            encoder_hidden_states: (num_images, patches, width). Text i attends to row image_index[i]; without
                image_index, to row i // (num_texts / num_images).
        """
        is_cross = encoder_hidden_states is not None
        if _weights_wanted(self.config, kwargs):
            if is_cross and len(encoder_hidden_states) != len(hidden_states):
                if encoder_attention_mask is not None and len(encoder_attention_mask) == len(encoder_hidden_states):
                    encoder_attention_mask = _row_per_text(encoder_attention_mask, image_index, len(hidden_states))
                encoder_hidden_states = _row_per_text(encoder_hidden_states, image_index, len(hidden_states))
            return super().forward(
                hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, past_key_values
            )
        num_texts, length, _ = hidden_states.shape
        mask = encoder_attention_mask if is_cross else attention_mask
        key, value = self._keys_and_values(
            encoder_hidden_states if is_cross else hidden_states, is_cross, past_key_values
        )
        if image_index is not None and is_cross:
            key, value = key[image_index], value[image_index]
        # join the texts of one image to one long row of queries: its keys and values are neither computed nor copied
        # for each text
        query = self.query(hidden_states).view(len(key), -1, self.num_attention_heads, self.attention_head_size)
        query = query.transpose(1, 2)  # (rows, heads, texts per row x length, head_dim)
        if mask is not None and mask.dtype != query.dtype:
            # under autocast: the lowest float32 number becomes -inf in bfloat16, and a row of -inf gives NaN
            mask = mask.clamp(min=torch.finfo(query.dtype).min).to(query.dtype)
        context = _attend(query, key, value, mask, self.dropout.p if self.training else 0.0)
        return context.transpose(1, 2).reshape(num_texts, length, self.all_head_size), None

    def _keys_and_values(
        self, states: torch.Tensor, is_cross: bool, past_key_values: Cache | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, (rows, heads, length, head_dim) each, from the cache if generation has filled it."""
        cache = past_key_values
        if isinstance(past_key_values, EncoderDecoderCache):
            cache = past_key_values.cross_attention_cache if is_cross else past_key_values.self_attention_cache
            if is_cross and past_key_values.is_updated.get(self.layer_idx):
                return cache.layers[self.layer_idx].keys, cache.layers[self.layer_idx].values
        shape = (*states.shape[:-1], self.num_attention_heads, self.attention_head_size)
        key = self.key(states).view(shape).transpose(1, 2)
        value = self.value(states).view(shape).transpose(1, 2)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
            if is_cross and isinstance(past_key_values, EncoderDecoderCache):
                past_key_values.is_updated[self.layer_idx] = True
        return key, value


class FusedTextAttention(modeling_blip_text.BlipTextAttention):
    def forward(self, hidden_states: torch.Tensor, **kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
        context, weights = self.self(hidden_states, **kwargs)
        return self.output(context, hidden_states), weights


class BlipTextLayer(modeling_blip_text.BlipTextLayer):  # FSDP and device_map find the layer by this class name
    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> torch.Tensor:
        states, _ = self.attention(
            hidden_states, attention_mask=attention_mask, past_key_values=past_key_values, **kwargs
        )
        if encoder_hidden_states is not None:
            # transformers 4.54 to 5.23 pass this mask as attention_mask, which cross-attention does not read
            states, _ = self.crossattention(
                states,
                encoder_hidden_states=encoder_hidden_states,
                encoder_attention_mask=encoder_attention_mask,
                past_key_values=past_key_values,
                **kwargs,
            )
        return self.feed_forward_chunk(states)


class FusedTextLMHeadModel(modeling_blip_text.BlipTextLMHeadModel):
    """The beams of one text share the keys and values of the cross-attention, which are computed and stored once."""

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        # transformers 5.23 leaves this bias as uninitialized memory if a checkpoint does not have it
        if isinstance(module, modeling_blip_text.BlipTextLMPredictionHead):
            initialization.zeros_(module.bias)

    def _expand_inputs_for_generation(self, expand_size: int = 1, **kwargs) -> tuple[torch.Tensor, dict]:
        shared = {name: kwargs.pop(name, None) for name in ("encoder_hidden_states", "encoder_attention_mask")}
        states, mask = shared.values()
        if mask is not None and mask.dim() == 2:
            # transformers would create a mask with one row per beam
            shared["encoder_attention_mask"] = additive_mask(mask, states.dtype)
        input_ids, kwargs = super()._expand_inputs_for_generation(expand_size=expand_size, **kwargs)
        return input_ids, {**kwargs, **shared}

    def _reorder_cache(self, past_key_values: EncoderDecoderCache, beam_idx: torch.Tensor) -> EncoderDecoderCache:
        # a beam always belongs to the same text, so the cache of the cross-attention stays as it is
        past_key_values.self_attention_cache.reorder_cache(beam_idx)
        return past_key_values


class OutOfPlaceTextEmbeddings(modeling_blip_text.BlipTextEmbeddings):
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        past_key_values_length: int = 0,
    ) -> torch.Tensor:
        if inputs_embeds is None:
            inputs_embeds = self.word_embeddings(input_ids)
        if position_ids is None:
            length = inputs_embeds.shape[1]
            position_ids = self.position_ids[:, past_key_values_length : past_key_values_length + length]
        # not `+=` as in transformers 5.23: with activation checkpointing and frozen embeddings, the left side is a leaf
        # that requires grad, and adding to it in place raises
        embeddings = inputs_embeds + self.position_embeddings(position_ids)
        return self.dropout(self.LayerNorm(embeddings))


_FUSED = {
    modeling_blip.BlipAttention: FusedVisionAttention,
    modeling_blip_text.BlipTextSelfAttention: FusedTextSelfAttention,
    modeling_blip_text.BlipTextAttention: FusedTextAttention,
    modeling_blip_text.BlipTextLayer: BlipTextLayer,
    modeling_blip_text.BlipTextLMHeadModel: FusedTextLMHeadModel,
    modeling_blip_text.BlipTextEmbeddings: OutOfPlaceTextEmbeddings,
}


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, dropout: float
) -> torch.Tensor:
    """Attention of query (rows, heads, queries, head_dim) over key and value (rows, heads, length, head_dim)."""
    if query.dtype == torch.bfloat16 and query.device.type == "cpu" and query.requires_grad:
        # torch 2.13's fused backward does not use the CPU's bfloat16 units: 46 ms per vision layer, 22 ms like this
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
        probabilities = (scores if mask is None else scores + mask).softmax(-1)
        return nn.functional.dropout(probabilities, dropout) @ value
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)


def additive_mask(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Turn a mask (rows, length) of ones and zeros into (rows, 1, 1, length), to be added to attention scores."""
    return (1 - mask[:, None, None].to(dtype)) * torch.finfo(dtype).min


def _weights_wanted(config, kwargs: dict) -> bool:
    return bool(kwargs.get("output_attentions", config.output_attentions))


def _row_per_text(states: torch.Tensor, image_index: torch.Tensor | None, num_texts: int) -> torch.Tensor:
    if image_index is not None:
        return states[image_index]
    return states.repeat_interleave(num_texts // len(states), dim=0)
