"""The guide's module: DataPipeline gives batches for your own training loop, and rows are loaded."""

from itertools import combinations

import pytest
import torch
from PIL import Image
from three_images import ROWS, save_three_images, write_metadata

from blip_ft import data_pipeline
from blip_ft.data import loading
from blip_ft.data_pipeline import DataPipeline
from blip_ft.models import load_model

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def folder(tmp_path):
    return save_three_images(tmp_path)


@pytest.fixture
def pipeline_settings(folder, checkpoint):
    write_metadata(folder, [{**row, "answers": ["cat", "dog", "dog"]} for row in ROWS])
    return {
        "model_name_or_path": str(checkpoint),
        "dataset_name": str(folder),
        "eval_fraction": 0.34,
        "per_device_train_batch_size": 2,
        "dataloader_num_workers": 0,
        "use_cpu": True,
    }


def test_pipeline_batches_fit_a_training_loop(pipeline_settings, tmp_path, processor):
    path = tmp_path / "vqa.yaml"
    path.write_text("".join(f"{name}: {value}\n" for name, value in pipeline_settings.items()))
    pipeline = DataPipeline(path)
    with pytest.raises(ValueError, match=r"Call setup\(\) first"):
        pipeline.get_train_dataloader()
    pipeline.setup()
    batch = next(iter(pipeline.get_train_dataloader()))
    assert set(batch) == {"pixel_values", "input_ids", "attention_mask", "labels"}
    assert batch["pixel_values"].shape == (2, 3, 32, 32) and batch["pixel_values"].is_floating_point()
    # the most frequent answer, between [CLS] and [SEP]
    assert batch["labels"].tolist() == [processor.tokenizer("dog").input_ids] * 2
    rows = sum(len(batch["input_ids"]) for batch in pipeline.get_eval_dataloader())
    assert rows == len(pipeline.eval_rows)


def test_pipeline_groups_questions_when_asked(pipeline_settings):
    pipeline = DataPipeline({**pipeline_settings, "group_questions": True})
    pipeline.setup()
    batch = next(iter(pipeline.get_train_dataloader()))
    assert batch["pixel_values"].dtype == torch.uint8 and len(batch["image_index"]) == 2
    assert load_model(pipeline_settings["model_name_or_path"])["model"](**batch).loss > 0


@pytest.mark.parametrize("name", ["blip2_opt", "blip2_t5", "instructblip_vicuna"])
def test_pipeline_of_blip2_gives_the_same_loss_with_grouping_and_without(pipeline_settings, folder, golden, name):
    write_metadata(folder, [{**row, "answers": row["answers"][:1]} for row in ROWS])
    settings = pipeline_settings | {
        "model_name_or_path": str(golden / name),
        "eval_fraction": 0.67,
        "per_device_train_batch_size": 1,
    }
    model = load_model(golden / name, device="cpu")["model"]
    losses = []
    for group in (True, False):
        pipeline = DataPipeline({**settings, "group_questions": group, "question_prompt": "Q: {} A:"})
        pipeline.setup()
        (batch,) = pipeline.get_eval_dataloader()
        images, rows = len(set(pipeline.eval_rows["image_id"][:])), len(pipeline.eval_rows)
        assert len(batch["input_ids"]) == rows > images and len(batch["pixel_values"]) == (images if group else rows)
        assert ("qformer_input_ids" in batch) == (name == "instructblip_vicuna")
        assert pipeline.processor.tokenizer.decode(batch["input_ids"][0]).rstrip("<pad>/s").endswith("A:")
        losses.append(model(**batch).loss.item())
        train = next(iter(pipeline.get_train_dataloader()))
        assert model(**train).loss.isfinite()
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_pipeline_refuses_an_unknown_key(pipeline_settings):
    with pytest.raises(ValueError, match="Did you mean image_size"):
        DataPipeline({**pipeline_settings, "imagesize": 32})


def test_grouped_pipeline_shuffles_again_in_each_epoch(pipeline_settings, folder):
    write_metadata(folder, [{**ROWS[number % 3], "question": f"{number} ?"} for number in range(30)])
    pipeline = DataPipeline({**pipeline_settings, "group_questions": True})
    pipeline.setup()
    loader = pipeline.get_train_dataloader()
    first, second = (list(loader.sampler) for _ in range(2))
    assert first != second and sorted(first) == sorted(second)
    # a new loader continues with the next epoch, a new pipeline starts again
    assert list(pipeline.get_train_dataloader().sampler) not in (first, second)
    again = DataPipeline({**pipeline_settings, "group_questions": True})
    again.setup()
    assert first == list(again.get_train_dataloader().sampler)


@pytest.mark.parametrize("group", [True, False])
def test_pipeline_with_a_new_loader_per_epoch_shuffles_again(pipeline_settings, folder, group):
    write_metadata(folder, [{**ROWS[number % 3], "question": "dog " * (number + 1)} for number in range(30)])
    pipeline = DataPipeline({**pipeline_settings, "group_questions": group})
    pipeline.setup()
    first, second = ([batch["input_ids"].tolist() for batch in pipeline.get_train_dataloader()] for _ in range(2))
    assert first != second


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("group", [True, False])
def test_pipeline_augments_training_images_anew_in_each_pass_and_no_evaluation(
    pipeline_settings, folder, group, workers
):
    Image.effect_noise((30, 20), 100).save(folder / ROWS[0]["file_name"])
    few = {"eval_split": "test", "group_questions": group, "per_device_train_batch_size": 1}
    write_metadata(folder, [{**ROWS[0], "answers": ["dog"], "split": split} for split in ("train", "test")])
    seen = {}
    for augment in (True, False):
        settings = {**pipeline_settings, **few, "augment": augment, "dataloader_num_workers": workers}
        settings.pop("eval_fraction")
        pipeline = DataPipeline({**settings, "allow_image_overlap": True})
        pipeline.setup()
        loader = pipeline.get_train_dataloader()
        passes = [*loader, *loader, *pipeline.get_train_dataloader(), *pipeline.get_eval_dataloader()]
        seen[augment] = [batch["pixel_values"] for batch in passes]
    whole = seen[False][0]
    assert all(torch.equal(pixels, whole) for pixels in (*seen[False], seen[True][-1])) and len(seen[True]) == 4
    for one, other in combinations((*seen[True][:3], whole), 2):
        assert not torch.equal(one, other)


def test_pipeline_pixels_equal_those_of_the_processor(pipeline_settings, processor, folder):
    pipeline = DataPipeline(pipeline_settings)
    pipeline.setup()
    batch = next(iter(pipeline.get_eval_dataloader()))
    path = pipeline.eval_rows[0]["image"]["path"]
    stock = processor.image_processor(Image.open(path).convert("RGB"), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(batch["pixel_values"][:1], stock, atol=1e-6, rtol=0)


def test_functions_that_load_rows_are_imported_from_the_same_module():
    assert data_pipeline.load_vqa is loading.load_vqa and data_pipeline.load_captions is loading.load_captions
    assert set(data_pipeline.__all__) == {"DataPipeline", "load_captions", "load_vqa"}
