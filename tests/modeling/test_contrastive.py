"""The retrieval loss: queue, momentum, negatives, texts that share an image, processes, adapters and saving."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import distributed
from transformers.models.blip import modeling_blip

from blip_ft.modeling.blip.contrastive import Contrastive, draw_negatives, gather, nearest_is_right
from blip_ft.modeling.blip.retrieval import BlipForImageTextRetrieval


def load(golden, queue_size=7, dtype=torch.float64, **settings):
    model = BlipForImageTextRetrieval.from_pretrained(golden / "retrieval", dtype=dtype).train()
    model.contrastive = Contrastive(model, queue_size, **settings)
    return model


def pairs_of(texts_per_image, seed=0):
    """Images with the given numbers of texts, image ids 10, 11, ..., and random negatives."""
    generator = torch.Generator().manual_seed(seed)
    image_index = torch.repeat_interleave(torch.arange(len(texts_per_image)), torch.tensor(texts_per_image))
    lengths = torch.randint(3, 10, image_index.shape, generator=generator)
    mask = (torch.arange(10) < lengths[:, None]).long()
    ids = torch.randint(1, 90, mask.shape, generator=generator)
    ids[:, 0] = 101
    return {
        "pixel_values": torch.randn(len(texts_per_image), 3, 32, 32, generator=generator, dtype=torch.float64),
        "input_ids": ids * mask,
        "attention_mask": mask,
        "image_ids": torch.arange(len(texts_per_image)) + 10,
        "image_index": image_index,
        "negatives": torch.randint(len(image_index), (2, len(image_index)), generator=generator),
    }


def unit(*shape):
    return torch.nn.functional.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


@pytest.mark.parametrize("queue_size", [0, 1, 5, 7])
def test_queue_keeps_the_newest_pairs_of_batches_of_any_size(golden, queue_size):
    state = load(golden, queue_size).contrastive
    images, texts, ids = unit(24, 16), unit(24, 16), torch.arange(24)
    start = 0
    for size in (3, 1, 11, 2, 7):
        batch = slice(start, start := start + size)
        state.enqueue(images[batch], texts[batch], ids[batch])
        kept = range(max(0, start - queue_size), start)
        rows = [number % queue_size for number in kept]
        assert torch.equal(state.id_queue[rows], ids[list(kept)])
        assert torch.equal(state.image_queue[rows], images[list(kept)])
        assert torch.equal(state.text_queue[rows], texts[list(kept)])


@pytest.mark.parametrize("queue_size", [0, 3, 50])
def test_contrast_is_over_the_batch_and_what_was_queued(golden, queue_size):
    """A slow, obvious reference, one pair at a time. A queue of 50 is not full, and empty rows must not count."""
    state = load(golden, queue_size, temperature=0.2).contrastive
    queued_images, queued_texts, queued_ids = unit(4, 16), unit(4, 16), torch.tensor([1, 2, 3, 4])
    state.enqueue(queued_images, queued_texts, queued_ids)
    state.begin_step(epochs_done=0.5)
    image, text, image_key, text_key = unit(3, 16), unit(3, 16), unit(3, 16), unit(3, 16)
    ids = torch.tensor([4, 9, 4])
    newest = slice(4 - min(4, queue_size), 4)
    total = 0
    for row in range(3):
        for feature, key, keys, queued in (
            (image[row], image_key[row], text_key, queued_texts),
            (text[row], text_key[row], image_key, queued_images),
        ):
            others, other_ids = [*keys, *queued[newest]], [*ids.tolist(), *queued_ids[newest].tolist()]
            right = [float(other == ids[row]) for other in other_ids]
            soft = torch.stack([key @ other / 0.2 for other in others]).softmax(0)
            log_odds = torch.stack([feature @ other / 0.2 for other in others]).log_softmax(0)
            for n in range(len(others)):
                total -= (0.2 * soft[n] + 0.8 * right[n] / sum(right)) * log_odds[n] / 6
    loss = state.loss(image, text, image_key, text_key, ids)
    assert loss.item() == pytest.approx(total.item(), abs=1e-10)


def test_temperature_is_kept_within_bounds(golden):
    state = load(golden).contrastive
    for value, wanted in ((0.7, 0.5), (-0.1, 0.001), (0.3, 0.3)):
        state.temperature.data.fill_(value)
        state.begin_step(epochs_done=0)
        assert state.temperature.item() == pytest.approx(wanted)


def test_steps_leave_no_gradient_of_the_temperature_to_the_next(golden):
    """The Trainer calls model.zero_grad(), which does not reset the temperature's gradient."""
    model, batch = load(golden, queue_size=0), pairs_of([2, 1])
    gradients = []
    for _ in range(2):
        model.contrastive.begin_step(epochs_done=0)
        model(**batch).loss.backward()
        gradients.append(model.contrastive.temperature.grad.item())
    assert gradients[0] == gradients[1]


