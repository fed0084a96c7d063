"""recipes/predict.py as users start it: what it writes, and that a stopped run resumes."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import RECIPES
from programs import run_ranks
from safetensors.torch import load_file
from transformers import PreTrainedModel

from blip_ft.arguments import DataArguments, PeftArguments
from blip_ft.data.loading import load_to_predict
from blip_ft.modeling import inference
from blip_ft.modeling.adapters import add_lora
from blip_ft.models import generate_answer_blip, load_model, save_model
from blip_ft.results.files import claim, release_folders
from blip_ft.results.predictions import OUTPUT


@pytest.fixture
def predict(monkeypatch, tmp_path, checkpoints):
    """Runs predict.py in this process with a task's checkpoint, and returns output_dir."""

    def start(task: str, *flags: str, folder: Path | None = None) -> Path:
        folder = folder or tmp_path / "predicted"
        path = str(RECIPES / "predict.py")
        common = ["--model_name_or_path", str(checkpoints.get(task, task)), "--output_dir", str(folder), "--use_cpu"]
        monkeypatch.setattr(sys, "argv", [path, *common, "--dataloader_num_workers", "0", *flags])
        runpy.run_path(path, run_name="__main__")
        return folder

    return start


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_questions_of_a_data_set_are_answered_in_its_order_and_scored(predict, image_folder, checkpoint):
    flags = ["--dataset_name", str(image_folder), "--eval_split", "test", "--per_device_eval_batch_size", "3"]
    folder = predict("vqa", *flags)
    lines = lines_of(folder / "predictions.jsonl")
    rows = [row for row in lines_of(image_folder / "metadata.jsonl") if row["split"] == "test"]
    assert [line["question"] for line in lines] == [row["question"] for row in rows]
    assert [Path(line["image"]).name for line in lines] == [row["file_name"] for row in rows]
    loaded = load_model(checkpoint, device="cpu")
    images = [str(image_folder / row["file_name"]) for row in rows]
    answers = generate_answer_blip(
        loaded["model"], loaded["processor"], images, [row["question"] for row in rows], max_length=10
    )
    assert [line["prediction"] for line in lines] == answers
    assert all(0 < line["probability"] < 1 for line in lines)
    scores = json.loads((folder / "scores.json").read_text())
    right = [line["prediction"] == row["answer"] for line, row in zip(lines, rows, strict=True)]
    assert scores["exact_match"] == 100 * sum(right) / 8 and scores["scored_rows"] == 8
    assert [line["accuracy"] for line in lines] == right
    assert {path.name for path in folder.iterdir()} == {"predictions.jsonl", "scores.json", "report.html"}


def test_training_run_and_predict_write_the_same_lines(predict, recipe, image_folder, checkpoints):
    data = ["--dataset_name", str(image_folder), "--eval_split", "test"]
    steps = ["--max_steps", "1", "--per_device_train_batch_size", "4"]
    for task, own in (("vqa", {"loss"}), ("captioning", set()), ("retrieval", set())):
        more = ["--queue_size", "24", "--k_test", "8", "--max_caption_tokens", "35"] if task == "retrieval" else []
        trained = recipe("--model_name_or_path", str(checkpoints[task]), *data, *more, *steps, task=task)
        wanted = lines_of(trained / "predictions.jsonl")
        folder = predict(str(trained), *data, folder=trained.with_name(f"{task}-predicted"))
        lines = lines_of(folder / "predictions.jsonl")
        assert len(lines) == len(wanted) > 1
        for line, other in zip(lines, wanted, strict=True):
            line.pop("texts", None)
            assert line.keys() == other.keys() - own
            assert {name: value for name, value in line.items() if not isinstance(value, float)} == {
                name: other[name] for name, value in line.items() if not isinstance(value, float)
            }
        shutil.rmtree(trained)


def test_one_image_and_a_question_by_hand(predict, image_folder):
    image = str(image_folder / "1.png")
    folder = predict("vqa", "--images", image, "--question", "is it a dog ?")
    (line,) = lines_of(folder / "predictions.jsonl")
    assert (line["image"], line["question"], line["image_id"]) == (image, "is it a dog ?", image)
    assert not (folder / "scores.json").exists()
    assert "is it a dog ?" in (folder / "report.html").read_text()


