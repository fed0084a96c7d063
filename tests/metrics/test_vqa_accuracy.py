"""VQA accuracy: the official scores, values worked out by hand, and strings as the uncased tokenizer writes them."""

import json
import socket

import pytest
from conftest import GOLDEN

from blip_ft.metrics import vqa
from blip_ft.metrics.vqa import (
    VqaAccuracy,
    answer_type,
    most_frequent_answer,
    normalize_answer,
    scoring_rule,
    vqa_accuracy,
)


@pytest.fixture
def metric(tmp_path):
    return VqaAccuracy(cache_dir=str(tmp_path))


def test_vqa_accuracy_equals_official_on_1000_cases():
    cases = [json.loads(line) for line in (GOLDEN / "vqa_accuracy.jsonl").read_text(encoding="utf-8").splitlines()]
    wrong = [case for case in cases if vqa_accuracy(case["prediction"], case["answers"]) != case["accuracy"]]
    assert len(cases) == 1000
    assert wrong == []


def test_vqa_accuracy_three_of_ten_agree_is_90_percent():
    # each of the three who agree has two agreeing others: 2/3; each of the other seven has three: 1. (3 * 2/3 + 7) / 10
    assert vqa_accuracy("cat", ["cat"] * 3 + ["dog"] * 7) == 0.9


@pytest.mark.parametrize("num_answers", [10, 11, 13])
@pytest.mark.parametrize("agree", range(11))
def test_vqa_accuracy_equals_leaving_each_annotator_out(agree, num_answers):
    answers = ["cat"] * agree + ["dog"] * (num_answers - agree)
    others = [answers[:i] + answers[i + 1 :] for i in range(num_answers)]
    expected = sum(min(1, rest.count("cat") / 3) for rest in others) / num_answers
    assert vqa_accuracy("cat", answers) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("prediction", "unanimous", "divided"),
    [("Yes", 0, 1), ("yes.", 0, 1), ("the yes", 0, 1), (" yes\n", 1, 1), ("yes", 1, 1), ("", 0, 0)],
)
def test_vqa_accuracy_cleans_only_where_annotators_disagree(prediction, unanimous, divided):
    assert vqa_accuracy(prediction, ["yes", " yes"] * 5) == unanimous
    assert vqa_accuracy(prediction, ["yes"] * 9 + ["no"]) == divided


@pytest.mark.parametrize(
    ("prediction", "answer"),
    [
        ("cant", "can't"),
        ("Oclock", "o'clock"),
        ("twas", "'twas"),
        ("shouldn'tve", "shouldn't've"),
        ("shouldnt've", "shouldn't've"),
        ("yall'd've", "y'all'dve"),
        ("'ows'at", "ow's'at"),
        ("somebody'd", "somebodyd"),  # reversed by mistake in the official table
    ],
)
def test_vqa_accuracy_restores_lost_apostrophes(prediction, answer):
    assert vqa_accuracy(prediction, [answer] * 9 + ["x"]) == 1


@pytest.mark.parametrize(("prediction", "answer"), [("shouldntve", "shouldn't've"), ("im", "i'm"), ("lets", "let's")])
def test_vqa_accuracy_restores_none_outside_official_table(prediction, answer):
    assert vqa_accuracy(prediction, [answer] * 9 + ["x"]) == 0


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("İzmir", "izmir", 1),  # worked out by hand: in Python 2 the lower case of U+0130 is one letter, i
        ("DİYARBAKIR", "diyarbakir", 1),
        ("İzmir", "i\u0307zmir", 0),  # not two characters, as in Python 3
        ("Izmir", "ızmir", 0),
    ],
)
def test_vqa_accuracy_lowers_each_sign_to_one(prediction, answer, expected):
    assert vqa_accuracy(prediction, [answer] * 9 + ["x"]) == expected


def test_vqa_accuracy_removes_32_periods_and_no_more():
    assert vqa_accuracy("x" + 32 * ".", ["x"] * 9 + ["y"]) == 1
    assert vqa_accuracy("x" + 33 * ".", ["x"] * 9 + ["y"]) == 0
    assert vqa_accuracy("x" + 33 * ".", ["x."] * 9 + ["y"]) == 0  # the annotators' period is removed


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("pneumonia", ["pneumonia"], 1),
        ("The Pneumonia.", ["pneumonia"], 1),
        ("edema", ["pneumonia", "Edema"], 1),
        ("effusion", ["pneumonia", "edema"], 0),
        ("cat", ["dog"] * 8 + ["cat"], 1),  # nine answers
        ("cat", ["dog"] * 9 + ["cat"], 0.3),  # ten
    ],
)
def test_vqa_accuracy_of_fewer_than_ten_answers_is_match_with_any(prediction, answers, expected):
    assert vqa_accuracy(prediction, answers) == expected


