"""Test the loss of BLIP-2 and InstructBLIP against transformers' own classes, one answer at a time."""

from collections import Counter

import pytest
import torch
from blip2_reference import (
    ANSWERS,
    aligned_batch,
    assert_same_gradients,
    every_decoder_only_family,
    gradients,
    load,
    load_stock,
    make_batch,
    reference_loss,
    stock_batch,
)
from golden_blip2 import every_family
from peft import LoraConfig, get_peft_model
from test_golden_blip2 import CLASSES
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoProcessor

from blip_ft.modeling.blip2 import base
from blip_ft.modeling.blip2.packing import pack


def watch(model):
    """Counts rows that parts of a model read, and keeps the masks of its language model."""
    rows, masks = Counter(), []
    model.vision_model.register_forward_hook(lambda part, args, out: rows.update(vision=len(out.last_hidden_state)))
    model.qformer.register_forward_hook(lambda part, args, out: rows.update(qformer=len(out.last_hidden_state)))
    if model.config.use_decoder_only_language_model:
        model.language_model.model.register_forward_pre_hook(
            lambda part, args, inputs: masks.append(inputs["attention_mask"]), with_kwargs=True
        )
    return rows, masks


@every_family
@pytest.mark.parametrize("seed", range(3))
def test_batch_equals_one_call_of_transformers_for_each_answer(golden, family, seed):
    ours, stock = load(golden, family), load_stock(golden, family)
    batch = make_batch(golden, family, seed=seed)
    found, wanted = ours(**batch).loss, reference_loss(stock, batch)
    assert found.item() == pytest.approx(wanted.item(), abs=1e-5)
    assert_same_gradients(gradients(ours, found), gradients(stock, wanted))


@every_family
@pytest.mark.parametrize(
    ("image_index", "question_index"),
    [
        ((0, 1, 2), (0, 1, 2)),
        ((2,), (0,)),
        ((0, 0), (0,)),  # a question without an answer, and images without a question
        ((1, 1), (1, 0)),
        ((0, 1, 2), (1, 1, 1)),
        ((0, 2, 1), (2, 0, 1)),
    ],
)
def test_batch_of_any_shape_equals_transformers(golden, family, image_index, question_index):
    ours, stock = load(golden, family), load_stock(golden, family)
    batch = make_batch(golden, family, image_index, question_index)
    assert ours(**batch).loss.item() == pytest.approx(reference_loss(stock, batch).item(), abs=1e-5)


@every_family
def test_answer_of_the_end_token_alone_is_counted(golden, family):
    batch = make_batch(golden, family, (0,), (0,))
    assert batch["labels"].shape == (1, 1)
    wanted = reference_loss(load_stock(golden, family), batch).item()
    assert load(golden, family)(**batch).loss.item() == pytest.approx(wanted, abs=1e-5)


@every_family
def test_prompts_padded_on_the_left_give_the_same_loss(golden, family):
    model, batch = load(golden, family), make_batch(golden, family)
    wanted = model(**batch).loss.item()
    prompts = [ids[mask.bool()] for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    masks = [torch.ones_like(prompt) for prompt in prompts]
    batch["input_ids"] = pad_sequence(prompts, True, 1, padding_side="left")
    batch["attention_mask"] = pad_sequence(masks, True, padding_side="left")
    assert model(**batch).loss.item() == pytest.approx(wanted, abs=1e-5)


@every_family
def test_prompt_without_tokens_is_answered_from_the_image(golden, family):
    ours, batch = load(golden, family), make_batch(golden, family)
    batch["attention_mask"][0] = 0
    wanted = reference_loss(load_stock(golden, family), batch).item()
    assert ours(**batch).loss.item() == pytest.approx(wanted, abs=1e-5)


@every_decoder_only_family
def test_eager_attention_equals_sdpa(golden, family):
    batch = make_batch(golden, family)
    models = [load(golden, family, attn_implementation=name) for name in ("sdpa", "eager")]
    assert [model.language_model.config._attn_implementation for model in models] == ["sdpa", "eager"]
    wanted, found = (gradients(model, model(**batch).loss) for model in models)
    assert_same_gradients(found, wanted)


@every_decoder_only_family
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_much_padding_changes_nothing_and_gives_no_nan(golden, family, attention, monkeypatch):
    model, batch = load(golden, family, attn_implementation=attention), make_batch(golden, family)
    wanted = gradients(model, model(**batch).loss)
    monkeypatch.setattr(base, "pack", lambda *args, multiple: pack(*args, multiple=64))
    padded = {name: torch.nn.functional.pad(batch[name], (0, 9)) for name in ("input_ids", "attention_mask")}
    padded["labels"] = torch.nn.functional.pad(batch["labels"], (0, 9), value=-100)
    assert_same_gradients(gradients(model, model(**batch | padded).loss), wanted)


@every_decoder_only_family
def test_other_attention_is_refused_where_it_cannot_pack(golden, family):
    model = load(golden, family)
    model.language_model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="need attn_implementation sdpa or eager"):
        model(**make_batch(golden, family))


