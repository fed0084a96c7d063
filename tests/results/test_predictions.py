"""The lines of predictions.jsonl, for any task."""

from datasets import Dataset

from blip_ft.results.predictions import build_lines, grade, samples_of


def rows_of(**columns) -> Dataset:
    images = [{"bytes": b"many", "path": f"{number}.png"} for number in range(3)]
    return Dataset.from_dict({"image": images, "image_id": ["a", "b", "c"], **columns})


def test_line_is_the_row_with_the_path_of_its_image_and_the_prediction():
    rows = rows_of(question=["one ?", "two ?", "three ?"], answers=[["yes"], [], ["no"]])
    results = [{"prediction": "yes", "probability": 0.5}, {"prediction": "2", "probability": None}, None]
    assert build_lines(rows, results) == [
        {"image": "0.png", "image_id": "a", "question": "one ?", "answers": ["yes"], **results[0]},
        {"image": "1.png", "image_id": "b", "question": "two ?", **results[1]},
        {"image": "2.png", "image_id": "c", "question": "three ?", "answers": ["no"]}
        | {"prediction": "", "unreadable_image": True},
    ]


def test_unreadable_image_counts_as_wrong_in_the_terms_of_the_others():
    rows = rows_of(captions=[["a dog"], ["a cat"], ["a cow"]])
    for name in ("rouge_l", "accuracy"):
        lines = build_lines(rows, [{"prediction": "a", "score": 2.0, name: 1.0}, None, None])
        assert [line[name] for line in lines] == [1.0, 0.0, 0.0]
    samples = samples_of(lines)
    assert [sample.readable for sample in samples] == [True, False, False]
    assert [sample.verdict for sample in samples] == ["right", "wrong", "wrong"]
    assert (samples[0].score_name, samples[0].score, samples[1].score) == ("score", 2.0, None)


def test_lines_with_references_are_graded_and_the_others_stay():
    rows = rows_of(question=["one ?", "two ?", "three ?"], answers=[["yes"], [], ["no"]])
    lines = build_lines(rows, [{"prediction": "yes"}, {"prediction": "2"}, None])
    graded, scores = grade(lines, "vqa")
    assert scores["exact_match"] == 50 and scores["scored_rows"] == 2
    assert [line.get("accuracy") for line in graded] == [1.0, None, 0.0]
    assert [line.get("answer_type") for line in graded] == ["yes/no", None, "yes/no"]
    assert "accuracy" not in lines[0] and grade(lines[1:2], "vqa") == (lines[1:2], {})
