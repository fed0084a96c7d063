"""BLIP-2 and InstructBLIP in parts of a batch, on two processes, and sharded; test_engines has whole runs."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from conftest import GOLDEN, RECIPES, results_of
from programs import run_ranks
from safetensors.torch import load_file
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from blip_ft.modeling.blip2 import Blip2ForConditionalGeneration, InstructBlipForConditionalGeneration
from blip_ft.training.engines import layers_to_shard
from blip_ft.training.trainer import BlipTrainer

CLASSES = {
    "blip2_opt": Blip2ForConditionalGeneration,
    "blip2_t5": Blip2ForConditionalGeneration,
    "instructblip_vicuna": InstructBlipForConditionalGeneration,
    "instructblip_t5": InstructBlipForConditionalGeneration,
}

# with SGD a change of the weights is the gradient times the learning rate
STEPS = ["--optim", "sgd", "--learning_rate", "0.01", "--lr_scheduler_type", "constant", "--weight_decay", "0"]
STEPS += ["--warmup_steps", "0", "--max_steps", "3", "--logging_steps", "1", "--save_strategy", "no"]
STEPS += ["--max_train_samples", "60", "--max_eval_samples", "6", "--generation_num_beams", "1", "--skip_dry_run"]


def numbers_of(folder):
    """Loss and gradient norm of each step, and the loss of the evaluation."""
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    steps = [[entry[name] for name in ("loss", "grad_norm")] for entry in log if "loss" in entry]
    return [*sum(steps, []), results_of(folder)["eval_loss"]]


def largest_difference(folder, other, start):
    """Norm of a tensor's difference between two runs, relative to the norm of the change of all weights."""
    start, one, two = (load_file(path / "model.safetensors") for path in (start, folder, other))
    assert one.keys() == two.keys()
    scale = torch.stack([(two[name] - start[name]).norm() for name in two]).norm()
    return max(((one[name] - two[name]).norm() / scale).item() for name in two)


@pytest.mark.parametrize(
    "model", [pytest.param(name, marks=[] if name == "blip2_t5" else pytest.mark.slow) for name in CLASSES]
)
def test_parts_and_two_processes_give_the_loss_and_weights_of_one_batch(recipe, tmp_path, monkeypatch, model):
    items = []

    def count(self, batches, device, run=BlipTrainer._get_num_items_in_batch):
        items.append([self.blip.loss_items(batch).sum().item() for batch in batches])
        return run(self, batches, device)

    monkeypatch.setattr(BlipTrainer, "_get_num_items_in_batch", count)
    flags = ["--model_name_or_path", str(GOLDEN / model), "--dataset_name", "demo", "--freeze", "none", *STEPS]
    size = "--per_device_train_batch_size"
    one = recipe(*flags, size, "8", output_dir=tmp_path / "one")
    parts = recipe(*flags, size, "2", "--gradient_accumulation_steps", "4", output_dir=tmp_path / "parts")
    # the first three steps are of the run in one batch; the parts of each other step have different numbers of tokens
    assert [sum(step) for step in items[3:]] == [sum(step) for step in items[:3]]
    assert all(len(step) == 4 and len(set(step)) > 1 for step in items[3:])

    two = tmp_path / "two"
    flags += [size, "2", "--gradient_accumulation_steps", "2", "--use_cpu", "--dataloader_num_workers", "0"]
    for code, errors in run_ranks(RECIPES / "vqa.py", *flags, "--output_dir", two, folder=tmp_path / "said"):
        assert code == 0, errors[-3000:]

    for folder in (parts, two):
        assert numbers_of(folder) == pytest.approx(numbers_of(one), rel=1e-5)
        assert largest_difference(folder, one, GOLDEN / model) < 1e-5


