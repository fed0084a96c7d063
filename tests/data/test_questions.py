"""Questions cleaned as the original's, and rows that count less than others."""

import json

import pytest
import torch
from golden_blip2 import change_json, every_family
from safetensors.torch import load_file
from three_images import ROWS, load_all, save_three_images, write_metadata

from blip_ft.arguments import DataArguments
from blip_ft.arguments.families import family_of
from blip_ft.data.collators import VqaCollator
from blip_ft.data.loading import load_captions, load_splits, load_to_predict, load_vqa
from blip_ft.data.text_formats import texts_of, texts_of_checkpoint
from blip_ft.data.texts import clean_question
from blip_ft.modeling.blip.vqa import BlipForQuestionAnswering
from blip_ft.models import ModelLoader, load_model

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def folder(tmp_path):
    return save_three_images(tmp_path)


@pytest.mark.parametrize(
    ("question", "cleaned"),
    [
        ("What COLOR is it?", "what color is it?"),
        ("Is it 3.5, or the dog's?", "is it 35, or the dog's?"),
        ('("a" * #b): c; ~d!. ', "a  b c d"),
        (" two  spaces ", " two  spaces"),
        ("w " * 49 + "end more", "w " * 49 + "end"),
        ("...", ""),
    ],
)
def test_question_is_cleaned_as_by_the_original(question, cleaned):
    assert clean_question(question) == cleaned


@every_family
def test_questions_are_cleaned_before_they_stand_in_their_prompt(golden, family):
    loader = ModelLoader(str(golden / family))
    _, config, _ = loader._prepare()
    plain, cleaning = (texts_of(loader.processor, family_of(config), "vqa", clean_questions=c) for c in (False, True))
    question = "Is it: A (big) DOG?"
    given, cleaned = (plain.encode_questions([text], 96) for text in (question, clean_question(question)))
    found = cleaning.encode_questions([question], 96)
    assert found["input_ids"].tolist() == cleaned["input_ids"].tolist() != given["input_ids"].tolist()


def test_given_value_of_clean_questions_wins_over_the_checkpoints(golden, processor):
    config = BlipForQuestionAnswering.from_pretrained(golden / "vqa").config
    assert not texts_of_checkpoint(processor, config, "vqa").clean_questions
    config.clean_questions = True
    assert texts_of_checkpoint(processor, config, "vqa").clean_questions
    assert not texts_of_checkpoint(processor, config, "vqa", clean_questions=False).clean_questions


def test_clean_questions_of_a_config_must_be_true_or_false(copied, processor):
    folder = copied("vqa")
    processor.save_pretrained(folder)
    change_json(folder / "config.json", clean_questions="no")
    with pytest.raises(ValueError, match="clean_questions must be true or false"):
        load_model(str(folder))


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_weight_of_a_row_is_read_and_an_empty_cell_is_one(folder, caplog, name):
    given = [0.2, "", 3, "0.5"]
    rows = [{**row, "answers": row["answers"][0], "weight": weight} for row, weight in zip(ROWS, given, strict=True)]
    if name.endswith("csv"):
        lines = [",".join(map(str, row.values())) for row in rows]
        (folder / name).write_text("\n".join([",".join(rows[0]), *lines]) + "\n")
    else:
        write_metadata(folder, rows)
    caplog.set_level("INFO")
    assert [row["weight"] for row in load_all(dataset_name=str(folder))] == [0.2, 1, 3, 0.5]
    assert "The column `weight` multiplies the loss of each row." in caplog.text


@pytest.mark.parametrize("weight", [-1, "heavy", [1], True, 10**400, "nan", "inf"])
def test_row_whose_weight_is_no_number_of_at_least_0_is_bad(folder, tmp_path, weight):
    write_metadata(folder, [*ROWS[:3], {**ROWS[3], "weight": weight}])
    args = DataArguments(dataset_name=str(folder), max_bad_fraction=1)
    train, held_out = load_vqa(args, tmp_path / "bad_rows.jsonl")
    assert len(train) + len(held_out) == 3
    (bad,) = map(json.loads, (tmp_path / "bad_rows.jsonl").read_text().splitlines())
    assert bad["row"] == 3 and bad["reason"].startswith("weight is not a finite number of at least 0 (rename")


def test_weight_is_not_read_beside_captions_and_without_the_column_there_is_none(folder):
    write_metadata(folder, [{**row, "caption": "a dog", "weight": "x"} for row in ROWS])
    train, held_out = load_captions(DataArguments(dataset_name=str(folder)))
    assert len(train) + len(held_out) == 3 and "weight" not in {*train[0], *held_out[0]}
    write_metadata(folder, ROWS)
    assert "weight" not in load_vqa(DataArguments(dataset_name=str(folder)))[0].column_names