@every_decoder_only_family
def test_mask_has_two_dimensions_unless_a_prefix_has_two_branches(golden, family):
    model = load(golden, family)
    _, masks = watch(model)
    plain = [((0, 1, 2), (0, 1, 2)), ((0, 2), (1, 0)), ((1,), (0,))]
    branched = [((0, 1, 2), (0, 1, 1, 2)), ((0, 1), (1, 1))]
    # InstructBLIP has a prefix for each question
    shared_image = [((0, 0, 1), (0, 1, 2)), ((0, 0), (0, 1))]
    (branched if family == "blip2_opt" else plain).extend(shared_image)
    for shapes, wanted in ((plain, 2), (branched, 4)):
        for image_index, question_index in shapes:
            model(**make_batch(golden, family, image_index, question_index))
            assert masks.pop().dim() == wanted, (image_index, question_index)


def test_packed_positions_read_their_own_branch_only():
    # prompts 5 6 and 7 about one prefix of two positions; the answers 8 9, 10 11 of the first, 12 13 14 of the second
    packed = pack(
        *(2, torch.tensor([0, 0]), 1, torch.tensor([[5, 6], [7, 0]]), torch.tensor([[1, 1], [1, 0]])),
        *(torch.tensor([[8, 9, -100], [10, 11, -100], [12, 13, 14]]), torch.tensor([0, 0, 1])),
        multiple=8,
    )
    assert packed.input_ids.tolist() == [[5, 6, 8, 10, 7, 12, 13] + [0] * 7]
    assert packed.position_ids[0, :9].tolist() == [0, 1, 2, 3, 4, 4, 2, 3, 4]
    read = [[place for place, is_read in enumerate(row) if is_read] for row in packed.mask[0, 0].tolist()]
    assert read[:5] == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 4]]
    assert read[5:9] == [[0, 1, 2, 3, 5], [0, 1, 6], [0, 1, 6, 7], [0, 1, 6, 7, 8]]
    assert packed.target_column.tolist() == [3, 4, 3, 5, 6, 7, 8]
    assert len(read) == 16 and all(row[:2] == [0, 1] for row in read[9:])


@every_family
def test_each_image_is_encoded_once(golden, family):
    model = load(golden, family)
    rows, _ = watch(model)
    model(**make_batch(golden, family))
    assert rows == {"vision": 3, "qformer": 5 if family.startswith("instructblip") else 3}


@every_family
def test_image_states_and_query_states_take_the_place_of_pixel_values(golden, family):
    model, batch = load(golden, family), make_batch(golden, family)
    wanted = model(**batch).loss
    pixel_values = batch.pop("pixel_values")
    image_states = model.encode_images(pixel_values).last_hidden_state
    assert torch.equal(model(**batch, image_states=image_states).loss, wanted)
    if family.startswith("blip2"):
        query_states = model.encode_queries(image_states, batch["image_index"])
        assert torch.equal(model(**batch, query_states=query_states).loss, wanted)
    else:
        with pytest.raises(ValueError, match="do not exist for InstructBLIP"):
            model(**batch, query_states=image_states)
    for images in ({}, {"pixel_values": pixel_values, "image_states": image_states}):
        with pytest.raises(ValueError, match="exactly one of pixel_values, image_states and query_states"):
            model(**batch, **images)


