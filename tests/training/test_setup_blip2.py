"""What load_for_training returns for BLIP-2 and InstructBLIP."""

from types import SimpleNamespace

import pytest
import torch
from golden_blip2 import every_family, expected_of
from safetensors.torch import load_file
from transformers import PreTrainedModel

from blip_ft.arguments import BlipTrainingArguments, DataArguments, ModelArguments, PeftArguments, VqaArguments
from blip_ft.arguments.families import family_of
from blip_ft.data.loading import load_splits
from blip_ft.models import ModelLoader, load_model
from blip_ft.training import setup
from blip_ft.training.setup import load_for_training, prepare_run


@pytest.fixture
def loaded_for_training(golden, image_folder, tmp_path):
    """The model that a recipe trains, loaded with --bf16."""

    def load(family, peft_args, **model_args):
        data_args = DataArguments(dataset_name=str(image_folder), eval_split="test")
        settings = {"use_cpu": True, "bf16": True, "per_device_train_batch_size": 8, "report_to": "none"}
        args = BlipTrainingArguments(output_dir=str(tmp_path / "run"), **settings)
        name = str(golden / family)
        prepared = prepare_run(
            *("vqa", ModelArguments(model_name_or_path=name, **model_args), data_args, VqaArguments(), peft_args, args)
        )
        rows, eval_rows, _ = load_splits("vqa", data_args, prepared.bad_rows_file, args.seed)
        return load_for_training(prepared, rows, eval_rows)[0]

    return load


def train_step(golden, family, model):
    """One step as the Trainer takes it."""
    inputs = load_file(golden / family / "inputs.safetensors")
    batch = {name.removeprefix("vqa_"): tensor for name, tensor in inputs.items() if name.startswith("vqa_")}
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(pixel_values=inputs["pixel_values"], **batch).loss
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    return loss.item()


@every_family
def test_trained_parts_are_float32_and_frozen_ones_bfloat16(golden, family, loaded_for_training):
    model, full = loaded_for_training(family, PeftArguments()), load_model(str(golden / family))["model"]
    assert model.language_projection.weight.requires_grad and not model.get_input_embeddings().weight.requires_grad
    for (name, parameter), wanted in zip(model.named_parameters(), full.parameters(), strict=True):
        dtype = torch.float32 if parameter.requires_grad else torch.bfloat16
        # what is trained was not rounded on the way
        assert parameter.dtype == dtype and torch.equal(parameter, wanted.to(dtype)), name
    loss = train_step(golden, family, model)
    assert loss == pytest.approx(expected_of(golden, family)["vqa"]["loss"], rel=0.05)  # bfloat16 keeps 8 bits


@every_family
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_adapter_is_float32_on_a_base_in_few_bits(golden, family, bits, loaded_for_training):
    model = loaded_for_training(family, PeftArguments(use_peft=True, **({f"load_in_{bits}bit": True} if bits else {})))
    kinds = {8: "Int8Params", 4: "Params4bit"}
    quantized = [parameter for parameter in model.parameters() if type(parameter) is not torch.nn.Parameter]
    assert {type(parameter).__name__ for parameter in quantized} == ({kinds[bits]} if bits else set())
    assert not any(parameter.is_floating_point() for parameter in quantized)
    for name, parameter in model.named_parameters():
        if type(parameter) is torch.nn.Parameter:
            assert parameter.dtype == (torch.float32 if "lora_" in name else torch.bfloat16), name
            assert parameter.requires_grad == ("lora_" in name)
    train_step(golden, family, model)


def test_parts_of_a_part_can_be_frozen_with_bf16(golden, loaded_for_training):
    freeze = "language_model,vision_model.embeddings,vision_model.encoder.layers.0,query_tokens"
    model = loaded_for_training("blip2_opt", PeftArguments(), freeze=freeze)
    assert model.query_tokens.dtype == model.vision_model.encoder.layers[0].mlp.fc1.weight.dtype == torch.bfloat16
    assert model.vision_model.encoder.layers[1].mlp.fc1.weight.dtype == torch.float32
    train_step(golden, "blip2_opt", model)


@every_family
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"answer_mode": "rank"},
            "answer_mode rank is for BLIP. .*BLIP.* generates its answers: leave out answer_mode",
        ),
        ({"question_start_token": "enc"}, "question_start_token is for BLIP"),
        ({"question_prompt": "Answer:"}, "question_prompt needs {} where the question goes, found 'Answer:'"),
        ({"max_question_tokens": 4}, "max_question_tokens 4 leaves no room for a question"),
        ({"label_smoothing": 0.1}, "label_smoothing, dropout and drop_path are for BLIP; leave them out for"),
        ({"image_size": 36}, "image_size must be a multiple of the patch size 8, found 36"),
        ({"freeze": "text_decoder"}, "There is no part text_decoder. There are vision_model, qformer"),
    ],
)
def test_what_the_families_cannot_do_is_refused_before_weights_load(
    golden, family, given, message, tmp_path, monkeypatch
):
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", None)
    model_args = {name: given[name] for name in ("label_smoothing", "image_size", "freeze") if name in given}
    vqa_args = {name: value for name, value in given.items() if name not in model_args}
    answer_list = tmp_path / "answers.txt"
    answer_list.write_text("yes")
    with pytest.raises(ValueError, match=message):
        prepare_run(
            "vqa",
            ModelArguments(model_name_or_path=str(golden / family), **model_args),
            DataArguments(dataset_name="somewhere"),
            VqaArguments(**vqa_args, answer_list=str(answer_list) if "answer_mode" in given else None),
            PeftArguments(),
            BlipTrainingArguments(output_dir=str(tmp_path / "run"), use_cpu=True, report_to="none"),
        )


@every_family
def test_float16_is_refused_with_t5_alone(golden, family):
    loader = ModelLoader(str(golden / family))
    family = family_of(loader._prepare()[1])
    args = SimpleNamespace(fp16=True)
    if family.language_model == "t5":
        with pytest.raises(ValueError, match="T5 overflows in float16. Use --bf16 instead of --fp16"):
            setup._require_support(family, VqaArguments(), args)
    else:
        setup._require_support(family, VqaArguments(), args)
