"""Keep the head of T5 v1.1, e.g. Flan-T5, apart from its embeddings."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

HEAD = "lm_head.weight"


def untie_head(model: PreTrainedModel) -> None:
    """Give the language model its own head if its checkpoint has one, in place; call it when the model is built.

    T5 v1.1 says tie_word_embeddings false. transformers 5 reads that as scale_decoder_outputs, and then ties the head
    in each model that is not built by from_pretrained, and whenever tie_weights is called, as accelerate does for FSDP.
    """
    text = model.language_model
    if text.config.model_type != "t5" or text.config.scale_decoder_outputs:
        return
    text._tied_weights_keys = {target: source for target, source in text._tied_weights_keys.items() if target != HEAD}
    text.all_tied_weights_keys.pop(HEAD, None)
    model.all_tied_weights_keys.pop(f"language_model.{HEAD}", None)
    if text.lm_head.weight is text.shared.weight:
        text.lm_head.weight = nn.Parameter(text.lm_head.weight.detach().clone())