@pytest.mark.parametrize("prediction", ["", " ", "\n"])
@pytest.mark.parametrize("answers", [[""], [" "], ["the"], ["A"], ["."], ["yes", ""]])
def test_vqa_accuracy_of_empty_prediction_is_zero(prediction, answers):
    assert vqa_accuracy(prediction, answers) == 0


@pytest.mark.parametrize(
    "score", [lambda: vqa_accuracy("x", []), lambda: most_frequent_answer([]), lambda: answer_type([])]
)
def test_no_answers_are_refused(score):
    with pytest.raises(ValueError, match="Remove such rows, or set answer_column"):
        score()


# (reference, the reference as decoded by BertTokenizer of blip-vqa-base, normalized)
DECODED = [
    ("X-ray", "x - ray", "x ray"),
    ("T2-weighted", "t2 - weighted", "t2 weighted"),
    ("MR - ADC map", "mr - adc map", "mr adc map"),
    ("x–ray", "x – ray", "x–ray"),
    ("yes/no", "yes / no", "yes no"),
    ("It's", "it ' s", "it's"),
    ("dont", "don ' t", "don't"),
    ("O'Neil's", "o ' neil ' s", "o'neil's"),
    ("1.5", "1. 5", "1.5"),
    (".5", ". 5", ".5"),
    ("6.5 x 8.8cm", "6. 5 x 8. 8cm", "6.5 x 8.8cm"),
    ("50%", "50 %", "50%"),
    ("1,000", "1, 000", "1000"),
    ("1,234,567.5", "1, 234, 567. 5", "1234567.5"),
    ("3, 4", "3, 4", "3 4"),
    ("10,20", "10, 20", "10 20"),
    ("1,000 x-rays", "1, 000 x - rays", "1000 x rays"),
    ("lung(s)", "lung ( s )", "lung s"),
    ("(left) lung", "( left ) lung", "left lung"),
    ("pain, jaundice,weight loss?", "pain, jaundice, weight loss?", "pain jaundice weight loss"),
    ("U.S.", "u. s.", "us"),
    ("a.m.", "a. m.", "am"),
    ("sinusitis vs. hemorrhage", "sinusitis vs. hemorrhage", "sinusitis vs hemorrhage"),
    ("10:30", "10 : 30", "10:30"),
    ("$5", "$ 5", "$5"),
    ("rock & roll", "rock & roll", "rock&roll"),
    ("a_b", "a _ b", "b"),
    ("The two\tdogs.", "the two dogs.", "2 dogs"),
    ("None", "none", "0"),
    ("A", "a", "a"),
    ("(A)", "( a )", "a"),
    ("-", "-", "-"),
    ("", "", ""),
]


@pytest.mark.parametrize(("reference", "decoded", "normalized"), DECODED)
def test_normalize_answer_reference_and_decoded_meet(reference, decoded, normalized):
    assert normalize_answer(reference) == normalized
    assert normalize_answer(decoded) == normalized


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("1.5", "15"),
        ("1.5", "1 5"),
        ("3, 4", "34"),
        ("A", "B"),
        ("A", "the"),
        ("A", ""),
        ("50%", "50"),
        ("can't", "can"),
        ("left lung", "right lung"),
    ],
)
def test_normalize_answer_keeps_different_answers_apart(one, other):
    assert normalize_answer(one) != normalize_answer(other)


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        (["Yes."], "yes/no"),
        (["no", "NO", "maybe"], "yes/no"),
        (["yes and no"], "other"),
        (["2"], "number"),
        (["2.5"], "number"),
        (["2. 5"], "number"),
        (["1,000"], "number"),
        (["two", "2", "yes"], "number"),
        (["None"], "number"),
        (["2 dogs"], "other"),
        (["50%"], "other"),
        (["1/2"], "other"),
        (["x-ray", "X - ray", "yes"], "other"),
        ([""], "other"),
    ],
)
def test_answer_type_is_told_by_most_frequent_answer(answers, expected):
    assert answer_type(answers) == expected


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        (["a", "b", "b"], "b"),
        (["b", "a"], "b"),
        (["c", "a", "b", "a", "b"], "a"),
        (["Cat", "cat", "dog", "dog"], "dog"),
    ],
)
def test_most_frequent_answer_is_first_on_ties(answers, expected):
    assert most_frequent_answer(answers) == expected


