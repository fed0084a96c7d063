"""The models: compatibility with transformers, texts that share an image, uint8 pixels, accumulation."""

import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from transformers.models.blip import modeling_blip

from blip_ft.modeling.blip import attention
from blip_ft.modeling.blip.captioning import BlipForConditionalGeneration
from blip_ft.modeling.blip.retrieval import BlipForImageTextRetrieval
from blip_ft.modeling.blip.vqa import BlipForQuestionAnswering

CLASSES = {"vqa": BlipForQuestionAnswering, "captioning": BlipForConditionalGeneration}


@pytest.fixture(params=CLASSES)
def task(request):
    return request.param


def load(golden, task):
    return CLASSES[task].from_pretrained(golden / task, dtype=torch.float64)


def grouped_batch(task, texts_per_image, seed=0):
    """Images with the given numbers of texts. Questions have different lengths and 1 to 3 answers."""
    generator = torch.Generator().manual_seed(seed)
    num_texts = sum(texts_per_image)
    lengths = torch.randint(3, 10, (num_texts,), generator=generator)
    ids = torch.randint(1, 90, (num_texts, 10), generator=generator)
    mask = (torch.arange(10) < lengths[:, None]).long()
    batch = {
        "pixel_values": torch.randn(len(texts_per_image), 3, 32, 32, generator=generator, dtype=torch.float64),
        "input_ids": ids * mask,
        "attention_mask": mask,
        "image_index": torch.repeat_interleave(torch.arange(len(texts_per_image)), torch.tensor(texts_per_image)),
    }
    if task == "captioning":
        return {**batch, "labels": batch["input_ids"].masked_fill(mask == 0, -100)}
    question_index = torch.arange(num_texts).repeat_interleave(torch.randint(1, 4, (num_texts,), generator=generator))
    answer_lengths = torch.randint(2, 6, question_index.shape, generator=generator)
    labels = torch.randint(1, 90, (len(question_index), 6), generator=generator)
    labels[torch.arange(6) >= answer_lengths[:, None]] = -100
    weights = torch.rand(len(question_index), generator=generator, dtype=torch.float64)
    return {**batch, "labels": labels, "question_index": question_index, "answer_weights": weights}


def gradient(model, *batches, **kwargs):
    """Summed loss and flat gradient of the batches."""
    model.zero_grad()
    losses = [model(**batch, **kwargs).loss for batch in batches]
    sum(losses).backward()
    return sum(losses).item(), torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("texts_per_image", [[5, 5], [1, 4, 2], [1, 1, 1]])
def test_grouped_loss_and_gradient_equal_ungrouped(golden, task, texts_per_image):
    model, batch = load(golden, task), grouped_batch(task, texts_per_image)
    repeated = {**batch, "pixel_values": batch["pixel_values"][batch["image_index"]]}
    del repeated["image_index"]
    loss, grad = gradient(model, batch)
    wanted_loss, wanted_grad = gradient(model, repeated)
    assert loss == pytest.approx(wanted_loss, abs=1e-10)
    torch.testing.assert_close(grad, wanted_grad, atol=1e-10, rtol=0)


def test_each_image_is_encoded_once(golden):
    model, batch = load(golden, "vqa"), grouped_batch("vqa", [3, 3])
    rows = []
    model.vision_model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(args[0])), with_kwargs=True
    )
    keys = []
    for layer in model.text_encoder.encoder.layer:
        layer.crossattention.self.key.register_forward_pre_hook(lambda module, args: keys.append(len(args[0])))
    model(**batch)
    assert rows == [2] and keys == [2, 2]


@pytest.mark.parametrize("num_beams", [1, 3])
def test_beams_share_keys_and_values_of_what_they_read(golden, task, num_beams):
    model, batch = load(golden, task), grouped_batch(task, [2, 1])
    decoder, rows = model.text_decoder, []
    layers = decoder.bert.encoder.layer
    for layer in layers:
        layer.crossattention.self.key.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    if task == "captioning":
        ids = model.generate(batch["pixel_values"], max_new_tokens=6, num_beams=num_beams)
    else:
        text = {name: batch[name] for name in ("input_ids", "attention_mask", "image_index")}
        ids = model.generate(pixel_values=batch["pixel_values"], **text, max_new_tokens=6, num_beams=num_beams)
    # once for all steps, with one row per image or question
    assert rows == [len(ids)] * len(layers)