@pytest.mark.parametrize("task", ["vqa", "captioning", "retrieval"])
def test_first_predictions_are_on_the_screen(predict, image_folder, tmp_path, task, caplog):
    caplog.set_level("INFO")
    (folder := tmp_path / "images").mkdir()
    for number in range(12):
        shutil.copy(image_folder / f"{number % 4}.png", folder / f"{number:02}.png")
    (folder / "01.png").write_bytes(b"none")
    (tmp_path / "texts.txt").write_text("a dog\na cat")
    more = {"vqa": ["--question", "is it\x1b[2J a dog ?"], "retrieval": ["--texts", str(tmp_path / "texts.txt")]}
    lines = lines_of(predict(task, "--images", str(folder), *more.get(task, [])) / "predictions.jsonl")
    (said,) = [record.getMessage() for record in caplog.records if record.getMessage().startswith("Predicted")]
    shown = said.splitlines()[1:]
    assert len(shown) == 11 and shown[10] == "  and 2 more" and "\x1b" not in said
    assert shown[1].startswith(f"  {folder / '01.png'} |") and shown[1].endswith("| the image cannot be read")
    for text, line in zip(shown[2:10], lines[2:10], strict=True):
        assert task != "retrieval" or line["texts"][0] == {"text": line["prediction"], "score": line["score"]}
        assert text.startswith(f"  {line['image']} |") and f"| {line['prediction'] or '(nothing)'} (" in text


def test_one_question_of_every_image_of_a_data_set(predict, image_folder):
    flags = ["--dataset_name", str(image_folder), "--eval_split", "test", "--question", "what color is it ?"]
    lines = lines_of(predict("vqa", *flags) / "predictions.jsonl")
    assert [(line["image_id"], line["question"]) for line in lines] == [
        (f"{number}.png", "what color is it ?") for number in range(4)
    ]
    assert not any("answers" in line or "captions" in line for line in lines)


def test_captions_of_a_folder_for_the_evaluation_server(predict, image_folder, tmp_path):
    (tmp_path / "val").mkdir()
    for number in (2, 1):
        shutil.copy(image_folder / f"{number}.png", tmp_path / "val" / f"COCO_val2014_{number:012d}.png")
    (tmp_path / "val" / "notes.txt").write_text("no image")
    folder = predict("captioning", "--images", str(tmp_path / "val"), "--format", "coco")
    lines = lines_of(folder / "predictions.jsonl")
    wanted = [{"image_id": number, "caption": line["prediction"]} for number, line in zip((1, 2), lines, strict=True)]
    assert json.loads((folder / "results.json").read_text()) == wanted
    assert all(line["prediction"] and 0 < line["probability"] < 1 for line in lines)


def test_captions_are_scored_against_all_references_of_an_image(predict, image_folder):
    folder = predict("captioning", "--dataset_name", str(image_folder), "--eval_split", "test")
    lines = lines_of(folder / "predictions.jsonl")
    assert [len(line["captions"]) for line in lines] == [2] * 4 and all(0 <= line["rouge_l"] <= 1 for line in lines)
    assert {"cider", "bleu4", "rouge_l", "exact_match"} <= set(json.loads((folder / "scores.json").read_text()))


def test_texts_of_a_file_and_of_the_data_are_ranked_for_each_image(predict, image_folder, tmp_path):
    (tmp_path / "texts.txt").write_text("a red dog\n\na blue sky\na red dog\ntwo giraffe\n")
    flags = ["--texts", str(tmp_path / "texts.txt"), "--top_texts", "2"]
    folder = predict("retrieval", "--images", str(image_folder), *flags)
    for line in lines_of(folder / "predictions.jsonl"):
        first, second = line["texts"]
        assert first["score"] >= second["score"] and first["text"] != second["text"]
        assert {first["text"], second["text"]} <= {"a red dog", "a blue sky", "two giraffe"}
    flags = ["--dataset_name", str(image_folder), "--eval_split", "test"]
    folder = predict("retrieval", *flags, folder=tmp_path / "data")
    lines = lines_of(folder / "predictions.jsonl")
    found = [line["texts"][0]["text"] in line["captions"] for line in lines]
    assert json.loads((folder / "scores.json").read_text())["text_recall@1"] == 25 * sum(found)
    assert all(len(line["texts"]) == 8 for line in lines) and [line["accuracy"] for line in lines] == found