@every_family
def test_activation_checkpointing_changes_no_gradient(golden, family):
    model, batch = load(golden, family), make_batch(golden, family)
    model.vision_model.requires_grad_(False)
    wanted = gradients(model.train(), model(**batch).loss)
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    assert_same_gradients(gradients(model, model(**batch).loss), wanted)


@every_family
def test_inputs_that_do_not_belong_together_are_refused(golden, family):
    model, batch = load(golden, family), make_batch(golden, family)
    refused = {
        "image_index": "Found 3 images and 5 texts: pass image_index",
        "question_index": "Found 5 questions and 7 answers: pass question_index",
    }
    if family.startswith("instructblip"):
        refused["qformer_input_ids"] = "InstructBLIP needs qformer_input_ids"
    for name, message in refused.items():
        with pytest.raises(ValueError, match=message):
            model(**batch | {name: None})
    with pytest.raises(ValueError, match="one entry for each of 5 texts, found 4"):
        model(**batch | {"image_index": batch["image_index"][:4]})


@every_family
def test_the_image_matters(golden, family):
    model, batch = load(golden, family), make_batch(golden, family)
    loss = model(**batch).loss
    assert gradients(model, loss)["language_projection.weight"].norm() > 1e-3
    other = model(**batch | {"pixel_values": batch["pixel_values"].roll(1, 0)}).loss
    assert abs(other - loss) > 1e-3


@every_family
@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_batch_of_transformers_gives_its_loss(golden, family, left):
    ours, stock = load(golden, family), load_stock(golden, family)
    batch = stock_batch(stock, aligned_batch(golden, family), left)
    found, wanted = ours(**batch), stock(**batch)
    torch.testing.assert_close(found.logits, wanted.logits)
    assert found.loss.item() == pytest.approx(wanted.loss.item(), abs=1e-6)
    items = (batch["labels"] != -100).sum()
    # twice the items: the other half are in another batch of the same step
    half = ours(**batch, num_items_in_batch=2 * items)
    assert half.loss.item() == pytest.approx(wanted.loss.item() / 2, abs=1e-6)
    assert_same_gradients(gradients(ours, 2 * half.loss), gradients(stock, wanted.loss))


@every_family
def test_another_number_of_placeholders_is_refused(golden, family):
    model = load(golden, family)
    batch = stock_batch(model, aligned_batch(golden, family))
    batch["input_ids"][1, 0] = 5
    with pytest.raises(ValueError, match="needs 4 `<image>` placeholders.*found 3"):
        model(**batch)
    with pytest.raises(ValueError, match="needs 4 `<image>` placeholders.*found 3"):
        model.generate(**{name: values for name, values in batch.items() if name != "labels"})


@every_family
def test_placeholders_with_our_inputs_are_refused(golden, family):
    model, batch = load(golden, family), aligned_batch(golden, family)
    placeholders = {name: stock_batch(model, batch)[name] for name in ("input_ids", "attention_mask", "labels")}
    with pytest.raises(ValueError, match="Remove `<image>`"):
        model(**batch | placeholders)
    image_states = model.encode_images(batch["pixel_values"][[0, 1, 2, 1]]).last_hidden_state
    qformer = {name: batch[name] for name in batch if name.startswith("qformer")}
    with pytest.raises(ValueError, match="Remove `<image>`"):
        model(image_states=image_states, **placeholders, **qformer)


@every_family
@pytest.mark.parametrize("ignored", ["nothing", "padding"])
@pytest.mark.parametrize("placeholders", [True, False])
@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_labels_that_repeat_the_prompt_are_refused(golden, family, ignored, placeholders, left):
    model = load(golden, family)
    batch = stock_batch(model, aligned_batch(golden, family), left)
    if not placeholders:
        batch["input_ids"][batch["input_ids"] == model.config.image_token_index] = 5
    batch["labels"] = batch["input_ids"].clone()
    if ignored == "padding":
        batch["labels"][batch["attention_mask"] == 0] = -100
    with pytest.raises(ValueError, match="labels repeat input_ids"):
        model(**batch)


@every_family
def test_aligned_labels_without_placeholders_are_refused(golden, family):
    model, batch = load(golden, family), aligned_batch(golden, family)
    batch["labels"] = torch.nn.functional.pad(batch["labels"], (3, 0), value=-100)
    with pytest.raises(ValueError, match="the answers alone"):
        model(**batch)