def test_negatives_are_drawn_by_softmax_among_other_images():
    logits = torch.tensor([0.0, 1.0, 2.0, 3.0]).repeat(20000, 1)
    same = torch.tensor([False, False, False, True]).expand_as(logits)
    share = draw_negatives(logits, same).bincount(minlength=4) / 20000
    # four standard deviations are 0.014
    torch.testing.assert_close(share, torch.tensor([0.0900, 0.2447, 0.6652, 0.0]), atol=0.014, rtol=0)


def test_negatives_are_drawn_where_every_weight_beside_the_own_rounds_to_zero():
    logits = torch.tensor([[1000.0, -1000.0, -1001.0], [0.0, 0.0, 0.0]])
    same = torch.tensor([[True, False, False], [True, True, True]])
    drawn = draw_negatives(logits, same)
    assert drawn[0] in (1, 2) and drawn[1] == -1


def test_pairs_of_one_image_are_never_negatives(golden, monkeypatch):
    model, batch = load(golden), pairs_of([2, 1, 3])
    batch["image_ids"] = torch.tensor([5, 6, 5])
    drawn = []
    monkeypatch.setattr(
        "blip_ft.modeling.blip.retrieval.draw_negatives", lambda *args: drawn.append(draw_negatives(*args)) or drawn[-1]
    )
    for _ in range(10):
        model(**{**batch, "negatives": None})
    for negatives in drawn:
        assert [row == 2 for row in negatives.tolist()] == [True, True, False, True, True, True]


def test_a_batch_of_one_image_has_no_negatives_and_trains(golden):
    model, batch = load(golden), pairs_of([3])
    output = model(**{**batch, "negatives": None})
    output.loss.backward()
    model.eval()
    scores = model(**{name: batch[name] for name in ("pixel_values", "input_ids", "attention_mask", "image_index")})
    assert output.loss_itm.item() == pytest.approx(-scores.itm_score.log_softmax(1)[:, 1].mean().item(), abs=1e-10)
    assert all(p.grad.isfinite().all() for p in model.parameters())


def gradient(model, batch):
    model.zero_grad()
    output = model(**batch)
    output.loss.backward()
    return output, torch.cat([p.grad.flatten() for p in (*model.parameters(), model.contrastive.temperature)])


@pytest.mark.parametrize("texts_per_image", [[2, 2, 2], [1, 3, 2]])
def test_grouped_loss_gradient_and_queue_equal_ungrouped(golden, texts_per_image):
    batch = pairs_of(texts_per_image)
    index = batch["image_index"]
    repeated = {**batch, "pixel_values": batch["pixel_values"][index], "image_ids": batch["image_ids"][index]}
    del repeated["image_index"]
    results = []
    for each in (batch, repeated):
        model = load(golden)
        model.contrastive.temperature.grad = None
        model.contrastive.begin_step(epochs_done=1)
        output, grad = gradient(model, each)
        results.append((output.loss_itc, output.loss_itm, grad, model.contrastive.image_queue))
    for ours, wanted in zip(*results, strict=True):
        torch.testing.assert_close(ours, wanted, atol=1e-10, rtol=0)


def test_each_image_is_encoded_once_by_model_and_momentum(golden):
    model, batch = load(golden), pairs_of([2, 3])
    rows, keys = [], []
    model.vision_model.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    for layer in model.text_encoder.encoder.layer:
        layer.crossattention.self.key.register_forward_pre_hook(lambda module, args: keys.append(len(args[0])))
    model(**batch)
    assert rows == [2, 2] and keys == [2, 2]


def test_queue_stands_still_in_evaluation(golden):
    model, batch = load(golden).eval(), pairs_of([2, 3])
    with torch.no_grad():
        loss = model(**batch).loss
    assert loss.isfinite() and model.contrastive.num_queued == 0


def take_steps(model, batches):
    """Train on the batches and return their losses. The temperature is trained too."""
    optimizer = torch.optim.SGD([*model.parameters(), model.contrastive.temperature], lr=0.01)
    losses = []
    for batch in batches:
        model.contrastive.begin_step(epochs_done=1)
        optimizer.zero_grad()
        output = model(**batch)
        output.loss.backward()
        optimizer.step()
        losses.append(output.loss.item())
    return losses


