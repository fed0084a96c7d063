"""BLIP-2 and InstructBLIP with LAVIS's loss. The classes have the same names as in transformers."""

from __future__ import annotations

import torch
from transformers.models.blip_2 import modeling_blip_2
from transformers.models.instructblip import modeling_instructblip

from blip_ft.modeling.blip2.base import QFormerModel


class Blip2ForConditionalGeneration(QFormerModel, modeling_blip_2.Blip2ForConditionalGeneration):
    """BLIP-2 for questions and captions: the Q-Former reads images only."""

    _no_split_modules = ["Blip2VisionEmbeddings", "Blip2EncoderLayer", "Blip2QFormerLayer"]


class InstructBlipForConditionalGeneration(QFormerModel, modeling_instructblip.InstructBlipForConditionalGeneration):
    """InstructBLIP for questions and captions: the Q-Former reads each image with the prompt."""

    _no_split_modules = [
        *("InstructBlipVisionEmbeddings", "InstructBlipEncoderLayer"),
        *("InstructBlipQFormerEmbeddings", "InstructBlipQFormerLayer"),
    ]
    qformer_reads_prompts = True

    def _qformer_prompts(
        self,
        query_tokens: torch.Tensor,
        qformer_input_ids: torch.Tensor | None = None,
        qformer_attention_mask: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        if qformer_input_ids is None:
            raise ValueError("InstructBLIP needs qformer_input_ids, the prompts in the Q-Former's own tokens.")
        if qformer_attention_mask is None:
            qformer_attention_mask = torch.ones_like(qformer_input_ids)
        mask = torch.cat([qformer_attention_mask.new_ones(query_tokens.shape[:2]), qformer_attention_mask], 1)
        return {"input_ids": qformer_input_ids, "attention_mask": mask}


__all__ = ["Blip2ForConditionalGeneration", "InstructBlipForConditionalGeneration"]