def test_answers_to_one_question_share_its_keys_and_values(golden):
    model, batch = load(golden, "vqa"), grouped_batch("vqa", [2, 1])
    rows = []
    for layer in model.text_decoder.bert.encoder.layer:
        layer.crossattention.self.key.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    losses = []
    for questions in (batch["question_index"], torch.tensor([0, 0, 1, 1, 2, 2])):
        pairs = {**batch, "question_index": questions}
        for name in ("labels", "answer_weights"):
            pairs[name] = batch[name][: len(questions)]
        pairs["labels"] = pairs["labels"].repeat(len(questions), 1)[: len(questions)]
        pairs["answer_weights"] = torch.ones(len(questions), dtype=torch.float64)
        rows.clear()
        shared = model(**pairs).loss
        assert set(rows) == {3}
        alone = [
            model(
                pixel_values=batch["pixel_values"][batch["image_index"][question]][None],
                input_ids=batch["input_ids"][question : question + 1],
                attention_mask=batch["attention_mask"][question : question + 1],
                labels=pairs["labels"][answer : answer + 1],
            ).loss
            for answer, question in enumerate(questions.tolist())
        ]
        losses.append((shared.item(), sum(alone).item() / 3))
    for shared, alone in losses:
        assert shared == pytest.approx(alone, abs=1e-10)


def split(batch, task, at):
    """Split a batch after its first `at` texts. Each part has its own images and is padded to its longest text."""
    halves = []
    for texts in (slice(None, at), slice(at, None)):
        index = batch["image_index"][texts]
        images, image_index = index.unique(return_inverse=True)
        width = int(batch["attention_mask"][texts].sum(1).max())
        half = {
            "pixel_values": batch["pixel_values"][images],
            "image_index": image_index,
            "input_ids": batch["input_ids"][texts, :width],
            "attention_mask": batch["attention_mask"][texts, :width],
        }
        if task == "captioning":
            half["labels"] = batch["labels"][texts, :width]
        else:
            answers = (batch["question_index"] < at) == (texts.start is None)
            half |= {name: batch[name][answers] for name in ("labels", "answer_weights")}
            half["question_index"] = batch["question_index"][answers] - (texts.start or 0)
            longest = int((half["labels"] != -100).sum(1).max())
            half["labels"] = half["labels"][:, :longest]
        halves.append(half)
    return halves


def test_accumulation_leaves_loss_and_gradient_unchanged(golden, task):
    model, batch = load(golden, task), grouped_batch(task, [3, 1, 4])
    halves = split(batch, task, at=2)  # between two texts of one image
    num_items = sum(model.loss_items(half).sum() for half in halves)
    assert num_items == model.loss_items(batch).sum()
    loss, grad = gradient(model, *halves, num_items_in_batch=num_items)
    wanted_loss, wanted_grad = gradient(model, batch)
    assert loss == pytest.approx(wanted_loss, abs=1e-10)
    torch.testing.assert_close(grad, wanted_grad, atol=1e-10, rtol=0)


def test_vqa_loss_is_weighted_sum_over_questions(golden):
    """A slow, obvious reference: one answer at a time, with plain cross-entropy on the decoder's logits."""
    model, batch = load(golden, "vqa"), grouped_batch("vqa", [2, 1])
    total = 0.0
    for answer, question in enumerate(batch["question_index"].tolist()):
        length = int(batch["attention_mask"][question].sum())
        image = batch["pixel_values"][batch["image_index"][question]][None]
        states = model.encode_pairs(
            model.encode_images(image).last_hidden_state, batch["input_ids"][question : question + 1, :length]
        )
        ids = batch["labels"][answer]
        ids = ids[ids != -100].clone()
        targets = ids[1:].clone()
        ids[0] = 126
        logits = model.text_decoder(input_ids=ids[None], encoder_hidden_states=states).logits[0, :-1]
        total += batch["answer_weights"][answer] * cross_entropy(logits, targets, label_smoothing=0.1, reduction="sum")
    assert model(**batch).loss.item() == pytest.approx((total / 3).item(), abs=1e-10)


def test_padding_of_labels_may_be_the_pad_id(golden):
    model, batch = load(golden, "vqa"), grouped_batch("vqa", [2, 1])
    padded = {**batch, "labels": batch["labels"].masked_fill(batch["labels"] == -100, 0)}
    assert model(**padded).loss.item() == model(**batch).loss.item()


def test_answers_without_any_target_cost_nothing(golden):
    model, batch = load(golden, "vqa"), grouped_batch("vqa", [2])
    loss = model(**{**batch, "labels": torch.full_like(batch["labels"], -100)}).loss
    loss.backward()
    assert loss.item() == 0


