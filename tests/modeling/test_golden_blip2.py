"""Compare BLIP-2 and InstructBLIP with numbers computed by LAVIS; see golden/BLIP2.md."""

import pytest
import torch
from golden_blip2 import every_family, expected_of
from safetensors.torch import load_file

from blip_ft.modeling.blip2 import Blip2ForConditionalGeneration, InstructBlipForConditionalGeneration

CLASSES = {
    "blip2_opt": Blip2ForConditionalGeneration,
    "blip2_t5": Blip2ForConditionalGeneration,
    "instructblip_vicuna": InstructBlipForConditionalGeneration,
    "instructblip_t5": InstructBlipForConditionalGeneration,
}
TASKS = ("vqa", "captioning")
every_case = pytest.mark.parametrize(("family", "task"), [(family, task) for family in CLASSES for task in TASKS])


def load(golden, family):
    model = CLASSES[family].from_pretrained(golden / family)
    model.language_model.requires_grad_(False)  # as LAVIS
    return model.train()


def batch_of(golden, family, task, rows=slice(None)):
    """The batch of some rows: prompts, answers, and each of their images once."""
    inputs = load_file(golden / family / "inputs.safetensors")
    batch = {name.removeprefix(f"{task}_"): t[rows] for name, t in inputs.items() if name.startswith(f"{task}_")}
    images, batch["image_index"] = batch["image_index"].unique(return_inverse=True)
    batch["pixel_values"] = inputs["pixel_values"][images]
    return batch


def norms_of(model):
    return {name: p.grad.norm().item() for name, p in model.named_parameters() if p.requires_grad}


@every_case
def test_loss_and_gradient_norms_equal_lavis(golden, family, task):
    expected, model = expected_of(golden, family)[task], load(golden, family)
    loss = model(**batch_of(golden, family, task)).loss
    loss.backward()
    assert loss.item() == pytest.approx(expected["loss"], abs=1e-5)
    norms = norms_of(model)
    assert norms.keys() == expected["grad_norms"].keys()
    for name, norm in expected["grad_norms"].items():
        # rounding decides small norms, and the key's third of a bias is zero apart from rounding
        assert norms[name] == pytest.approx(norm, rel=1e-4 if norm > 0.01 else 1e-3, abs=1e-7), name


@every_case
def test_losses_of_rows_and_parts_equal_lavis(golden, family, task):
    expected, model = expected_of(golden, family)[task], load(golden, family)
    batch = batch_of(golden, family, task)
    losses = [
        model(**batch_of(golden, family, task, slice(row, row + 1))).loss.item() for row in range(len(batch["labels"]))
    ]
    assert losses == pytest.approx(expected["row_losses"], abs=1e-5)
    parts = [model(**batch_of(golden, family, task, slice(*part["rows"]))).loss.item() for part in expected["parts"]]
    assert parts == pytest.approx([part["loss"] for part in expected["parts"]], abs=1e-5)


@every_case
def test_five_adamw_steps_equal_lavis(golden, family, task):
    expected, model = expected_of(golden, family)[task]["adamw"], load(golden, family)
    batch = batch_of(golden, family, task)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    plain = [p for name, p in trained.items() if p.dim() == 1 or name.endswith(".bias")]
    decayed = [p for name, p in trained.items() if p.dim() > 1 and not name.endswith(".bias")]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    losses = []
    for _ in range(5):
        loss = model(**batch).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses == pytest.approx(expected, abs=1e-4)


def generate(golden, family, task, rows=slice(None), **settings):
    """Generated ids up to and with the end token."""
    expected, model = expected_of(golden, family), load(golden, family).eval()
    batch = batch_of(golden, family, task, rows)
    del batch["labels"]
    end = expected["end_token_id"]
    # BLIP2.md, "Lengths": LAVIS counts a start token in some of its lengths
    lengths = {"max_new_tokens": 10}
    if task == "captioning":
        lengths = {"max_new_tokens": 30 if "t5" in family else 29, "min_new_tokens": 7}
    elif family == "instructblip_vicuna":
        lengths["max_new_tokens"] = 9
    settings |= {"repetition_penalty": 1.5} if family.startswith("instructblip") else {}
    ids = model.generate(**batch, eos_token_id=end, pad_token_id=expected["pad_token_id"], **lengths, **settings)
    return [row[: row.index(end) + 1] if end in row else row for row in ids.tolist()]


@every_case
def test_greedy_answers_equal_lavis(golden, family, task):
    ids = generate(golden, family, task, num_beams=1, do_sample=False)
    assert ids == expected_of(golden, family)[task]["greedy_ids"]


@every_family
def test_answers_of_five_beams_equal_lavis(golden, family):
    length_penalty = 0.0 if family == "blip2_opt" else -1.0
    ids = generate(golden, family, "vqa", num_beams=5, do_sample=False, length_penalty=length_penalty)
    assert ids == expected_of(golden, family)["vqa"]["generated_ids"]