def test_saved_state_goes_on_bitwise(golden, tmp_path):
    batches = [pairs_of([2, 1, 2], seed) for seed in range(4)]
    model = load(golden)
    take_steps(model, batches[:2])
    model.contrastive.save(tmp_path / "contrastive.safetensors")
    resumed = load(golden)
    resumed.load_state_dict(model.state_dict())
    parameter = resumed.contrastive.temperature
    resumed.contrastive.load(tmp_path / "contrastive.safetensors")
    assert resumed.contrastive.temperature is parameter  # the optimizer refers to this object
    assert take_steps(resumed, batches[2:]) == take_steps(model, batches[2:])
    for name, weight in model.contrastive.momentum_weights.items():
        assert torch.equal(resumed.contrastive.momentum_weights[name], weight)
    with pytest.raises(ValueError, match="Resume with that run's queue_size"):
        load(golden, queue_size=8).contrastive.load(tmp_path / "contrastive.safetensors")


def test_trained_model_holds_stock_keys_and_scores_as_stock(golden, tmp_path):
    model, batch = load(golden), pairs_of([1, 1, 1])
    take_steps(model, [batch])
    model.eval().save_pretrained(tmp_path)
    stock, info = modeling_blip.BlipForImageTextRetrieval.from_pretrained(
        tmp_path, dtype=torch.float64, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.state_dict().keys() == stock.state_dict().keys()
    inputs = {name: batch[name] for name in ("pixel_values", "input_ids", "attention_mask")}
    for use_itm_head in (True, False):
        ours, wanted = (each(**inputs, use_itm_head=use_itm_head) for each in (model, stock))
        for name in ("itm_score", "question_embeds", "last_hidden_state"):
            torch.testing.assert_close(ours[name], wanted[name], atol=1e-10, rtol=0)
    model.config.itm_start_token = "enc"
    written = inputs["input_ids"].clone()
    written[:, 0] = 127
    wanted = stock(**{**inputs, "input_ids": written}).itm_score
    torch.testing.assert_close(model(**inputs).itm_score, wanted, atol=1e-10, rtol=0)


def test_one_image_goes_with_all_texts_as_in_stock(golden):
    model, batch = load(golden).eval(), pairs_of([3])
    stock = modeling_blip.BlipForImageTextRetrieval.from_pretrained(golden / "retrieval", dtype=torch.float64)
    inputs = {name: batch[name] for name in ("pixel_values", "input_ids", "attention_mask")}
    torch.testing.assert_close(model(**inputs).itm_score, stock(**inputs).itm_score, atol=1e-10, rtol=0)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_adapters_train_under_checkpointing_with_a_momentum_copy_of_their_own(golden, use_reentrant):
    base, batch = load(golden, dtype=torch.float32), pairs_of([2, 1])
    batch["pixel_values"] = batch["pixel_values"].float()
    config = LoraConfig(target_modules=["query", "value", "qkv"], modules_to_save=["itm_head", "text_proj"])
    model = get_peft_model(base, config)
    state = base.contrastive = Contrastive(base, queue_size=7)
    assert all("lora_" in name or "text_proj.modules_to_save" in name for name in state.momentum_weights)
    before = {name: weight.clone() for name, weight in state.momentum_weights.items()}
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    optimizer = torch.optim.AdamW([*model.parameters(), state.temperature], lr=0.01)
    losses = []
    for _ in range(3):
        state.begin_step(epochs_done=1)
        optimizer.zero_grad()
        output = model(**batch)
        output.loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        optimizer.step()
        losses.append(output.loss_itm.item())  # loss_itc grows with the queue
    assert losses[-1] < losses[0]
    assert all((weight != before[name]).any() for name, weight in state.momentum_weights.items())


def test_checkpointing_leaves_loss_and_gradient_unchanged(golden):
    batch = pairs_of([2, 1, 2])
    output, wanted = gradient(load(golden), batch)
    model = load(golden)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    again, grad = gradient(model, batch)
    assert again.loss.item() == output.loss.item()
    torch.testing.assert_close(grad, wanted, atol=1e-10, rtol=0)


def test_autocast_computes_with_the_momentum_weights_near_full_precision(golden):
    batch = pairs_of([2, 1, 2])
    batch["pixel_values"] = batch["pixel_values"].float()
    losses = []
    for enabled in (False, True):
        model = load(golden, dtype=torch.float32)
        model.contrastive.begin_step(epochs_done=1)
        # different from the model's weights, so that using those by mistake would change the loss
        for weight in model.contrastive.momentum_weights.values():
            weight.mul_(1.5)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output = model(**batch)
        output.loss.backward()
        losses += [output.loss_itc.item(), model.contrastive.image_queue]
    assert losses[2] == pytest.approx(losses[0], rel=0.05)
    torch.testing.assert_close(losses[3], losses[1], atol=0.05, rtol=0)


def test_loss_without_state_or_with_missing_ids_says_what_to_do(golden):
    model, batch = load(golden), pairs_of([2, 1])
    with pytest.raises(ValueError, match="one id for each of 2 images, found 3"):
        model(**{**batch, "image_ids": torch.arange(3)})
    model.contrastive = None
    with pytest.raises(ValueError, match=r"model.contrastive = Contrastive\(model\)"):
        model(**batch)


UNEQUAL = [2, 1], [1, 2, 1]  # texts per image on the first and on the second process: 3 and 4 pairs


def part_of(batch, rank):
    """Images and texts of one process, padded to its longest text. Negatives are numbered over all pairs."""
    images, texts = (slice(0, 2), slice(0, 3)) if rank == 0 else (slice(2, 5), slice(3, 7))
    longest = int(batch["attention_mask"][texts].sum(1).max())
    return {
        "pixel_values": batch["pixel_values"][images],
        "image_ids": batch["image_ids"][images],
        "image_index": batch["image_index"][texts] - images.start,
        "input_ids": batch["input_ids"][texts, :longest],
        "attention_mask": batch["attention_mask"][texts, :longest],
        "negatives": batch["negatives"][:, texts],
    }


def match_unequal_parts(rank, golden):
    rows, start = gather(torch.full((rank + 1, 2 - rank), 1.0 + rank))
    assert rows.tolist() == [[1, 1], [2, 0], [2, 0]] and start == rank
    model, batch = load(golden), pairs_of(sum(UNEQUAL, []))
    output = model(**part_of(batch, rank))
    share = (3, 4)[rank] / 7
    trained = [p for name, p in model.named_parameters() if "_proj" not in name]
    grads = torch.cat([grad.flatten() for grad in torch.autograd.grad(output.loss_itm * share, trained)])
    distributed.all_reduce(grads)
    return output.loss_itm.item() * share, grads.tolist(), model.contrastive.id_queue.tolist()


def test_processes_with_unequal_batches_match_as_one_batch_does(golden, on_two_processes):
    (first_loss, grads, first_queue), (second_loss, _, second_queue) = on_two_processes(match_unequal_parts, golden)
    model = load(golden)
    loss = model(**pairs_of(sum(UNEQUAL, []))).loss_itm
    trained = [p for name, p in model.named_parameters() if "_proj" not in name]
    wanted = torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, trained)])
    assert first_loss + second_loss == pytest.approx(loss.item(), abs=1e-10)
    torch.testing.assert_close(torch.tensor(grads, dtype=torch.float64), wanted, atol=1e-10, rtol=0)
    assert first_queue == second_queue == model.contrastive.id_queue.tolist()


def test_in_batch_accuracy_is_of_the_batch_alone_and_any_text_of_the_image_is_right():
    towards_images = torch.tensor([[0.9, 0.1, 0.0], [0.0, 0.2, 0.8], [0.7, 0.0, 0.1]])
    towards_texts = torch.tensor([[0.0, 0.9, 0.1], [0.0, 0.2, 0.1], [0.0, 0.0, 0.1]])
    same = torch.tensor([[1, 0, 0], [0, 1, 1], [0, 1, 1]]).bool()
    # images for texts: right, right, wrong; texts for images: wrong, right, right
    assert nearest_is_right((towards_images, towards_texts), same).item() == pytest.approx(400 / 6)


def test_in_batch_accuracy_does_not_depend_on_the_queue(golden):
    batch = pairs_of([1, 2, 1, 3])
    accuracies, losses = set(), set()
    for queued in (0, 7):
        model = load(golden)
        model.contrastive.enqueue(unit(queued, 16), unit(queued, 16), torch.arange(queued))
        outputs = model(**batch)
        accuracies.add(outputs.in_batch_accuracy.item())
        losses.add(outputs.loss_itc.item())
    assert len(accuracies) == 1 and len(losses) == 2
