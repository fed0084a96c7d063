"""blip_ft.models with BLIP-2 and InstructBLIP, as a user calls it."""

import copy
import json

import pytest
import torch
from golden_blip2 import (
    BLUE,
    DECODER_ONLY,
    RED,
    STOCK,
    T5,
    change_json,
    every_family,
    expected_of,
    logits_of,
    questions_of,
    randomize_adapter,
    stock_batch,
)
from peft import AutoPeftModel, PeftModel
from safetensors.torch import load_file
from transformers import AutoProcessor, BitsAndBytesConfig, PreTrainedModel

import blip_ft
from blip_ft.arguments import PeftArguments
from blip_ft.arguments.families import family_of
from blip_ft.data.text_formats import texts_of
from blip_ft.modeling.adapters import add_lora
from blip_ft.models import (
    ModelLoader,
    count_parameters,
    freeze_model,
    generate_answer_blip,
    get_model_info,
    get_model_size_mb,
    load_model,
    load_model_from_path,
    prepare_inputs_for_blip,
    print_model_summary,
    save_model,
    unfreeze_model,
)


@every_family
def test_family_and_task_are_read_from_the_checkpoint(golden, family):
    model_type = "blip-2" if family.startswith("blip2") else "instructblip"
    for given in (None, "auto", model_type):
        loaded = load_model(str(golden / family), model_type=given)
        model = loaded["model"]
        assert type(model) is ModelLoader.MODEL_REGISTRY[model_type]["vqa"] and isinstance(model, STOCK[family])
        assert model.config.task == "vqa" and not model.training
        assert loaded["tokenizer"] is loaded["processor"].tokenizer
        assert loaded["image_processor"] is loaded["processor"].image_processor
    assert list(ModelLoader.MODEL_REGISTRY) == ["blip", "blip-2", "instructblip"]
    assert list(ModelLoader.MODEL_REGISTRY[model_type]) == ["vqa", "conditional_generation"]
    assert getattr(blip_ft, type(model).__name__) is getattr(blip_ft.modeling, type(model).__name__) is type(model)


@every_family
def test_another_type_or_task_is_refused_before_weights_load(golden, family, monkeypatch):
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", None)
    folder = str(golden / family)
    with pytest.raises(ValueError, match=r"has the model_type (blip-2|instructblip), and blip was asked for"):
        load_model(folder, model_type="blip")
    with pytest.raises(ValueError, match="not supported for image_text_retrieval; supported: vqa, conditional_gen"):
        load_model(folder, task="image_text_retrieval")
    for setting in ({"label_smoothing": 0.1}, {"dropout": 0.1}, {"drop_path": 0.0}):
        with pytest.raises(ValueError, match="label_smoothing, dropout and drop_path are for BLIP; leave them"):
            load_model(folder, **setting)
    with pytest.raises(ValueError, match="image_size must be a multiple of the patch size 8, found 36"):
        load_model(folder, image_size=36)


def test_task_and_prompt_that_a_recipe_wrote_are_used(golden, copied):
    folder = copied("blip2_opt")
    change_json(folder / "config.json", task="conditional_generation", prompt="a drawing of")
    config = load_model(str(folder))["model"].config
    assert (config.task, config.prompt) == ("conditional_generation", "a drawing of")
    # the prompt was trained for the other task
    config = load_model(str(folder), task="vqa")["model"].config
    assert config.task == "vqa" and not hasattr(config, "prompt")
    config = load_model(str(golden / "blip2_opt"), task="conditional_generation")["model"].config
    assert config.task == "conditional_generation"


def test_language_model_that_is_not_supported_is_named(copied):
    folder = copied("blip2_opt")
    text = json.loads((folder / "config.json").read_text())["text_config"]
    change_json(folder / "config.json", text_config={**text, "model_type": "gpt2"})
    with pytest.raises(ValueError, match="blip-2 with the language model gpt2 is not supported; supported: .*opt"):
        load_model(str(folder))


CONFIG_VALUES = [
    ("blip2_opt", "num_query_tokens", "4"),
    ("blip2_opt", "num_query_tokens", 5),
    ("blip2_opt", "prompt", 3),
    ("blip2_opt", "qformer_config", []),
    ("blip2_opt", "text_config__vocab_size", 367),
    ("blip2_opt", "text_config__hidden_size", 0),
    ("blip2_t5", "text_config__decoder_start_token_id", None),
    ("blip2_t5", "text_config__pad_token_id", 160),
    ("instructblip_t5", "qformer_config__vocab_size", 100),
    ("instructblip_vicuna", "qformer_config__num_attention_heads", 5),
]