def test_scoring_rule_names_the_rule():
    assert scoring_rule([["yes"] * 10, ["no"] * 10]) == "official, ten answers"
    assert scoring_rule([["yes"], ["no"] * 9]) == "match with any of the answers"
    mixed = scoring_rule([["yes"], ["no"] * 10, ["2", "3"]])
    assert mixed == "official, ten answers (1 of 3 questions), else match with any of the answers"


PREDICTIONS = ["cat", "yes", "3", ""]
REFERENCES = [["cat"] * 2 + ["dog"] * 8, ["Yes"], ["two", "3", "2"], ["x-ray"]]  # 0.6, 1, 1, 0; exact 0, 1, 0, 0


def test_vqa_accuracy_metric_gives_percents_and_types_by_rule(metric):
    scores = metric.compute(predictions=PREDICTIONS, references=REFERENCES)
    assert scores == pytest.approx(
        {
            "vqa_accuracy": 65,  # (60 + 100 + 100 + 0) / 4
            "exact_match": 25,
            "vqa_accuracy_number": 100,
            "vqa_accuracy_other": 30,
            "vqa_accuracy_yes_no": 100,
        }
    )
    assert json.loads(json.dumps(scores)) == scores


def test_vqa_accuracy_metric_takes_types_of_the_data(metric):
    types = ["OPEN", "CLOSED", "OPEN", "multi-word / Other"]
    scores = metric.compute(predictions=PREDICTIONS, references=REFERENCES, answer_types=types)
    by_type = {"vqa_accuracy_open": 80, "vqa_accuracy_closed": 100, "vqa_accuracy_multi_word_other": 0}
    assert scores == pytest.approx({"vqa_accuracy": 65, "exact_match": 25} | by_type)


def test_vqa_accuracy_metric_never_matches_empty_prediction(metric):
    scores = metric.compute(predictions=[""], references=[[""]])
    assert scores == {"vqa_accuracy": 0, "exact_match": 0, "vqa_accuracy_other": 0}


def test_vqa_accuracy_metric_in_batches_equals_at_once(metric, tmp_path):
    for start in (0, 2):
        metric.add_batch(predictions=PREDICTIONS[start : start + 2], references=REFERENCES[start : start + 2])
    # a second run on the same machine during the first
    at_once = VqaAccuracy(cache_dir=str(tmp_path)).compute(predictions=PREDICTIONS, references=REFERENCES)
    assert metric.compute() == at_once


def test_vqa_accuracy_metric_is_silent_offline_and_leaves_no_file(monkeypatch, tmp_path, capfd):
    def refuse(*args):
        raise AssertionError("the metric opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    VqaAccuracy(cache_dir=str(tmp_path)).compute(predictions=PREDICTIONS, references=REFERENCES)
    assert capfd.readouterr() == ("", "")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"predictions": [], "references": []}, "needs at least one question"),
        ({"predictions": ["yes", "no"], "references": [["yes"]]}, "Mismatch in the number of predictions"),
        ({"predictions": ["yes"], "references": ["yes"]}, "expected a list"),
        ({"predictions": ["yes"], "references": [[]]}, "set answer_column"),
        ({"predictions": ["yes"], "references": [["yes"]], "answer_types": []}, "found 0 types for 1 questions"),
    ],
)
def test_vqa_accuracy_metric_refuses_inputs_that_do_not_fit(metric, inputs, message):
    with pytest.raises(ValueError, match=message):
        metric.compute(**inputs)


def test_vqa_accuracy_cleans_each_different_text_once():
    """Cleaning takes nearly all of the time, and most answers of a data set are repetitions."""
    vqa._clean.cache_clear()
    for i in range(100):
        vqa_accuracy(f"{i} x-rays", [f"{i + annotator % 3} x-rays" for annotator in range(10)])
    # 1,100 texts with the numbers 0 to 101
    assert vqa._clean.cache_info().misses == 102
