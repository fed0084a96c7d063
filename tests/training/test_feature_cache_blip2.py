"""The cache of BLIP-2 and InstructBLIP: its level, what is stored, and the parts that training does without."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import history_of, predictions_of, results_of
from datasets import Dataset, Features, Image, Value
from peft import LoraConfig, get_peft_model
from PIL import Image as PillowImage
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoProcessor

from blip_ft.arguments import BlipTrainingArguments
from blip_ft.data import checks
from blip_ft.data.images import encode_row_images
from blip_ft.modeling.adapters import freeze_model
from blip_ft.modeling.blip2 import Blip2ForConditionalGeneration, InstructBlipForConditionalGeneration
from blip_ft.training import feature_cache
from blip_ft.training.feature_cache import StoredImages, require_constant_features, store_images
from blip_ft.training.idle_parts import IdleParts
from blip_ft.training.trainer import BlipTrainer

CLASSES = {
    "blip2_opt": Blip2ForConditionalGeneration,
    "blip2_t5": Blip2ForConditionalGeneration,
    "instructblip_vicuna": InstructBlipForConditionalGeneration,
    "instructblip_t5": InstructBlipForConditionalGeneration,
}
VISION = ["vision_model"]
QFORMER = ["vision_model", "qformer", "query_tokens"]
SHAPES = {"vision": (17, 32), "qformer": (4, 24)}  # 16 patches and [CLS]; 4 queries


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    for module in (feature_cache, checks):
        monkeypatch.setattr(module, "HF_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "blip_ft" / "image_features"


@pytest.fixture
def load(golden):
    """A model with frozen parts, which have dropout: in the released checkpoints only the Q-Former has."""

    def load(frozen: list[str], family: str = "blip2_opt", **settings: Any) -> nn.Module:
        config = AutoConfig.from_pretrained(golden / family)
        config.vision_config.attention_dropout = 0.1
        config.qformer_config.hidden_dropout_prob = config.qformer_config.attention_probs_dropout_prob = 0.1
        model = CLASSES[family].from_pretrained(golden / family, config=config, **settings)
        freeze_model(model, ["language_model", *frozen])
        return model

    return load


@pytest.fixture
def rows(tmp_path):
    """Three images with two questions each."""
    generator = torch.Generator().manual_seed(0)
    for number in range(3):
        pixels = torch.randint(256, (40, 36, 3), generator=generator, dtype=torch.uint8)
        PillowImage.fromarray(pixels.numpy()).save(tmp_path / f"{number}.png")
    return as_dataset([tmp_path / f"{number}.png" for number in (0, 0, 1, 1, 2, 2)])


def as_dataset(paths: list[Path]) -> Dataset:
    columns = {
        "image": [{"bytes": None, "path": str(path)} for path in paths],
        "image_id": [path.name for path in paths],
        "question": list(range(len(paths))),
    }
    features = Features({"image": Image(decode=False), "image_id": Value("string"), "question": Value("int64")})
    return Dataset.from_dict(columns, features)


@pytest.fixture
def processor_of(golden):
    return lambda family="blip2_opt": AutoProcessor.from_pretrained(golden / family)


@pytest.fixture
def store(processor_of, tmp_path):
    """store_images with fp32, a batch of two images, and flags over the defaults."""

    def store(model: nn.Module, rows: Dataset, family: str = "blip2_opt", **flags: Any) -> StoredImages:
        fixed = {"use_cpu": True, "dataloader_num_workers": 0, "per_device_eval_batch_size": 2, "cache_dtype": "fp32"}
        args = BlipTrainingArguments(str(tmp_path / "run"), **{**fixed, **flags})
        return store_images(model, processor_of(family), rows, args)

    return store


@pytest.fixture
def encoded(monkeypatch):
    """The number of images of each batch that the vision model has seen."""
    sizes = []
    encode = Blip2ForConditionalGeneration.encode_images

    def count(self, pixel_values, *args, **kwargs):
        sizes.append(len(pixel_values))
        return encode(self, pixel_values, *args, **kwargs)

    monkeypatch.setattr(Blip2ForConditionalGeneration, "encode_images", count)
    return sizes


def build_on_meta(golden: Path, family: str, frozen: list[str]) -> nn.Module:
    with torch.device("meta"):
        model = CLASSES[family](AutoConfig.from_pretrained(golden / family))
    freeze_model(model, frozen)
    return model


@pytest.mark.parametrize(
    ("family", "frozen", "level"),
    [
        ("blip2_opt", QFORMER, "qformer"),
        ("blip2_t5", [*QFORMER, "language_model"], "qformer"),
        ("blip2_opt", ["vision_model", "qformer"], "vision"),
        ("blip2_opt", ["vision_model", "query_tokens"], "vision"),
        ("blip2_opt", VISION, "vision"),
        ("instructblip_vicuna", QFORMER, "vision"),
        ("instructblip_t5", VISION, "vision"),
    ],
)
def test_level_is_the_last_constant_one_and_needs_no_weights(golden, family, frozen, level):
    assert require_constant_features(build_on_meta(golden, family, frozen)) == level


@pytest.mark.parametrize(
    ("targets", "level"),
    [
        (r"language_model\..*\.q_proj", "qformer"),
        (r"(language_model\..*\.q_proj|qformer\..*\.query)", "vision"),
        (r"(language_model\..*\.q_proj|vision_model\..*\.qkv)", None),
    ],
)
def test_level_depends_on_where_the_adapter_is(golden, targets, level):
    with torch.device("meta"):
        adapted = get_peft_model(build_on_meta(golden, "blip2_opt", []), LoraConfig(target_modules=targets))
    model = adapted.get_base_model()
    if level:
        assert require_constant_features(model) == level
        return
    with pytest.raises(ValueError, match="adapter has layers there.*leave out --lora_target_modules"):
        require_constant_features(model)


@pytest.mark.parametrize(
    ("family", "frozen", "message"),
    [
        (
            *("blip2_opt", ["language_model"]),
            "Trained are query_tokens, vision_model, qformer, language_projection. "
            "Add --freeze vision_model,qformer,query_tokens,language_model, or --use_peft",
        ),
        (
            *("blip2_opt", ["qformer", "query_tokens"]),
            "Trained are vision_model, language_projection, language_model. "
            "Add --freeze vision_model,qformer,query_tokens, or --use_peft",
        ),
        (
            *("instructblip_t5", ["vision_model.encoder", "vision_model.embeddings", "language_model"]),
            "2 of its weights are trained, e.g. vision_model.post_layernorm.weight. "
            "Trained are query_tokens, vision_model, qformer, language_projection. "
            "Add --freeze vision_model,language_model, or --use_peft",
        ),
    ],
)
def test_trained_vision_model_is_refused_with_the_flag_to_add(golden, family, frozen, message):
    with pytest.raises(ValueError) as refused:
        require_constant_features(build_on_meta(golden, family, frozen))
    assert message in str(refused.value)


@pytest.mark.parametrize(("frozen", "level"), [(VISION, "vision"), (QFORMER, "qformer")])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_stored_features_are_those_of_the_model_in_evaluation(
    load, rows, store, processor_of, home, frozen, level, dtype
):
    model = load(frozen)
    batch = store(model.train(), rows, cache_dtype=dtype)(list(rows))
    decoded = encode_row_images(list(rows), processor_of().image_processor)
    model.eval()
    with torch.no_grad():
        wanted = model.encode_images(decoded["pixel_values"]).last_hidden_state
        if level == "qformer":
            wanted = model.encode_queries(wanted, torch.arange(3))
    states = batch.pop({"vision": "image_states", "qformer": "query_states"}[level])
    torch.testing.assert_close(states.float(), wanted, rtol=2**-8 if dtype == "bf16" else 0, atol=2e-6)
    assert states.shape == (3, *SHAPES[level]) and batch.keys() == {"image_index", "readable"}
    size = states.element_size() * states.numel()
    assert (next(home.iterdir()) / "states").stat().st_size == size


@pytest.mark.parametrize("family", CLASSES)
@pytest.mark.parametrize("frozen", [VISION, QFORMER])
def test_features_give_the_loss_and_the_gradients_of_the_images(load, rows, store, processor_of, family, frozen):
    model, processor = load(frozen, family), processor_of(family)
    features = store(model, rows, family)(list(rows))
    losses, norms = [], []
    for images in (encode_row_images(list(rows), processor.image_processor), features):
        model.train()
        torch.manual_seed(0)  # for the dropout of a Q-Former that is trained
        loss = model(**images, **texts_of(list(rows), family)).loss
        model.zero_grad()
        loss.backward()
        losses.append(loss.item())
        norms.append([weight.grad.norm().item() for weight in model.parameters() if weight.requires_grad])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert norms[1] == pytest.approx(norms[0], rel=1e-4, abs=1e-6) and any(norms[0])


def texts_of(rows: list[dict], family: str = "blip2_opt") -> dict[str, torch.Tensor]:
    """A prompt and an answer for each row, as ids that all golden vocabularies have."""
    number = torch.tensor([row["question"] for row in rows])
    prompts = torch.stack([torch.full_like(number, 2), 10 + number, 20 + number], 1)
    texts = {
        "input_ids": prompts,
        "attention_mask": torch.ones_like(prompts),
        "labels": torch.stack([30 + number, 40 + number % 2], 1),
        "question_index": torch.arange(len(rows)),
        "answer_weights": torch.ones(len(rows)),
    }
    return texts | ({"qformer_input_ids": prompts} if family.startswith("instructblip") else {})


def test_frozen_parts_in_bf16_are_stored_in_both_precisions(load, rows, store):
    model = load(QFORMER, dtype=torch.bfloat16)
    for dtype in ("bf16", "fp32"):
        states = store(model, rows, cache_dtype=dtype)(list(rows))["query_states"]
        assert states.dtype == feature_cache.DTYPES[dtype] and states.isfinite().all() and states.any()
    whole = store(load(QFORMER), rows)(list(rows))["query_states"]
    torch.testing.assert_close(states, whole, rtol=0, atol=0.1)  # of values up to 3


def change_qformer(model):
    model.qformer.encoder.layer[0].attention.attention.query.weight.data[0, 0] += 1


def change_query_tokens(model):
    model.query_tokens.data[0, 0, 0] += 1


def change_vision(model):
    model.vision_model.encoder.layers[0].mlp.fc1.weight.data[0, 0] += 1


def change_heads(model):
    model.config.qformer_config.num_attention_heads = 2


def change_epsilon(model):
    model.config.qformer_config.layer_norm_eps = 1e-3


@pytest.mark.parametrize("change", [change_qformer, change_query_tokens, change_vision, change_heads, change_epsilon])
def test_another_qformer_uses_another_store_and_its_input_does_not(load, rows, store, encoded, home, change):
    store(load(QFORMER), rows)
    other = load(QFORMER)
    change(other)
    store(other, rows)
    assert sum(encoded) == 6 and len(list(home.iterdir())) == 2
    # what the vision model makes of an image does not depend on the Q-Former
    store(load(VISION), rows)
    other = load(VISION)
    change(other)
    store(other, rows)
    num_stores = 2 if change is change_vision else 1
    assert sum(encoded) == 6 + 3 * num_stores and len(list(home.iterdir())) == 2 + num_stores


def test_other_trained_weights_use_the_same_store(load, rows, store, encoded):
    store(load(QFORMER), rows)
    other = load(QFORMER)
    other.language_projection.weight.data += 1
    store(other, rows)
    assert sum(encoded) == 3


def test_limit_names_only_what_makes_the_features_smaller(load, rows, store):
    with pytest.raises(ValueError, match="needs 1.15e-06 GB for 3 images.*--max_train_samples needs less"):
        store(load(QFORMER), rows, cache_limit_gb=1e-6)
    with pytest.raises(ValueError, match="--max_train_samples and a smaller --image_size need less"):
        store(load(VISION), rows, cache_limit_gb=1e-6)


def features_of_a_new_model(rank, golden, rows, run, home):
    feature_cache.HF_CACHE_HOME = home
    model = Blip2ForConditionalGeneration.from_pretrained(golden / "blip2_opt")
    freeze_model(model, QFORMER)
    for change in (change_vision, change_qformer, change_query_tokens) if rank else ():
        change(model)
    processor = AutoProcessor.from_pretrained(golden / "blip2_opt")
    args = BlipTrainingArguments(str(run), use_cpu=True, dataloader_num_workers=0)
    return store_images(model, processor, rows, args)(list(rows))["query_states"].float().sum(-1).tolist()


def test_all_processes_use_the_weights_of_the_first_one(golden, rows, on_two_processes, tmp_path, home):
    cache = str(home.parent.parent)
    first, second = on_two_processes(features_of_a_new_model, golden, rows, tmp_path / "run", cache)
    assert first == second and len(list(home.iterdir())) == 1


@pytest.fixture
def run(recipe, golden, image_folder):
    """Trains the golden BLIP-2 with OPT for four steps."""
    flags = [
        *("--model_name_or_path", str(golden / "blip2_opt"), "--dataset_name", str(image_folder), "--skip_dry_run"),
        *("--eval_split", "test", "--learning_rate", "1e-2", "--per_device_train_batch_size", "4", "--max_steps", "4"),
        *("--logging_steps", "1", "--generation_num_beams", "1", "--save_strategy", "steps", "--save_total_limit", "9"),
    ]
    return lambda folder, *more: recipe(*flags, *more, output_dir=folder)


CACHED = ["--cache_image_features", "--cache_dtype", "fp32"]


@pytest.fixture
def take_away(monkeypatch):
    """Lets the CPU stand for a GPU: weights that IdleParts moves off it are empty until they move back.

    Returns: at each training step, the names of the empty weights.
    """

    def replace_to(self, *args, init=IdleParts.__init__, **kwargs):
        init(self, *args, **kwargs)
        for part in self.parts:
            kept = {weight: weight.data for weight in part.parameters()}

            def to(device, kept=kept):
                # off the device to "cpu", and back to the device of the run, which is a torch.device
                for weight, data in kept.items():
                    weight.data = data.new_empty(0) if isinstance(device, str) else data

            monkeypatch.setattr(part, "to", to)

    steps = []

    def look(self, *args, step=BlipTrainer.training_step, **kwargs):
        steps.append({name for name, weight in self.blip.named_parameters() if not weight.numel()})
        return step(self, *args, **kwargs)

    monkeypatch.setattr(IdleParts, "__init__", replace_to)
    monkeypatch.setattr(BlipTrainer, "training_step", look)
    return steps


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--freeze", "vision_model,language_model", "--eval_strategy", "steps", "--eval_steps", "2"], VISION),
        (["--use_peft", "--eval_strategy", "no"], ["vision_model", "qformer"]),
    ],
    ids=["vision", "qformer"],
)
def test_no_training_step_has_the_encoders_on_the_device(run, golden, tmp_path, take_away, flags, parts):
    cached = run(tmp_path / "cached", *CACHED, *flags, "--save_steps", "2")
    weights = load_file(golden / "blip2_opt" / "model.safetensors")
    assert take_away == [{name for name in weights if name.startswith(tuple(f"{part}." for part in parts))}] * 4
    plain = run(tmp_path / "plain", *flags, "--save_steps", "4")
    assert take_away[4:] == [set()] * 4
    losses = [[entry["loss"] for entry in history_of(folder)] for folder in (cached, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert results_of(cached)["eval_loss"] == pytest.approx(results_of(plain)["eval_loss"], rel=1e-4)
    assert predictions_of(cached) == predictions_of(plain)
    one, other = (load_file(next(folder.glob("*model.safetensors"))) for folder in (cached, plain))
    assert one.keys() == other.keys() and ("--use_peft" in flags or one.keys() == weights.keys())
    for name, weight in one.items():
        torch.testing.assert_close(weight, other[name], rtol=1e-3, atol=1e-4, msg=name)
        assert not name.startswith("vision_model.") or torch.equal(weight, weights[name])


def test_resumed_run_with_cached_queries_equals_an_unbroken_one(run, tmp_path):
    flags = [*CACHED, "--freeze", "vision_model,qformer,query_tokens,language_model", "--save_steps", "1"]
    whole = run(tmp_path / "whole", *flags)
    cut = shutil.copytree(whole, tmp_path / "cut")
    shutil.rmtree(cut / "checkpoint-4")  # checkpoint-3 was written with the parts away
    run(cut, *flags, "--resume_from_checkpoint", "last")
    states = [load_file(folder / "model.safetensors") for folder in (whole, cut, whole / "checkpoint-3")]
    assert states[0].keys() == states[1].keys() == states[2].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["language_projection.weight"], states[2]["language_projection.weight"])


def test_quantized_parts_stay_on_the_device(load):
    model = load(QFORMER)
    model.vision_model.post_layernorm.weight = type("Params4bit", (nn.Parameter,), {})(torch.ones(32))
    idle = IdleParts(model, QFORMER[:2], torch.device("cpu"))
    assert idle.parts == [model.qformer]
    assert idle.num_bytes == 4 * sum(weight.numel() for weight in model.qformer.parameters())