@pytest.mark.parametrize(("family", "key", "value"), CONFIG_VALUES)
def test_config_value_of_the_wrong_kind_is_one_message(copied, family, key, value):
    path = copied(family) / "config.json"
    content = json.loads(path.read_text())
    *outer, last = key.split("__")
    (content[outer[0]] if outer else content)[last] = value
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="A value in config.json|described in its config.json|does not match its weig"):
        load_model(str(path.parent))


@every_family
def test_counting_freezing_and_information_agree(golden, family, capsys):
    model = load_model(str(golden / family))["model"]
    total = count_parameters(model)["total"]
    assert total == sum(parameter.numel() for parameter in model.parameters())
    freeze_model(model, ["language_model"])
    trained = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"query_tokens", "vision_model", "qformer", "language_projection"}
    freeze_model(model)
    unfreeze_model(model, ["qformer", "query_tokens"])
    trained = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"query_tokens", "qformer"}
    info = get_model_info(model)
    assert info["model_class"] == STOCK[family].__name__ and info["task"] == "vqa" and info["image_size"] == 32
    assert info["total_parameters"] == total and info["size_mb"] == get_model_size_mb(model)
    print_model_summary(model)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows[1:-1]] == ["vision_model", "qformer", "language_projection", "language_model"]
    # the query tokens belong to no part
    assert sum(int(row[1].replace(",", "")) for row in rows[1:-1]) == total - model.query_tokens.numel()


@every_family
def test_answers_to_a_list_equal_lavis_and_those_of_one_by_one(golden, family, answers_of):
    loaded = load_model(str(golden / family))
    max_length = 9 if family == "instructblip_vicuna" else 10  # LAVIS counts a start token for Vicuna
    answers = answers_of(family, loaded["model"], loaded["processor"], max_length=max_length)
    assert answers == [text.strip() for text in expected_of(golden, family)["vqa"]["generated"]]
    alone = [
        generate_answer_blip(loaded["model"], loaded["processor"], str(image), question, max_length, 5)
        for image, question in zip((0, 0, 0, 1, 2, 2), questions_of(golden, family), strict=True)
    ]
    assert alone == answers


@every_family
def test_prepared_inputs_go_into_forward_and_generate(golden, family, monkeypatch):
    loaded = load_model(str(golden / family))
    # with texts, a processor of transformers adds placeholders
    monkeypatch.setattr(type(loaded["processor"]), "__call__", None)
    texts = [expected_of(golden, family)["vqa"]["prompts"][row] for row in (0, 1)]
    inputs = prepare_inputs_for_blip(loaded["processor"], [RED, BLUE.convert("L")], texts, device="cpu")
    wanted = load_file(golden / family / "inputs.safetensors")
    for name in ("input_ids", "attention_mask", *(("qformer_input_ids",) if "instruct" in family else ())):
        length = inputs[name].shape[1]
        assert torch.equal(inputs[name], wanted[f"vqa_{name}"][:2, :length])
    labels = texts_of(loaded["processor"], family_of(loaded["model"].config), "vqa").encode_answers(["a dog", "two"], 9)
    loss = loaded["model"](**inputs, labels=labels).loss
    loss.backward()
    assert loss.isfinite() and loaded["model"].language_projection.weight.grad.norm() > 0
    ids = loaded["model"].generate(**inputs, max_new_tokens=3)
    assert ids.shape[0] == 2 and ids.shape[1] <= 3


@every_family
def test_saved_model_loads_in_transformers_with_the_same_logits(golden, family, tmp_path):
    loaded = load_model(str(golden / family))
    batch = stock_batch(golden, family)
    wanted = logits_of(loaded["model"], batch)
    save_model(loaded["model"], tmp_path, loaded["tokenizer"], loaded["processor"])
    stock, info = STOCK[family].from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    torch.testing.assert_close(logits_of(stock, batch), wanted)
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert type(processor) is type(loaded["processor"]) and processor.num_query_tokens == 4
    for model_class in (STOCK[family], type(loaded["model"])):
        again = load_model_from_path(tmp_path, model_class, device="cpu")
        assert type(again) is type(loaded["model"]) and torch.equal(logits_of(again, batch), wanted)
    again = load_model(str(tmp_path))
    assert again["tokenizer"]("is it a cat?").input_ids == loaded["tokenizer"]("is it a cat?").input_ids


def test_class_of_another_family_is_refused(golden):
    for family, other in (("blip2_opt", "instructblip_t5"), ("instructblip_t5", "blip2_opt")):
        with pytest.raises(ValueError, match="has the model_type .* was asked for"):
            load_model_from_path(golden / family, STOCK[other])
    with pytest.raises(ValueError, match="has the model_type blip-2, and blip was asked for"):
        load_model_from_path(golden / "blip2_opt", blip_ft.BlipForQuestionAnswering)


