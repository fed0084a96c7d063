"""What the trainer does for several processes beyond what test_recipes sees."""

from functools import partial
from types import SimpleNamespace

import torch
from conftest import GOLDEN
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from transformers.models.blip.modeling_blip import BlipEncoderLayer

from blip_ft.attention import BlipTextLayer
from blip_ft.modeling import BlipForQuestionAnswering
from blip_ft.trainer import BlipTrainer


def evaluated_under_fsdp(rank: int) -> list[bool]:
    """Whether the model to evaluate has all the weights, which a process under FSDP has a part of."""
    model, twin = (BlipForQuestionAnswering.from_pretrained(GOLDEN / "vqa") for _ in range(2))
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    layers = {BlipEncoderLayer, BlipTextLayer}
    wrapped = FullyShardedDataParallel(
        model,
        auto_wrap_policy=partial(transformer_auto_wrap_policy, transformer_layer_cls=layers),
        use_orig_params=True,
        device_id=torch.device("cpu"),
    )
    held = sum(parameter.numel() for parameter in wrapped.parameters())
    ids = torch.ones(1, 3, dtype=int)
    trainer = SimpleNamespace(twin=twin, model_wrapped=wrapped, args=SimpleNamespace(device="cpu"))
    found = BlipTrainer._whole_model(trainer).state_dict()
    return [
        held < 0.6 * sum(parameter.numel() for parameter in twin.parameters()),
        all(torch.equal(found[name], tensor) for name, tensor in weights.items()),
        bool(wrapped(pixel_values=torch.zeros(1, 3, 32, 32), input_ids=ids, labels=ids).loss > 0),
    ]


def test_under_fsdp_a_whole_copy_is_evaluated(on_two_processes):
    assert on_two_processes(evaluated_under_fsdp) == [[True] * 3] * 2