def test_bytes_are_normalized_as_the_processor_does(golden, processor):
    model = BlipForQuestionAnswering.from_pretrained(golden / "vqa")
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    floats = processor.image_processor(
        [image.permute(1, 2, 0).numpy() for image in pixels], do_resize=False, return_tensors="pt"
    )["pixel_values"]
    seen = []
    model.vision_model.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model.encode_images(pixels)
    torch.testing.assert_close(seen[0], floats, atol=1e-6, rtol=0)


@pytest.fixture
def nan_in_new_memory(monkeypatch):
    """Make torch fill uninitialized memory with NaN, so that a weight that is not initialized is found."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("cls", [BlipForQuestionAnswering, BlipForConditionalGeneration, BlipForImageTextRetrieval])
def test_weights_that_a_checkpoint_lacks_are_initialized(golden, tmp_path, nan_in_new_memory, cls):
    cls(cls.config_class.from_pretrained(golden / "vqa")).save_pretrained(tmp_path)
    save_file({}, tmp_path / "model.safetensors", {"format": "pt"})
    model, info = cls.from_pretrained(tmp_path, output_loading_info=True)
    assert set(model.state_dict()) == info["missing_keys"]
    assert [name for name, weight in model.state_dict().items() if not weight.isfinite().all()] == []


@pytest.mark.parametrize("cls", [BlipForQuestionAnswering, BlipForConditionalGeneration, BlipForImageTextRetrieval])
def test_checkpoint_loads_in_stock_with_no_missing_and_no_unexpected_key(golden, tmp_path, cls):
    config = BlipForQuestionAnswering.config_class.from_pretrained(golden / "vqa")
    model = cls(config)
    model.save_pretrained(tmp_path)
    stock, info = getattr(modeling_blip, cls.__name__).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert stock.config.architectures == [cls.__name__]
    state = stock.state_dict()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


def test_resized_model_takes_larger_images_and_loads_in_stock(golden, tmp_path):
    model = BlipForQuestionAnswering.from_pretrained(golden / "vqa")
    pixels = torch.randn(1, 3, 48, 48)
    interpolated = model.encode_images(pixels, interpolate_pos_encoding=True).last_hidden_state
    model.resize_position_embeddings(48)
    torch.testing.assert_close(model.encode_images(pixels).last_hidden_state, interpolated)
    model.save_pretrained(tmp_path)
    stock = modeling_blip.BlipForQuestionAnswering.from_pretrained(tmp_path)
    torch.testing.assert_close(stock.vision_model(pixels).last_hidden_state, interpolated, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [24, 40])
def test_images_of_another_size_are_refused(golden, size):
    model = BlipForQuestionAnswering.from_pretrained(golden / "vqa")
    with pytest.raises(ValueError, match="image_size="):
        model.encode_images(torch.randn(1, 3, size, size))


def test_mismatched_numbers_of_images_and_texts_are_refused(golden):
    model, batch = load(golden, "vqa"), grouped_batch("vqa", [2, 1])
    with pytest.raises(ValueError, match="pass image_index"):
        model(**{**batch, "image_index": None})
    with pytest.raises(ValueError, match="pass question_index"):
        model(**{**batch, "labels": batch["labels"][:1], "question_index": None})
    with pytest.raises(ValueError, match="call generate"):
        model(pixel_values=batch["pixel_values"], input_ids=batch["input_ids"])


def test_attention_weights_come_when_asked_for_and_change_nothing(golden):
    model, batch = load(golden, "vqa"), grouped_batch("vqa", [2, 2])
    states = model.encode_images(batch["pixel_values"])
    assert states.attentions is None
    asked = model.encode_images(batch["pixel_values"], output_attentions=True)
    assert [tuple(layer.shape) for layer in asked.attentions] == [(2, 4, 17, 17)] * 2
    torch.testing.assert_close(asked.last_hidden_state, states.last_hidden_state)
    text = {name: batch[name] for name in ("input_ids", "attention_mask", "image_index")}
    plain = model.encode_pairs(states.last_hidden_state, **text)
    weighed = model.text_encoder(
        input_ids=text["input_ids"],
        attention_mask=text["attention_mask"],
        encoder_hidden_states=states.last_hidden_state,
        image_index=text["image_index"],
        output_attentions=True,
    )
    assert [tuple(layer.shape) for layer in weighed.cross_attentions] == [(4, 4, 10, 17)] * 2
    torch.testing.assert_close(weighed.last_hidden_state, plain)


def test_activation_checkpointing_trains_over_frozen_embeddings(golden, task):
    """With transformers 5.23, which adds position embeddings in place, this raises."""
    model, batch = load(golden, task).train(), grouped_batch(task, [2, 1])
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "embeddings" not in name
    trained = [p for p in model.parameters() if p.requires_grad]
    wanted = torch.autograd.grad(model(**batch).loss, trained)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    for grad, other in zip(torch.autograd.grad(model(**batch).loss, trained), wanted, strict=True):
        torch.testing.assert_close(grad, other)


def test_autocast_with_padding_gives_finite_loss_near_full_precision(golden, task):
    model, batch = CLASSES[task].from_pretrained(golden / task), grouped_batch(task, [2, 1])
    batch["pixel_values"] = batch["pixel_values"].float()
    exact = model(**batch).loss
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(**batch).loss
    assert rough.item() == pytest.approx(exact.item(), rel=0.05)


def fused(query, key, value, mask, dropout):
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)


def test_bfloat16_gradient_is_near_full_precision(golden, task):
    """On the CPU, bfloat16 attention is not fused; its error must not exceed that of the fused kernel."""
    model, batch = CLASSES[task].from_pretrained(golden / task), grouped_batch(task, [2, 3])
    batch["pixel_values"] = batch["pixel_values"].float()
    _, exact = gradient(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        _, rough = gradient(model, batch)
    with torch.autocast("cpu", torch.bfloat16), pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "_attend", fused)
        _, rough_and_fused = gradient(model, batch)
    error, fused_error = ((grad - exact).norm() for grad in (rough, rough_and_fused))
    assert error < 1.2 * fused_error < 0.05 * exact.norm()


def test_enc_start_token_equals_writing_it(golden):
    model, batch = load(golden, "vqa"), grouped_batch("vqa", [2, 1])
    written = batch["input_ids"].clone()
    written[:, 0] = 127
    wanted = model(**{**batch, "input_ids": written}).loss.item()
    model.config.question_start_token = "enc"
    assert model(**batch).loss.item() == wanted


@pytest.mark.parametrize("num_beams", [1, 3])
def test_captions_of_prompts_of_different_length_equal_each_alone(golden, num_beams):
    model = load(golden, "captioning")
    pixels = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    prompts = [[101, 1, 2, 3, 102], [101, 102], [101, 1, 8, 102]]
    ids = torch.tensor([prompt + [0] * (5 - len(prompt)) for prompt in prompts])
    batched = model.generate(pixels, ids, (ids != 0).long(), max_new_tokens=8, num_beams=num_beams)
    for row, prompt in enumerate(prompts):
        alone = model.generate(pixels[row : row + 1], torch.tensor([prompt]), max_new_tokens=8, num_beams=num_beams)[0]
        continued = batched[row, 4:].tolist()
        wanted = alone[len(prompt) - 1 :].tolist()
        end = wanted.index(102) + 1 if 102 in wanted else len(wanted)
        assert continued[:end] == wanted[:end]


def test_caption_generation_needs_no_prompt_and_leaves_inputs_alone(golden):
    model = load(golden, "captioning")
    pixels, ids = torch.randn(2, 3, 32, 32, dtype=torch.float64), torch.tensor([[101, 1, 2, 102]] * 2)
    before = ids.clone()
    assert model.generate(pixels, ids, max_new_tokens=3)[:, :3].tolist() == [[126, 1, 2]] * 2
    assert torch.equal(ids, before)
    assert model.generate(pixels, max_new_tokens=3)[:, 0].tolist() == [126, 126]


def test_image_states_take_the_place_of_pixel_values(golden, task):
    model, batch = load(golden, task), grouped_batch(task, [3, 1])
    wanted = model(**batch).loss
    pixel_values = batch.pop("pixel_values")
    image_states = model.encode_images(pixel_values).last_hidden_state
    assert torch.equal(model(**batch, image_states=image_states).loss, wanted)
    # bfloat16 keeps 8 bits
    torch.testing.assert_close(model(**batch, image_states=image_states.bfloat16()).loss, wanted, rtol=2**-8, atol=0)
    for images in ({}, {"pixel_values": pixel_values, "image_states": image_states}):
        with pytest.raises(ValueError, match="exactly one of pixel_values and image_states"):
            model(**batch, **images)