@every_family
def test_saved_processor_prepares_batches_on_which_transformers_answers_alike(golden, family, tmp_path):
    loaded = load_model(str(golden / family))
    save_model(loaded["model"], tmp_path, processor=loaded["processor"])
    stock, processor = STOCK[family].from_pretrained(tmp_path).eval(), AutoProcessor.from_pretrained(tmp_path)
    assert processor.tokenizer.padding_side == ("right" if family in T5 else "left")
    texts = expected_of(golden, family)["vqa"]["prompts"][:4]
    batch = processor(images=[RED, BLUE] * 2, text=texts, padding=True, return_tensors="pt")
    tokens = {"eos_token_id": expected_of(golden, family)["end_token_id"], "pad_token_id": 1, "do_sample": False}
    ids = stock.generate(**batch, **tokens, max_new_tokens=6)
    ours = loaded["model"].generate(
        **prepare_inputs_for_blip(loaded["processor"], [RED, BLUE] * 2, texts), **tokens, max_new_tokens=6
    )
    # transformers returns placeholders and prompt too, or the start token of T5
    assert ids[:, -ours.shape[1] :].tolist() == ours.tolist()


@pytest.mark.parametrize("family", T5)
def test_head_of_flan_t5_stays_apart_from_its_embeddings(golden, family, tmp_path):
    def is_tied(model):
        text = model.language_model
        assert text.encoder.embed_tokens.weight is text.decoder.embed_tokens.weight is text.shared.weight
        return text.lm_head.weight is text.shared.weight

    model = load_model(str(golden / family))["model"]
    state = model.state_dict()
    meta_model = ModelLoader(str(golden / family))._prepare()[0]
    from_config = type(model)(copy.deepcopy(model.config))
    from_config.load_state_dict(state)
    for other in (model, meta_model, from_config, copy.deepcopy(model), copy.deepcopy(meta_model)):
        other.tie_weights()
        assert not is_tied(other) and count_parameters(other)["total"] == count_parameters(model)["total"]
    torch.nn.init.normal_(model.language_model.lm_head.weight)
    wanted = model.language_model.lm_head.weight
    for number in range(2):
        model.save_pretrained(tmp_path / str(number))
        model = load_model(str(tmp_path / str(number)), load_processor=False)["model"]
        stock = STOCK[family].from_pretrained(tmp_path / str(number))
        for other in (model, stock):
            assert torch.equal(other.language_model.lm_head.weight, wanted) and not is_tied(other)
            assert other.language_model.config.scale_decoder_outputs is False


@every_family
def test_resized_model_saves_its_size_for_transformers(golden, family, tmp_path):
    loaded = load_model(str(golden / family), image_size=48)
    assert loaded["image_processor"].size == {"height": 48, "width": 48}
    assert loaded["model"].encode_images(torch.zeros(1, 3, 48, 48)).last_hidden_state.shape[1] == 37
    save_model(loaded["model"], tmp_path, processor=loaded["processor"])
    stock, info = STOCK[family].from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()) and stock.config.vision_config.image_size == 48
    batch = stock_batch(golden, family)
    batch["pixel_values"] = torch.randn(2, 3, 48, 48)
    torch.testing.assert_close(logits_of(stock, batch), logits_of(loaded["model"], batch))


@every_family
def test_half_precision_and_device_map_answer(golden, family, answers_of):
    loaded = load_model(str(golden / family), dtype="bfloat16")
    assert {parameter.dtype for parameter in loaded["model"].parameters()} == {torch.bfloat16}
    assert all(answers_of(family, loaded["model"], loaded["processor"]))
    # transformers keeps some weights in float32 then
    loaded = load_model(str(golden / family), torch_dtype="float16")
    assert {parameter.dtype for parameter in loaded["model"].parameters()} == {torch.float16, torch.float32}
    assert all(answers_of(family, loaded["model"], loaded["processor"]))
    full = load_model(str(golden / family))
    mapped = load_model(str(golden / family), device_map={"": "cpu"})
    answers = answers_of(family, full["model"], full["processor"])
    assert answers_of(family, mapped["model"], mapped["processor"]) == answers
    names = {type(module).__name__ for module in full["model"].modules()}
    # layers that a map must not split are found by the names of classes
    assert names & set(full["model"]._no_split_modules)


UNQUANTIZED = ("qformer", "language_projection", "lm_head")


@every_family
@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_model_answers_and_leaves_small_parts_alone(golden, family, bits, answers_of, tmp_path):
    loaded = load_model(str(golden / family), **{f"load_in_{bits}bit": True}, device="cpu")
    model = loaded["model"]
    kinds = {"Linear8bitLt", "Linear4bit"}
    quantized = {name for name, module in model.named_modules() if type(module).__name__ in kinds}
    assert {name.split(".")[0] for name in quantized} == {"vision_model", "language_model"}
    assert not any(part in name.split(".") for name in quantized for part in UNQUANTIZED)
    full = load_model(str(golden / family))["model"]
    assert count_parameters(model)["total"] == count_parameters(full)["total"]
    assert torch.equal(model.language_projection.weight, full.language_projection.weight)
    answers = answers_of(family, model, loaded["processor"])
    assert any(answers)
    batch = stock_batch(golden, family)
    assert (logits_of(model, batch) - logits_of(full, batch)).abs().mean() < 0.5
    save_model(model, tmp_path, processor=loaded["processor"])
    again = load_model(str(tmp_path))
    assert answers_of(family, again["model"], again["processor"]) == answers