@every_family
def test_forward_without_labels_is_refused(golden, family):
    model, batch = load(golden, family), make_batch(golden, family)
    del batch["labels"]
    with pytest.raises(ValueError, match="forward needs labels"):
        model(**batch)


@every_decoder_only_family
def test_batch_of_transformers_without_labels_gives_its_logits(golden, family):
    ours, stock = load(golden, family), load_stock(golden, family)
    batch = stock_batch(stock, aligned_batch(golden, family))
    del batch["labels"]
    found = ours(**batch)
    torch.testing.assert_close(found.logits, stock(**batch).logits)
    assert found.loss is None


@every_family
def test_items_of_questions_sum_to_the_divisor(golden, family):
    model, batch = load(golden, family), make_batch(golden, family)
    items = model.loss_items(batch)
    # answers of 1 2 3 4 5 1 2 tokens, of questions 3 0 2 0 4 1 0
    weights = batch["answer_weights"].tolist()
    by_hand = [2 * weights[1] + 4 * weights[3] + 2 * weights[6], weights[5], 3 * weights[2], weights[0], 5 * weights[4]]
    assert items.tolist() == pytest.approx(by_hand)
    losses = model.answer_losses(
        model.encode_questions(**{name: batch[name] for name in batch if name not in ANSWERS}),
        batch["labels"],
        batch["question_index"],
    )
    wanted = (losses * batch["answer_weights"]).sum() / items.sum()
    assert model(**batch).loss.item() == pytest.approx(wanted.item(), abs=1e-6)


def halves_of(batch):
    """Questions 0 1 with their answers, then the others with theirs."""
    questions = len(batch["input_ids"])
    for first, end in ((0, 2), (2, questions)):
        own = (batch["question_index"] >= first) & (batch["question_index"] < end)
        half = {name: values[own] for name, values in batch.items() if name in ANSWERS}
        half["question_index"] = half["question_index"] - first
        images, half["image_index"] = batch["image_index"][first:end].unique(return_inverse=True)
        texts = [name for name in batch if name.endswith(("input_ids", "attention_mask"))]
        yield half | {name: batch[name][first:end] for name in texts} | {"pixel_values": batch["pixel_values"][images]}


@every_family
def test_accumulated_halves_equal_the_whole_batch(golden, family):
    model, batch = load(golden, family), make_batch(golden, family)
    loss = model(**batch).loss
    wanted = gradients(model, loss)
    items = model.loss_items(batch).sum()
    losses = [model(**half, num_items_in_batch=items).loss for half in halves_of(batch)]
    assert len(losses) == 2 and sum(losses).item() == pytest.approx(loss.item(), abs=1e-5)
    assert_same_gradients(gradients(model, sum(losses)), wanted)


def modes_of(model):
    return {name: part.training for name, part in model.named_children()}


@every_family
def test_frozen_parts_stay_in_evaluation_mode(golden, family):
    model = load(golden, family)
    every = dict.fromkeys(("vision_model", "qformer", "language_projection", "language_model"), True)
    assert modes_of(model.train()) == every
    model.vision_model.requires_grad_(False)
    model.language_model.requires_grad_(False)
    frozen = every | {"vision_model": False, "language_model": False}
    assert modes_of(model.train()) == frozen
    assert not any(part.training for part in model.vision_model.modules())
    assert all(part.training for part in model.qformer.modules())
    model.language_model.requires_grad_(True)
    assert modes_of(model.train()) == every | {"vision_model": False}
    assert not any(modes_of(model.eval()).values())
    model.requires_grad_(True)
    assert modes_of(model.train()) == every


@every_family
def test_no_gradient_runs_through_frozen_parts_with_lora(golden, family):
    model = load(golden, family)
    config = LoraConfig(r=2, target_modules=r".*language_model.*\.(q_proj|v_proj|q|v)")
    peft_model = get_peft_model(model, config)
    model.language_projection.requires_grad_(True)
    # PEFT calls it before it trains a quantized model: outputs of embeddings then require a gradient
    model.enable_input_require_grads()
    peft_model.train()
    assert modes_of(model) == {
        **dict.fromkeys(("vision_model", "qformer"), False),
        **dict.fromkeys(("language_projection", "language_model"), True),
    }
    required = []
    model.vision_model.register_forward_hook(lambda part, args, out: required.append(out[0].requires_grad))
    model.qformer.register_forward_hook(lambda part, args, out: required.append(out[0].requires_grad))
    peft_model(**make_batch(golden, family)).loss.backward()
    assert required == [False, False]
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert "language_projection.weight" in trained
    assert all("lora_" in name or name.startswith("language_projection") for name in trained)
    assert any(name.startswith("language_model") for name in trained)