def test_official_questions_without_annotations_become_official_results(predict, image_folder, tmp_path):
    for number in (7, 9):
        shutil.copy(image_folder / "0.png", tmp_path / f"COCO_test2015_{number:012d}.jpg")
    questions = [
        {"image_id": image, "question": "what color is it ?", "question_id": image * 10 + number}
        for number, image in enumerate([7, 9, 7])
    ]
    (tmp_path / "questions.json").write_text(json.dumps({"data_subtype": "test2015", "questions": questions}))
    flags = ["--questions_file", str(tmp_path / "questions.json"), "--image_folder", str(tmp_path), "--format", "vqa"]
    folder = predict("vqa", *flags)
    answers = [line["prediction"] for line in lines_of(folder / "predictions.jsonl")]
    assert json.loads((folder / "results.json").read_text()) == [
        {"question_id": number, "answer": answer} for number, answer in zip((70, 91, 72), answers, strict=True)
    ]


def test_stopped_run_goes_on_after_its_last_whole_line(predict, image_folder, tmp_path, monkeypatch):
    """It stops in the third of four batches; then the last line that it wrote is cut in two."""
    flags = ["--dataset_name", str(image_folder), "--eval_split", "test", "--per_device_eval_batch_size", "2"]
    whole = lines_of(predict("vqa", *flags, folder=tmp_path / "whole") / "predictions.jsonl")
    asked, answer = [], inference.answer

    def answer_until(limit):
        def stop_or_answer(model, texts, read, *args):
            if len(asked) >= limit:
                raise KeyboardInterrupt
            asked.extend(range(len(read[0])))
            return answer(model, texts, read, *args)

        return stop_or_answer

    monkeypatch.setattr(inference, "answer", answer_until(4))
    with pytest.raises(SystemExit):
        predict("vqa", *flags)
    part = tmp_path / "predicted" / "predictions.part0.jsonl"
    content = part.read_bytes()
    assert len(content.splitlines()) == 4 and not (tmp_path / "predicted" / "predictions.jsonl").exists()
    part.write_bytes(content[:-20])
    asked.clear()
    monkeypatch.setattr(inference, "answer", answer_until(100))
    folder = predict("vqa", *flags, "--per_device_eval_batch_size", "8")
    assert len(asked) == 5
    lines = lines_of(folder / "predictions.jsonl")
    scores = [[line.pop("probability") for line in part] for part in (lines, whole)]
    assert lines == whole and scores[0] == pytest.approx(scores[1], rel=1e-4)


def test_run_with_other_settings_does_not_go_on(predict, image_folder, monkeypatch, caplog):
    flags = ["--dataset_name", str(image_folder), "--eval_split", "test"]
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(inference, "answer", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        predict("vqa", *flags)
    with pytest.raises(SystemExit):
        predict("vqa", *flags, "--generation_num_beams", "1", "--image_folder", str(image_folder))
    assert "contains a run with different settings: image_folder, generation_num_beams" in caplog.text
    predict("vqa", *flags)
    with pytest.raises(SystemExit):
        predict("vqa", *flags)
    assert "contains other files. Choose another" in caplog.text


def test_folder_in_which_another_predict_is_writing_is_refused_or_passed_over(
    predict, image_folder, tmp_path, monkeypatch, caplog
):
    monkeypatch.chdir(tmp_path)
    flags = ["--dataset_name", str(image_folder), "--eval_split", "test"]
    assert claim(tmp_path / "predicted")
    with pytest.raises(SystemExit):
        predict("vqa", *flags)
    assert "is in use by another program that is still running" in caplog.messages[-1]
    assert claim(Path("outputs/predict"))
    folder, done = OUTPUT.settle_folder(None, {})
    assert (folder, done) == (Path("outputs/predict-2"), set())
    release_folders()
    assert not Path("outputs/predict").exists() and folder.exists()


def test_unreadable_image_is_listed_and_the_rest_is_answered(predict, image_folder, tmp_path):
    (tmp_path / "broken").mkdir()
    for number in range(4):
        shutil.copy(image_folder / f"{number}.png", tmp_path / "broken" / f"COCO_x_{number}.png")
    (tmp_path / "broken" / "COCO_x_2.png").write_bytes(b"no image")
    questions = [{"file_name": f"COCO_x_{n}.png", "question": "what ?", "question_id": n} for n in range(4)]
    questions.insert(0, {"file_name": "../../away.png", "question": "what ?", "question_id": 4})
    (tmp_path / "broken" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    out = predict("vqa", "--dataset_name", str(tmp_path / "broken"), "--format", "vqa")
    assert json.loads((out / "results.json").read_text())[2] == {"question_id": 2, "answer": ""}
    lines = lines_of(out / "predictions.jsonl")
    assert [line.get("unreadable_image", False) for line in lines] == [False, False, True, False]
    assert lines[2]["prediction"] == "" and "probability" not in lines[2] and lines[1]["prediction"]
    away, bad = lines_of(out / "bad_rows.jsonl")
    assert "is outside" in away["reason"] and away["row"] == 0
    # no number of a row: that among the lines is another one than that in the data
    assert bad.keys() == {"split", "image_id", "reason"}
    assert bad["image_id"] == "COCO_x_2.png" and "UnidentifiedImageError" in bad["reason"]
    assert "image cannot be read" in (out / "report.html").read_text()


def test_two_processes_write_what_one_writes(predict, image_folder, checkpoint, tmp_path):
    flags = ["--dataset_name", str(image_folder), "--eval_split", "test", "--per_device_eval_batch_size", "2"]
    one = lines_of(predict("vqa", *flags) / "predictions.jsonl")
    common = ["--model_name_or_path", checkpoint, "--use_cpu", "--dataloader_num_workers", "0"]
    words = [RECIPES / "predict.py", *common, *flags, "--output_dir", tmp_path / "two"]
    for code, errors in run_ranks(*words, folder=tmp_path):
        assert code == 0, errors[-3000:]
    two = lines_of(tmp_path / "two" / "predictions.jsonl")
    scores = [[line.pop("probability") for line in part] for part in (one, two)]
    assert one == two and scores[0] == pytest.approx(scores[1], rel=1e-4)


def test_adapter_does_what_it_was_trained_for(predict, image_folder, checkpoints, tmp_path):
    """Its base names another task."""
    base = load_model(checkpoints["vqa"], device="cpu")
    other = shutil.copytree(checkpoints["vqa"], tmp_path / "base")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "architectures": ["BlipForConditionalGeneration"]}))
    adapted = add_lora(base["model"], PeftArguments(use_peft=True))
    adapted.peft_config["default"].base_model_name_or_path = str(other)
    save_model(adapted, tmp_path / "adapter")
    folder = predict(str(tmp_path / "adapter"), "--images", str(image_folder / "0.png"), "--question", "is it ?")
    assert "probability" in lines_of(folder / "predictions.jsonl")[0]