def test_projection_that_transformers_quantized_is_not_cast_to_integers(golden, answers_of, tmp_path):
    """transformers quantizes the projection too, and its packed weight is uint8."""
    stock = STOCK["blip2_t5"].from_pretrained(
        golden / "blip2_t5", quantization_config=BitsAndBytesConfig(load_in_4bit=True), device_map={"": "cpu"}
    )
    assert stock.language_projection.weight.dtype == torch.uint8
    processor = load_model(str(golden / "blip2_t5"))["processor"]
    save_model(stock, tmp_path, processor=processor)
    model, full = load_model(str(tmp_path))["model"], load_model(str(golden / "blip2_t5"))["model"]
    assert model.language_projection.weight.dtype == torch.uint8
    read = [
        part.encode_questions(torch.zeros(1, 3, 32, 32), input_ids=torch.tensor([[5, 1]])).queries
        for part in (model, full)
    ]
    assert torch.corrcoef(torch.stack([states.flatten() for states in read]))[0, 1] > 0.95


@every_family
def test_lora_adapts_the_language_model_alone_and_loads_in_peft(golden, family, tmp_path):
    model = load_model(str(golden / family))["model"]
    batch = stock_batch(golden, family)
    base = logits_of(model, batch)
    model.config.task, model.config.prompt = "conditional_generation", "a drawing of"
    adapted = randomize_adapter(add_lora(model, PeftArguments(use_peft=True)))
    targeted = adapted.base_model.targeted_module_names
    layers = {"blip2_opt": 2 * 6, "instructblip_vicuna": 2 * 7}.get(family, 2 * (4 + 3) + 2 * (8 + 3))
    assert len(targeted) == layers and all(name.startswith("language_model.") for name in targeted)
    assert not any("lm_head" in name for name in targeted)
    names = {name.rsplit(".", 1)[1] for name in targeted}
    pattern = family_of(model.config).lora_targets
    assert all(name in pattern for name in names)
    wanted = logits_of(adapted, batch)
    assert (wanted - base).abs().max() > 1e-3
    save_model(adapted, tmp_path)
    model.config.save_pretrained(tmp_path)  # as the recipes do
    stock = STOCK[family].from_pretrained(golden / family)
    for other in (PeftModel.from_pretrained(stock, tmp_path), AutoPeftModel.from_pretrained(tmp_path)):
        assert isinstance(other.get_base_model(), STOCK[family])
        torch.testing.assert_close(logits_of(other, batch), wanted, atol=1e-4, rtol=1e-4)
    ours, merged = (load_model(str(tmp_path), merge=merge)["model"] for merge in (False, True))
    assert isinstance(ours, PeftModel) and type(merged) is type(model)
    for other in (ours, merged):
        torch.testing.assert_close(logits_of(other, batch), wanted, atol=1e-4, rtol=1e-4)  # merging rounds
    for config in (ours.get_base_model().config, merged.config):
        assert (config.task, config.prompt) == ("conditional_generation", "a drawing of")


@every_family
def test_merged_adapter_answers_as_before_with_its_image_size(golden, family, tmp_path):
    loaded = load_model(str(golden / family), image_size=48)
    adapted = randomize_adapter(add_lora(loaded["model"], PeftArguments(use_peft=True)))
    save_model(adapted, tmp_path)
    loaded["model"].config.save_pretrained(tmp_path)
    loaded_again = [load_model(str(tmp_path), merge=merge) for merge in (False, True)]
    questions = questions_of(golden, family)
    answers = [
        generate_answer_blip(part["model"], part["processor"], [RED] * 6, questions, 6)
        for part in ({"model": adapted, "processor": loaded["processor"]}, *loaded_again)
    ]
    assert answers[0] == answers[1] == answers[2]
    assert loaded_again[1]["model"].config.vision_config.image_size == 48


@pytest.mark.parametrize("family", [*DECODER_ONLY, "blip2_t5"])
def test_head_of_the_language_model_is_no_target(golden, family):
    model = load_model(str(golden / family))["model"]
    names = ["q", "lm_head"] if family in T5 else ["q_proj", "lm_head"]
    with pytest.raises(ValueError, match="lm_head matches none. The head .* cannot be adapted"):
        add_lora(model, PeftArguments(use_peft=True, lora_target_modules=names))