def test_tying_the_head_of_t5_under_fsdp_is_refused_before_weights_load(recipe, monkeypatch, caplog):
    """accelerate 1.15 calls tie_weights() with this setting, and the config of Flan-T5 says that its head is tied."""
    for name, value in {"USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}.items():
        monkeypatch.setenv(name if name.startswith("FSDP") else f"ACCELERATE_{name}", value)
    monkeypatch.setattr(Blip2ForConditionalGeneration, "from_pretrained", None)
    with pytest.raises(SystemExit):
        recipe("--model_name_or_path", str(GOLDEN / "blip2_t5"), "--dataset_name", "demo")
    assert "Set fsdp_cpu_ram_efficient_loading: false" in caplog.messages[-1]


def test_unsharded_copy_of_t5_has_an_untied_head():
    """BlipTrainer makes its eval_copy so; a second model of the same config would have a tied head."""
    model = Blip2ForConditionalGeneration.from_pretrained(GOLDEN / "blip2_t5")
    copied = copy.deepcopy(model)
    assert len(list(copied.parameters())) == len(list(model.parameters()))
    assert copied.language_model.lm_head.weight is not copied.language_model.shared.weight
    assert all(torch.equal(tensor, copied.state_dict()[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("own", [[], ["--use_peft"]], ids=["whole", "LoRA"])
def test_weight_decay_spares_biases_and_norms(recipe, monkeypatch, own):
    decays = {}

    def create(self, *args, run=BlipTrainer.create_optimizer, **kwargs):
        optimizer = run(self, *args, **kwargs)
        of = {id(weight): group["weight_decay"] for group in optimizer.param_groups for weight in group["params"]}
        trained = {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}
        decays.update({name: (of[id(weight)], weight.dim()) for name, weight in trained.items()})
        return optimizer

    monkeypatch.setattr(BlipTrainer, "create_optimizer", create)
    model = ["--model_name_or_path", str(GOLDEN / "blip2_opt"), "--dataset_name", "demo"]
    recipe(*model, *STEPS, *own, "--max_steps", "1", "--weight_decay", "0.05", "--per_device_train_batch_size", "2")
    # a bias of more than one dimension does not exist here
    assert {name: decay for name, (decay, _) in decays.items()} == {
        name: 0.0 if dim < 2 else 0.05 for name, (_, dim) in decays.items()
    }
    if own:
        assert all(".lora_" in name for name in decays)
    else:
        assert decays["query_tokens"][0] == decays["language_projection.weight"][0] == 0.05
        assert decays["language_projection.bias"][0] == decays["vision_model.post_layernorm.weight"][0] == 0


def test_fsdp_leaves_the_names_and_shapes_that_choose_the_decay():
    """Under FSDP2 the Trainer creates the optimizer from sharded weights, under ZeRO from whole ones."""
    model = Blip2ForConditionalGeneration.from_pretrained(GOLDEN / "blip2_opt")

    def decayed() -> list[str]:
        return BlipTrainer.get_decay_parameter_names(SimpleNamespace(blip=model), model)

    whole = decayed()
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for module in list(model.modules()):
            if type(module).__name__ in layers_to_shard(model):
                fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)
    finally:
        distributed.destroy_process_group()
    assert all(isinstance(weight, DTensor) for weight in model.parameters())
    assert decayed() == whole and 0 < len(whole) < len(list(model.parameters()))


@pytest.mark.parametrize("model", CLASSES)
def test_layers_are_sharded_and_placed_by_the_names_of_classes_that_the_model_has(model):
    loaded = CLASSES[model].from_pretrained(GOLDEN / model)
    classes = {type(module).__name__ for module in loaded.modules()}
    assert set(loaded._no_split_modules) <= classes
    layers, prefix = layers_to_shard(loaded), CLASSES[model].__name__.removesuffix("ForConditionalGeneration")
    text = {"blip2_opt": "OPTDecoderLayer", "instructblip_vicuna": "LlamaDecoderLayer"}.get(model, "T5Block")
    assert layers == sorted([f"{prefix}EncoderLayer", f"{prefix}QFormerLayer", text])
