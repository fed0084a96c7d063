"""The models and batches of `python recipes/benchmark.py --family blip-2`."""

import copy

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Blip2Config
from transformers.models.blip_2 import modeling_blip_2

from blip_ft.data.texts import IGNORED
from blip_ft.modeling.blip2 import Blip2ForConditionalGeneration

PROMPT_TOKENS, ANSWER_TOKENS = 16, 4


def blip2_opt_2_7b() -> Blip2Config:
    """The architecture of Salesforce/blip2-opt-2.7b, without dropout, so that both models compute the same loss."""
    text = {"hidden_size": 2560, "word_embed_proj_dim": 2560, "ffn_dim": 10240, "vocab_size": 50304}
    return Blip2Config(
        qformer_config={"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
        text_config={"model_type": "opt", "num_hidden_layers": 32, "num_attention_heads": 32, "dropout": 0.0, **text},
        image_token_index=50265,
    )


def tiny_blip2() -> Blip2Config:
    """Two layers of each part, for --quick."""
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {"word_embed_proj_dim": 32, "ffn_dim": 64, "vocab_size": 130, "dropout": 0.0}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return Blip2Config(
        vision_config={**size, "intermediate_size": 64, "image_size": 32, "patch_size": 8},
        qformer_config={**size, **dropout, "intermediate_size": 64, "encoder_hidden_size": 32},
        text_config={"model_type": "opt", **size, **text},
        num_query_tokens=4,
        image_token_index=129,
    )


class Blip2Pair:
    """The stock model and ours with the same modules, and the same work for both.

    Weights are random, in bf16. LoRA adapters (q_proj and v_proj of the language model) are trained, and the rest is
    frozen.

    Args:
        num_images: images in each batch.
    """

    def __init__(self, config: Blip2Config, device: torch.device, num_images: int) -> None:
        torch.manual_seed(0)
        self.device, self.num_images, self.config = device, num_images, config
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("meta"):
            self.ours = Blip2ForConditionalGeneration(config)
        torch.set_default_dtype(default)
        self.ours.to_empty(device=device).tie_weights()
        _fill(self.ours)
        get_peft_model(self.ours, LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"]))
        self.stock = copy.copy(self.ours)  # a shallow copy: it has the same modules
        self.stock.__class__ = modeling_blip_2.Blip2ForConditionalGeneration
        size = config.vision_config.image_size
        self.pixels = torch.randn(num_images, 3, size, size, device=device, dtype=torch.bfloat16)
        with torch.no_grad():
            self.query_states = self._encode(self.pixels)  # as the cache has them

    def batches(self, questions: int) -> dict[str, dict[str, torch.Tensor]]:
        """The inputs of stock, and of ours in each of its ways, for `questions` questions per image."""
        image_index = torch.arange(self.num_images, device=self.device).repeat_interleave(questions)
        vocabulary, rows = self.config.image_token_index, len(image_index)  # ids of text are below that of `<image>`
        prompts = torch.randint(3, vocabulary, (rows, PROMPT_TOKENS), device=self.device)
        answers = torch.randint(3, vocabulary, (rows, ANSWER_TOKENS), device=self.device)
        image = prompts.new_full((rows, self.config.num_query_tokens), self.config.image_token_index)
        ids = torch.cat([image, prompts, answers], 1)
        labels = ids.clone()
        labels[:, :-ANSWER_TOKENS] = IGNORED
        text = {"input_ids": prompts, "attention_mask": torch.ones_like(prompts), "labels": answers}
        packed = {"image_index": image_index, **text}
        batches = {
            "stock": {
                "pixel_values": self.pixels[image_index],
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
                "labels": labels,
            },
            "ours": {"pixel_values": self.pixels, **packed},
            "ours, cached features": {"query_states": self.query_states, **packed},
        }
        if questions > 1:
            batches["ours, not packed"] = {"pixel_values": self.pixels, "row_image": image_index, **text}
            cached = {"query_states": self.query_states[image_index], **text}
            batches["ours, cached features, not packed"] = cached
        return batches

    def step(self, name: str, batch: dict[str, torch.Tensor]) -> float:
        model = (self.stock if name == "stock" else self.ours).train()
        if name == "ours, not packed":
            # the image is encoded once; then each question has query states of its own, and a row of its own
            batch = {**batch, "query_states": self._encode(batch["pixel_values"])[batch["row_image"]]}
            del batch["pixel_values"], batch["row_image"]
        loss = model(**batch).loss
        loss.backward()
        model.zero_grad()
        return loss.item()

    def require_equal_losses(self) -> None:
        batches = self.batches(questions=2)
        losses = {name: self.step(name, batch) for name, batch in batches.items()}
        # bf16 has 8 bits: the models differ by up to 0.008. With another image, the loss changes by 0.04 or more
        if max(losses.values()) - min(losses.values()) > 0.02:
            found = ", ".join(f"{loss:.4f} ({name})" for name, loss in losses.items())
            raise ValueError(f"The models do different work: the losses are {found}.")

    def free_image_encoder(self) -> None:
        """Take the vision model and the Q-Former off the device, as training with cached features can."""
        self.ours.vision_model = self.ours.qformer = None  # also those of stock, which has the same modules

    def _encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """(num_images, queries, width)."""
        image_states = self.ours.encode_images(pixels).last_hidden_state
        return self.ours.encode_queries(image_states, torch.arange(len(pixels), device=self.device))


@torch.no_grad()
def _fill(model: nn.Module) -> None:
    """Give the model random weights, in seconds: each tensor repeats one block, from another place on."""
    std = model.config.text_config.hidden_size**-0.5  # so that the image changes the loss; 0.02 for a width of 2560
    block = torch.randn(1_000_003, device=model.device).mul_(std).bfloat16()  # a prime: no two rows are equal
    for number, parameter in enumerate(model.parameters()):
        if parameter.dim() == 1:
            parameter.zero_()
            continue
        values = block.roll(104_729 * number).repeat(-(-parameter.numel() // len(block)))
        parameter.view(-1).copy_(values[: parameter.numel()])
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.reset_parameters()