def test_lora_leaves_a_frozen_projection_to_the_language_model(golden):
    model = load(golden, "blip2_opt")
    peft_model = get_peft_model(model, LoraConfig(r=2, target_modules=r".*language_model.*\.(q_proj|v_proj)"))
    peft_model.train()
    peft_model(**make_batch(golden, "blip2_opt")).loss.backward()
    assert not model.language_projection.training
    assert all(p.grad is not None for name, p in model.named_parameters() if "lora_" in name)


@every_family
def test_saved_checkpoint_loads_in_transformers_and_back(golden, family, tmp_path):
    ours, stock = load(golden, family), load_stock(golden, family)
    ours.save_pretrained(tmp_path / "ours")
    stock.save_pretrained(tmp_path / "stock")
    batch = stock_batch(ours, aligned_batch(golden, family))
    wanted = stock(**batch)
    for saved, loading in ((ours, type(stock)), (stock, type(ours))):
        folder = tmp_path / ("ours" if saved is ours else "stock")
        loaded, info = loading.from_pretrained(folder, output_loading_info=True)
        assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        found = loaded.eval()(**batch)
        assert torch.equal(found.logits, wanted.logits)
        assert found.loss.item() == pytest.approx(wanted.loss.item(), abs=1e-6)
        assert loaded.config.architectures == [CLASSES[family].__name__]


@every_family
def test_resized_position_table_encodes_larger_images(golden, family, tmp_path):
    model, batch = load(golden, family), make_batch(golden, family)
    batch["pixel_values"] = torch.nn.functional.interpolate(batch["pixel_values"], (48, 48))
    with pytest.raises(ValueError, match="needs images of 32 x 32 pixels, found 48 x 48"):
        model(**batch)
    wanted = model(**batch, interpolate_pos_encoding=True).loss.item()
    model.resize_position_embeddings(48)
    assert model(**batch).loss.item() == pytest.approx(wanted, abs=1e-6)
    model.save_pretrained(tmp_path)
    assert CLASSES[family].from_pretrained(tmp_path).eval()(**batch).loss.item() == pytest.approx(wanted, abs=1e-6)
    for size in (4, 44):
        with pytest.raises(ValueError, match=f"multiple of the patch size 8, found {size}"):
            model.resize_position_embeddings(size)


@every_family
def test_uint8_pixels_are_normalized_on_the_device(golden, family):
    model, batch = load(golden, family), make_batch(golden, family)
    pixels = torch.randint(0, 256, batch["pixel_values"].shape, dtype=torch.uint8)
    processor = AutoProcessor.from_pretrained(golden / family).image_processor
    floats = processor(list(pixels), return_tensors="pt", do_resize=False).pixel_values
    wanted = model(**batch | {"pixel_values": floats}).loss.item()
    assert model(**batch | {"pixel_values": pixels}).loss.item() == pytest.approx(wanted, abs=1e-5)
    aligned = stock_batch(model, aligned_batch(golden, family))
    losses = [model(**aligned | {"pixel_values": images[[0, 1, 2, 1]]}).loss.item() for images in (pixels, floats)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@every_family
def test_bfloat16_is_near_float32(golden, family):
    batch = make_batch(golden, family)
    wanted = load(golden, family)(**batch).loss.item()
    cast = load(golden, family).to(torch.bfloat16)
    # a part is kept in float32, as from_pretrained does
    loaded = load(golden, family, dtype=torch.bfloat16)
    for model in (cast, loaded):
        loss = model(**batch).loss
        assert loss.dtype == torch.float32
        # bfloat16 keeps 8 bits; a few layers add up
        assert loss.item() == pytest.approx(wanted, rel=0.02)
        assert all(gradient.isfinite().all() for gradient in gradients(model, loss).values())