MISTAKES = {
    "nothing named": ([], "by exactly one of --images, --dataset_name and --questions_file"),
    "no question": (["--images", "{images}"], 'Give --question "what is it?"'),
    "no such image": (["--images", "none.jpg", "--question", "is it ?"], "none.jpg does not exist"),
    "no image": (["--images", "{empty}", "--question", "is it ?"], "has no images"),
    "no split": (["--dataset_name", "{images}", "--eval_split", "dev"], "the data has train, test"),
    "other format": (["--dataset_name", "{images}", "--format", "coco"], "is for conditional_generation"),
    "no number": (
        ["--images", "{images}", "--question", "what ?", "--format", "vqa"],
        "needs a number in each question_id, found '",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_ends_in_one_message(predict, image_folder, tmp_path, caplog, mistake):
    flags, message = MISTAKES[mistake]
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit) as stopped:
        predict("vqa", *(flag.format(images=image_folder, empty=tmp_path / "empty") for flag in flags))
    assert stopped.value.code == 1
    assert message in caplog.text and "Traceback" not in caplog.text
    assert not (tmp_path / "predicted").exists()


def test_rows_of_all_splits_are_taken_with_a_word(image_folder, caplog):
    rows, _ = load_to_predict(DataArguments(dataset_name=str(image_folder)), "vqa")
    assert len(rows) == 16 and "Choose one with --eval_split" in caplog.text


def test_lines_are_read_back_whatever_their_texts_hold(tmp_path):
    lines = {5: {"prediction": "a\u2028b\x85c\r\nd"}, 2: {"prediction": "🙂"}}
    OUTPUT.append_part(tmp_path, [{5: lines[5]}, {2: lines[2]}])
    assert OUTPUT.read_parts(tmp_path) == lines


def test_pickled_weights_are_taken_where_that_is_said(predict, image_folder, checkpoint, tmp_path, caplog):
    pickled = shutil.copytree(checkpoint, tmp_path / "pickled")
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    asked = [str(pickled), "--images", str(image_folder / "0.png"), "--question", "is it ?"]
    with pytest.raises(SystemExit):
        predict(*asked)
    assert "add --allow_pickle" in caplog.text
    assert lines_of(predict(*asked, "--allow_pickle") / "predictions.jsonl")


def test_texts_are_asked_for_where_there_are_none(predict, image_folder, caplog):
    with pytest.raises(SystemExit):
        predict("retrieval", "--images", str(image_folder))
    assert "Give --texts FILE with one text per line" in caplog.text


OUT_OF_RANGE = {
    "question tokens": (
        "vqa",
        ["--max_question_tokens", "2"],
        "max_question_tokens must be between 3 and 512",
    ),
    "candidates": ("retrieval", ["--k_test", "-1"], "k_test must be at least 1, found -1"),
    "texts shown": ("retrieval", ["--top_texts", "-1"], "top_texts must be at least 1, found -1"),
    "beams": ("vqa", ["--generation_num_beams", "0"], "generation_num_beams must be at least 1, found 0"),
    "batch": ("vqa", ["--per_device_eval_batch_size", "0"], "per_device_eval_batch_size must be at least 1"),
    "workers": ("vqa", ["--dataloader_num_workers", "-1"], "dataloader_num_workers must be at least 0"),
    "answer length": ("vqa", ["--generation_max_length", "2"], "generation_max_length must be between 3 and 512"),
    "empty question": ("vqa", ["--question", " "], '--question is empty. Give --question "what is it?"'),
    "folder of texts": ("retrieval", ["--texts", "{folder}"], "texts needs a text file; {folder}: Is a directory"),
    "no texts": ("retrieval", ["--texts", "none.txt"], "texts needs a text file; none.txt: No such file"),
    "UTF-16": ("retrieval", ["--texts", "{utf16}"], "is not text in UTF-8 (invalid start byte at byte 0). Save it as"),
    "no training": ("vqa", ["--eval_fraction", "0.5"], "eval_fraction has no effect here. Leave it out: nothing is"),
    "demo": ("demo", [], "The demo model is randomly initialized. Train it with a recipe"),
    "columns": ("vqa", ["--question_column", "q"], "question_column q has no effect beside --images"),
}


@pytest.mark.parametrize("mistake", OUT_OF_RANGE)
def test_settings_are_checked_as_in_the_recipes_before_the_model_loads(
    predict, image_folder, tmp_path, monkeypatch, caplog, mistake
):
    task, flags, message = OUT_OF_RANGE[mistake]
    (tmp_path / "utf16.txt").write_text("a dog\n", encoding="utf-16")
    names = {"folder": image_folder, "utf16": tmp_path / "utf16.txt"}
    monkeypatch.delattr(PreTrainedModel, "from_pretrained")
    with pytest.raises(SystemExit) as stopped:
        predict(task, "--images", str(image_folder), *(flag.format(**names) for flag in flags))
    assert stopped.value.code == 1 and message.format(**names) in caplog.text


@pytest.mark.parametrize(
    ("task", "flags", "message"),
    [
        ("captioning", ["--question", "is it ?"], "--question needs a checkpoint for vqa; this one is for cond"),
        ("retrieval", ["--generation_num_beams", "1"], "needs a checkpoint for vqa or conditional_generation"),
        ("vqa", ["--question", "is it ?", "--prompt", "a"], "needs a checkpoint for conditional_generation"),
        ("captioning", ["--prompt", "a dog on the grass " * 5], "Set --generation_max_length to 28 or more"),
        ("captioning", ["--generation_min_length", "30"], "is larger than generation_max_length 20"),
    ],
)
def test_settings_that_the_checkpoint_does_not_read_are_refused(
    predict, image_folder, tmp_path, caplog, task, flags, message
):
    with pytest.raises(SystemExit):
        predict(task, "--images", str(image_folder), *flags)
    assert message in caplog.text and not (tmp_path / "predicted").exists()


@pytest.mark.parametrize(("task", "column"), [("vqa", "caption_column"), ("captioning", "question_column")])
def test_columns_that_the_checkpoint_does_not_read_are_refused(predict, image_folder, caplog, task, column):
    with pytest.raises(SystemExit):
        predict(task, "--dataset_name", str(image_folder), "--eval_split", "test", f"--{column}", "answer")
    assert f"--{column} needs a checkpoint for" in caplog.text


def test_run_in_which_no_image_can_be_read_ends_in_one_message(predict, image_folder, tmp_path, caplog):
    with pytest.raises(SystemExit) as stopped:
        predict("captioning", "--dataset_name", str(image_folder), "--image_column", "question")
    assert stopped.value.code == 1 and "None of the" in caplog.text and "Check image_column" in caplog.text
    assert len(lines_of(tmp_path / "predicted" / "bad_rows.jsonl")) == 2
