"""The cache of image features: what is stored, what is encoded again, and what is refused."""

import os
import pickle
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from datasets import Dataset, Features, Image, Value
from PIL import Image as PillowImage
from transformers import BlipProcessor

from blip_ft.arguments import BlipTrainingArguments, PeftArguments
from blip_ft.data import checks
from blip_ft.data.collators import CaptionCollator, VqaCollator
from blip_ft.data.images import encode_row_images
from blip_ft.modeling.adapters import add_lora, freeze_model
from blip_ft.modeling.blip.retrieval import BlipForImageTextRetrieval
from blip_ft.modeling.blip.vqa import BlipForQuestionAnswering
from blip_ft.training import feature_cache
from blip_ft.training.feature_cache import FeatureStore, store_images

ROW_BYTES = 17 * 32 * 2  # 16 patches and [CLS], width 32, bf16


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    for module in (feature_cache, checks):
        monkeypatch.setattr(module, "HF_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "blip_ft" / "image_features"


@pytest.fixture
def load(golden):
    def load() -> BlipForQuestionAnswering:
        model = BlipForQuestionAnswering.from_pretrained(golden / "vqa").eval()
        freeze_model(model, ["vision_model"])
        return model

    return load


@pytest.fixture
def model(load):
    return load()


@pytest.fixture
def rows(tmp_path):
    """Five images, the first with two rows."""
    generator = torch.Generator().manual_seed(0)
    for number in range(5):
        pixels = torch.randint(256, (40, 36, 3), generator=generator, dtype=torch.uint8)
        PillowImage.fromarray(pixels.numpy()).save(tmp_path / f"{number}.png")
    numbers = [0, 0, 1, 2, 3, 4]
    return as_dataset([tmp_path / f"{number}.png" for number in numbers], [f"id-{number}" for number in numbers])


def as_dataset(paths, image_ids):
    images = [{"bytes": None, "path": str(path)} for path in paths]
    features = Features({"image": Image(decode=False), "image_id": Value("string")})
    return Dataset.from_dict({"image": images, "image_id": image_ids}, features)


@pytest.fixture
def store(processor, tmp_path):
    """store_images with a batch of two images, and flags over the defaults."""

    def store(model, rows, **flags):
        fixed = {"use_cpu": True, "dataloader_num_workers": 0, "per_device_eval_batch_size": 2}
        args = BlipTrainingArguments(str(tmp_path / "run"), **{**fixed, **flags})
        return store_images(model, processor, rows, args)

    return store


@pytest.fixture
def encoded(monkeypatch):
    """The number of images of each batch that the vision model has seen."""
    sizes = []
    encode = BlipForQuestionAnswering.encode_images

    def count(self, pixel_values, *args, **kwargs):
        sizes.append(len(pixel_values))
        return encode(self, pixel_values, *args, **kwargs)

    monkeypatch.setattr(BlipForQuestionAnswering, "encode_images", count)
    return sizes


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_stored_states_are_those_of_the_vision_model(model, rows, store, processor, dtype, torch_dtype):
    batch = store(model, rows, cache_dtype=dtype)(list(rows))
    decoded = encode_row_images(list(rows), processor.image_processor)
    with torch.no_grad():
        wanted = model.encode_images(decoded["pixel_values"]).last_hidden_state
    # the cache encodes two images at once and this test five, so the sums are rounded differently
    torch.testing.assert_close(batch["image_states"].float(), wanted, rtol=2**-8 if dtype == "bf16" else 0, atol=2e-6)
    assert batch["image_states"].dtype == torch_dtype
    assert torch.equal(batch["image_index"], decoded["image_index"]) and batch["readable"].all()


def test_only_images_that_are_not_stored_are_encoded(load, rows, store, encoded, tmp_path):
    store(load(), rows.select(range(3)))
    assert encoded == [2]
    store(load(), rows)
    assert encoded == [2, 2, 1]
    store(load(), rows)
    assert encoded == [2, 2, 1]
    os.utime(tmp_path / "3.png", (0, 0))  # the same content, written again
    store(load(), rows)
    assert encoded == [2, 2, 1]


@pytest.fixture
def old_files(monkeypatch):
    """All image files look old: the hash of a file that was just written is not remembered."""
    monkeypatch.setattr(checks.time, "time", lambda real=time.time: real() + 10)


@pytest.mark.parametrize("replace", [shutil.copyfile, os.replace])
def test_image_replaced_with_equal_size_and_time_is_encoded_anew(
    load, rows, store, encoded, tmp_path, replace, old_files
):
    path, new = tmp_path / "3.bmp", tmp_path / "new.bmp"  # the size of a bmp depends only on the number of pixels
    PillowImage.new("RGB", (9, 9), (250, 0, 0)).save(path)
    PillowImage.new("RGB", (9, 9), (0, 250, 0)).save(new)
    rows = as_dataset([path], ["red"])
    first, before = store(load(), rows)(list(rows)), path.stat()
    replace(new, path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    second = store(load(), rows)(list(rows))
    assert encoded == [1, 1] and not torch.equal(first["image_states"], second["image_states"])


def test_unchanged_images_are_hashed_once(load, rows, store, monkeypatch, old_files):
    store(load(), rows)
    monkeypatch.setattr(checks, "content_hash", lambda image: pytest.fail("read again"))
    store(load(), rows)


def test_hash_of_a_file_that_was_just_written_is_not_remembered(load, rows, store, tmp_path):
    """Another write within the same tick of the file system's clock would not change the time of the file."""
    store(load(), rows)
    file = tmp_path / "cache" / "blip_ft" / "image_hashes.txt"
    assert not file.read_text().strip()


def test_equal_bytes_under_two_ids_are_encoded_once(model, rows, store, encoded, tmp_path):
    content = (tmp_path / "0.png").read_bytes()
    images = [{"bytes": content, "path": None}] * 2
    features = Features({"image": Image(decode=False), "image_id": Value("string")})
    looked_up = store(model, Dataset.from_dict({"image": images, "image_id": ["a", "b"]}, features))
    assert encoded == [1]
    states = looked_up([{"image_id": "a"}, {"image_id": "b"}])["image_states"]
    assert torch.equal(states[0], states[1]) and states.any()


def test_interrupted_encoding_resumes_after_the_last_stored_image(model, rows, store, encoded, monkeypatch):
    whole = store(model, rows)(list(rows))["image_states"]
    shutil.rmtree(feature_cache.HF_CACHE_HOME)

    append = FeatureStore.append

    def interrupt(self, keys, states):
        if len(self.rows()) == 2:
            raise KeyboardInterrupt
        append(self, keys, states)

    with monkeypatch.context() as patch:
        patch.setattr(FeatureStore, "append", interrupt)
        with pytest.raises(KeyboardInterrupt):
            store(model, rows)
    encoded.clear()
    torch.testing.assert_close(store(model, rows)(list(rows))["image_states"], whole)
    assert sum(encoded) == 3


def test_encoding_leaves_the_random_numbers_of_the_run_alone(model, rows, store):
    before = torch.get_rng_state()
    store(model, rows)
    assert torch.equal(torch.get_rng_state(), before)


# damage to a store of five rows -> how many rows are lost
TORN = {
    "row without a key": (lambda folder: extend(folder / "states", b"\1" * ROW_BYTES), 0),
    "half a row": (lambda folder: extend(folder / "states", b"\1" * 100), 0),
    "half a key": (lambda folder: extend(folder / "keys", b"0123"), 0),
    "key without a row": (lambda folder: extend(folder / "keys", b"0" * 40 + b"\n"), 0),
    "zeros after a power cut": (lambda folder: extend(folder / "keys", b"\0" * 41 * 3), 0),
    "lost rows": (lambda folder: os.truncate(folder / "states", 3 * ROW_BYTES + 5), 2),
    "lost keys": (lambda folder: os.truncate(folder / "keys", 41 * 2 + 7), 3),
    "lost file": (lambda folder: (folder / "states").unlink(), 5),
}


def extend(path, content: bytes):
    with path.open("ab") as file:
        file.write(content)


@pytest.mark.parametrize("damage", TORN)
def test_damaged_store_is_repaired(model, rows, store, encoded, home, damage):
    whole = store(model, rows)(list(rows))["image_states"]
    harm, num_lost = TORN[damage]
    harm(next(home.iterdir()))
    encoded.clear()
    torch.testing.assert_close(store(model, rows)(list(rows))["image_states"], whole)
    assert sum(encoded) == num_lost
    folder = next(home.iterdir())
    assert (folder / "states").stat().st_size == 5 * ROW_BYTES and (folder / "keys").stat().st_size == 5 * 41


def change_weights(model, processor):
    model.vision_model.encoder.layers[0].mlp.fc1.weight.data[0, 0] += 1


def change_size(model, processor):
    model.resize_position_embeddings(48)
    freeze_model(model, ["vision_model"])
    processor.image_processor.size = {"height": 48, "width": 48}


def change_mean(model, processor):
    model.config.vision_config.image_mean = [0.5, 0.5, 0.5]


def change_resampling(model, processor):
    processor.image_processor.resample = PillowImage.Resampling.NEAREST


def test_stores_of_earlier_versions_are_read(model, rows, store, home):
    store(model, rows)
    # the hash of the golden weights and settings; raising FORMAT changes it
    assert [folder.name for folder in home.iterdir()] == ["1352d3e48280581a24cc722256ec1a10"]


@pytest.mark.parametrize("change", [change_weights, change_size, change_mean, change_resampling])
def test_other_weights_or_preprocessing_use_another_store(load, rows, store, encoded, home, processor, change):
    size, resample = processor.image_processor.size, processor.image_processor.resample
    store(load(), rows)
    other = load()
    try:
        change(other, processor)
        store(other, rows)
    finally:
        processor.image_processor.size, processor.image_processor.resample = size, resample
    assert sum(encoded) == 10 and len(list(home.iterdir())) == 2


@pytest.mark.parametrize("flags", [{"cache_dtype": "fp32"}, {"bf16": True}])
def test_other_precision_uses_another_store(model, rows, store, encoded, flags):
    store(model, rows)
    store(model, rows, **flags)
    assert sum(encoded) == 10


def test_unreadable_images_are_not_stored(model, rows, store, processor, tmp_path):
    (tmp_path / "1.png").write_bytes(b"no image")
    (tmp_path / "2.png").unlink()
    images = store(model, rows)
    readable = [True, True, False, False, True, True]
    asked = [{**row, "question": "is it ?", "answers": ["yes", "no"], "caption": "a dog"} for row in rows]
    batch = VqaCollator(processor, look_up=images)(asked)
    assert batch["readable"].tolist() == readable
    assert batch["answer_weights"].view(6, 2).sum(1).tolist() == [float(good) for good in readable]
    assert not batch["image_states"][1:3].any() and "pixel_values" not in batch
    captioned = CaptionCollator(processor, look_up=images)(asked)
    assert (captioned["labels"] != -100).any(1).tolist() == readable


def test_if_two_processes_start_one_encodes_and_the_other_waits(model, rows, store, encoded):
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(partial(store, model), [rows, rows])
    assert sum(encoded) == 5
    assert torch.equal(first(list(rows))["image_states"], second(list(rows))["image_states"])


def states_of_a_new_model(rank, golden, rows, run, home):
    feature_cache.HF_CACHE_HOME = home
    model = BlipForQuestionAnswering.from_pretrained(golden / "vqa")
    freeze_model(model, ["vision_model"])
    model.vision_model.embeddings.class_embedding.data += rank
    processor = BlipProcessor.from_pretrained(golden.parent / "processor")
    args = BlipTrainingArguments(str(run), use_cpu=True, dataloader_num_workers=0)
    return store_images(model, processor, rows, args)(list(rows))["image_states"].float().sum(-1).tolist()


def test_all_processes_use_the_weights_of_the_first_one(golden, rows, processor, on_two_processes, tmp_path, home):
    processor.save_pretrained(tmp_path / "processor")
    shutil.copytree(golden / "vqa", tmp_path / "golden" / "vqa")
    cache = str(home.parent.parent)
    first, second = on_two_processes(states_of_a_new_model, tmp_path / "golden", rows, tmp_path / "run", cache)
    assert first == second and len(list(home.iterdir())) == 1


def test_a_worker_receives_the_path_and_not_the_features(model, rows, store):
    images = store(model, rows)
    content = pickle.dumps(images)
    assert len(content) < ROW_BYTES
    assert torch.equal(pickle.loads(content)(list(rows))["image_states"], images(list(rows))["image_states"])


def test_limit_that_is_too_small_is_refused_before_anything_is_encoded(model, rows, store, encoded):
    limit = 4.5 * ROW_BYTES / 1e9
    with pytest.raises(ValueError, match=r"needs 5.44e-06 GB for 5 images.*--cache_limit_gb 5.44e-06 allows it"):
        store(model, rows, cache_limit_gb=limit)
    assert encoded == []
    store(model, rows.select([0, 2]), cache_limit_gb=limit)
    with pytest.raises(ValueError, match=r"needs 3.26e-06 GB for 3 images.*contains 2.26e-06 GB"):
        store(model, rows, cache_limit_gb=limit)
    with pytest.raises(ValueError, match="--cache_dtype bf16 halves it"):
        store(model, rows, cache_limit_gb=limit, cache_dtype="fp32")
    assert sum(encoded) == 2


def test_disk_that_is_too_full_is_refused_before_anything_is_encoded(model, rows, store, encoded, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(ValueError, match="the disk has 1e-06 GB free.*HF_HOME moves it to another disk"):
        store(model, rows)
    assert encoded == []


def test_trained_vision_model_is_refused(model, rows, store):
    model.vision_model.post_layernorm.bias.requires_grad = True
    with pytest.raises(ValueError, match="1 of its weights are trained.*Add --freeze vision_model"):
        store(model, rows)


def test_adapter_on_the_vision_model_is_refused_and_one_on_the_text_layers_is_not(load, rows, store, encoded):
    adapted = add_lora(load(), PeftArguments(use_peft=True))
    with pytest.raises(ValueError, match="--lora_target_modules query key value dense"):
        store(adapted.get_base_model(), rows)
    of_texts = PeftArguments(use_peft=True, lora_target_modules=["query", "key", "value", "dense"])
    store(add_lora(load(), of_texts).get_base_model(), rows)
    store(load(), rows)  # the same weights, the same store
    assert sum(encoded) == 5


def test_vision_dropout_is_refused(model, rows, store):
    model.vision_model.encoder.layers[0].self_attn.dropout.p = 0.1
    with pytest.raises(ValueError, match="Set attention_dropout to 0"):
        store(model, rows)


def test_retrieval_is_refused(golden, rows, store):
    with pytest.raises(ValueError, match="not supported in retrieval"):
        store(BlipForImageTextRetrieval.from_pretrained(golden / "retrieval"), rows)