def test_weights_of_a_stream_are_read(folder):
    write_metadata(folder, [{**ROWS[0], "split": "train", "weight": 0.2}, {**ROWS[2], "split": "test"}])
    args = DataArguments(dataset_name=str(folder), streaming=True, eval_split="test")
    rows = load_splits("vqa", args)
    assert [row["weight"] for row in rows.train.first_rows()] == [0.2]


def row_of(pixels, question, answers, **more):
    return {"image_id": question, "image": pixels, "question": question, "answers": answers, **more}


def test_row_of_visual_genome_adds_a_fifth_of_its_loss_to_the_original_sum(golden, processor):
    """(0.2 l_vg + l_vqa) / 2: the original divides by the number of images, whatever their weights."""
    expected = json.loads((golden / "vqa" / "expected.json").read_text())
    losses, (asked, other) = expected["per_answer_loss"], expected["texts"]["question"][:2]
    rows = [row_of(b"", asked, ["brown"] * 6 + ["black and white"] * 4), row_of(b"", other, ["two"], weight=0.2)]
    inputs = load_file(golden / "vqa" / "inputs.safetensors")

    def pixels(rows):
        shape = {"image_index": torch.tensor([0, 1]), "readable": torch.tensor([True, True])}
        return {"pixel_values": inputs["pixel_values"][:2], **shape}

    batch = VqaCollator(processor, look_up=pixels)(rows)
    torch.testing.assert_close(batch["answer_weights"], torch.tensor([0.6, 0.4, 0.2]))
    model = BlipForQuestionAnswering.from_pretrained(golden / "vqa")
    model.config.question_start_token = "enc"
    by_hand = (0.6 * losses[0] + 0.4 * losses[1] + 0.2 * losses[2]) / 2
    assert model(**batch).loss.item() == pytest.approx(by_hand, abs=1e-5)


def test_rows_of_blip2_count_by_their_weight_also_where_all_have_the_same(golden):
    loaded = load_model(str(golden / "blip2_opt"))
    model, processor = loaded["model"].eval(), loaded["processor"]
    collate = VqaCollator(processor, texts=texts_of(processor, family_of(model.config), "vqa"))
    image = load_file(golden / "blip2_opt" / "inputs.safetensors")["pixel_values"][:1]
    collate.look_up = lambda rows: {
        "pixel_values": image.expand(len(rows), -1, -1, -1),
        "image_index": torch.arange(len(rows)),
        "readable": torch.ones(len(rows), dtype=bool),
    }
    questions = [("is it ?", ["yes", "no"]), ("what ?", ["a dog"])]
    plain, light, none = (
        collate([row_of(b"", *texts, **more) for texts in questions]) for more in ({}, {"weight": 0.2}, {"weight": 0.0})
    )
    with torch.no_grad():
        whole = model(**plain).loss
        assert model(**light).loss.item() == pytest.approx(0.2 * whole.item(), rel=1e-5)
        assert model(**none).loss == 0
    items = model.loss_items(plain)
    assert model.loss_items(light).tolist() == items.tolist() == model.loss_items(none).tolist()


def test_file_of_the_original_without_answers_is_read_to_predict(folder, tmp_path):
    row = {"question_id": 5, "question": "What?", "image": "images/a.png", "dataset": "vqa"}
    (tmp_path / "vqa_test.json").write_text(json.dumps([row]))
    rows, bad = load_to_predict(DataArguments(dataset_name=str(tmp_path / "vqa_test.json")), "vqa")
    assert not bad and rows[0]["question_id"] == "5" and rows[0]["answers"] == []


def test_rows_of_visual_genome_have_weight_a_fifth(folder, tmp_path):
    asked = {"question": "Who?", "answer": "a man", "dataset": "vg"}
    (tmp_path / "vg_qa.json").write_text(json.dumps([{**asked, "image": f"images/{name}.png"} for name in "ab"]))
    train, held_out = load_vqa(DataArguments(dataset_name=str(tmp_path / "vg_qa.json")))
    assert [(row["weight"], row["answers"]) for row in (*train, *held_out)] == [(0.2, ["a man"])] * 2
    # another file with a column of this name is read as it is
    for value in ("mine", ["vg"]):
        rows = [{**asked, "image": f"images/{name}.png", "dataset": value} for name in "ab"]
        (tmp_path / "mine.json").write_text(json.dumps(rows))
        assert "weight" not in load_vqa(DataArguments(dataset_name=str(tmp_path / "mine.json")))[0].column_names
