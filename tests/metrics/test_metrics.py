"""metrics.py against the official scores, values worked out by hand, and strings as the uncased tokenizer has them."""

import json
import math
import socket
import time

import numpy as np
import pytest
import torch
from conftest import GOLDEN

from blip_ft.metrics import captions, retrieval, vqa
from blip_ft.metrics.baselines import answer_without_images, chance_scores, smoothing_floor
from blip_ft.metrics.captions import CaptionScores, caption_exact_match, caption_scores
from blip_ft.metrics.retrieval import recall_at_k, retrieval_scores, same_caption, text_recall_at_k
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
    # the three who agree have two others who do, 2/3 each; the other seven have three, 1 each: (3 * 2/3 + 7) / 10
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
        ("somebody'd", "somebodyd"),  # the official table has this one the wrong way round
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
        ("İzmir", "izmir", 1),  # worked out by hand: to Python 2 the lower case of U+0130 is one letter, i
        ("DİYARBAKIR", "diyarbakir", 1),
        ("İzmir", "i\u0307zmir", 0),  # and not the two that Python 3 gives
        ("Izmir", "ızmir", 0),
    ],
)
def test_vqa_accuracy_lowers_each_sign_to_one(prediction, answer, expected):
    assert vqa_accuracy(prediction, [answer] * 9 + ["x"]) == expected


def test_vqa_accuracy_removes_32_periods_and_no_more():
    assert vqa_accuracy("x" + 32 * ".", ["x"] * 9 + ["y"]) == 1
    assert vqa_accuracy("x" + 33 * ".", ["x"] * 9 + ["y"]) == 0
    assert vqa_accuracy("x" + 33 * ".", ["x."] * 9 + ["y"]) == 0  # the annotators' period goes


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
    with pytest.raises(ValueError, match="Leave such rows out, or set answer_column"):
        score()


# (reference, the same as BertTokenizer of blip-vqa-base decodes it, normalized)
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
    # a second run on the same machine, in the middle of the first
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
        ({"predictions": ["yes"], "references": [["yes"]], "answer_types": []}, "got 0 types for 1 questions"),
    ],
)
def test_vqa_accuracy_metric_refuses_inputs_that_do_not_fit(metric, inputs, message):
    with pytest.raises(ValueError, match=message):
        metric.compute(**inputs)


def test_vqa_accuracy_scores_10000_questions_in_seconds():
    vqa._clean.cache_clear()
    start = time.perf_counter()
    for i in range(10_000):
        vqa_accuracy(f"{i} x-rays", [f"{i + annotator % 3} x-rays" for annotator in range(10)])
    assert time.perf_counter() - start < 5  # 0.3 s on one idle core


CAPTION_SETS = json.loads((GOLDEN / "caption_scores.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("name", "form"), [(name, form) for name, content in CAPTION_SETS.items() for form in content if form != "scores"]
)
def test_caption_scores_equal_official(name, form):
    captions = CAPTION_SETS[name][form]
    scores = caption_scores([prediction for prediction, *_ in captions], [references for _, *references in captions])
    # the file has six decimals
    assert scores == pytest.approx(CAPTION_SETS[name]["scores"], abs=1e-6)


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("A child’s hand, palm-up; he can't see.", "a child 's hand palm-up he ca n't see"),
        ('"They\'re" gonna -- like us -- cannot...', "they 're gon na like us can not"),
        ("Dr. Wu on St. Ann's Rd. in the U.S. at 12:30.", "dr. wu on st. ann 's rd. in the u.s. at 12:30"),
        ("and/or (50%) & $3.50, 1,000 o'clock", "and/or -lrb- 50 % -rrb- & $ 3.50 1,000 o'clock"),
        ("Wow!! What?! Who? Me!", "wow !! what ?! who me"),
        ("'a dog' [sic] en–dash\ttab", "a dog -lsb- sic -rsb- en dash tab"),
        (" . ", ""),
    ],
)
def test_caption_words_are_those_of_the_java_tokenizer(caption, words):
    assert captions._caption_words(caption) == words.split()
    assert captions._caption_words(words) == words.split()


def test_caption_scores_of_short_prediction_are_as_worked_out():
    scores = caption_scores(["a dog", "x"], [["a dog runs"], ["y z", "y"]])
    # bleu1: two of three words found; candidates have 3 words, the closest references 3 + 1. rouge_l: precision 1 and
    # recall 2/3 in the first image, nothing in the second
    assert scores["bleu1"] == pytest.approx(100 * 2 / 3 * math.exp(1 - 4 / 3), abs=1e-6)
    assert scores["bleu2"] == pytest.approx(100 * math.sqrt(2 / 3) * math.exp(1 - 4 / 3), abs=1e-6)
    assert scores["rouge_l"] == pytest.approx(100 * 2.44 * (2 / 3) / (2 / 3 + 1.44) / 2, abs=1e-6)


def test_cider_of_short_prediction_is_as_worked_out():
    scores = caption_scores(["a dog", "x"], [["a dog runs"], ["y z"]])
    # every n-gram is in one image only, so weights are equal: cosine 2 / sqrt(2 * 3) of words, 1 / sqrt(1 * 2) of
    # pairs, one pair apart; the mean of four lengths, of two images
    expected = (2 / math.sqrt(6) + 1 / math.sqrt(2)) / 4 * math.exp(-1 / 72) / 2
    assert scores["cider"] == pytest.approx(1000 * expected, abs=1e-6)


def test_cider_weighs_words_by_the_references_of_the_set():
    captions = ["a dog runs away", "a red bus stops"]
    assert caption_scores(captions, [[caption] for caption in captions])["cider"] == pytest.approx(1000)
    # in every image, or in the only one: no weight
    assert caption_scores(captions[:1] * 2, [captions[:1]] * 2)["cider"] == 0
    assert caption_scores(captions[:1], [captions[:1]])["cider"] == 0


def test_caption_scores_of_empty_prediction_are_zero():
    assert caption_scores(["", ". "], [["a dog", "two dogs"], [""]]) == pytest.approx(
        {"cider": 0, "bleu1": 0, "bleu2": 0, "bleu3": 0, "bleu4": 0, "rouge_l": 0}
    )
    # one of two: half of the rest
    assert caption_scores(["a dog", ""], [["a dog"], ["x"]])["rouge_l"] == pytest.approx(50)


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ([], [], "Check eval_split"),
        (["a dog"], [["a dog"], ["a cat"]], "got 1 predictions for 2 images"),
        (["a dog", "a cat"], [["a dog"], []], "image 1 has none. Leave such rows out, or set caption_column"),
    ],
)
def test_caption_scores_refuse_inputs_that_do_not_fit(predictions, references, message):
    with pytest.raises(ValueError, match=message):
        caption_scores(predictions, references)


def test_caption_scores_of_1000_images_take_seconds():
    captions = CAPTION_SETS["flickr8k_200_four_references"]["tokenized"] * 5
    start = time.perf_counter()
    caption_scores([prediction for prediction, *_ in captions], captions)
    assert time.perf_counter() - start < 5  # 0.5 s on one core


def test_caption_scores_metric_equals_function(tmp_path):
    metric = CaptionScores(cache_dir=str(tmp_path))
    predictions, references = ["a dog runs", "two cats"], [["a dog", "the dog runs"], ["two cats sit"]]
    for prediction, own in zip(predictions, references, strict=True):
        metric.add_batch(predictions=[prediction], references=[own])
    assert metric.compute() == caption_scores(predictions, references)
    with pytest.raises(ValueError, match="expected a list"):
        metric.compute(predictions=["a dog"], references=["a dog"])


# rows are images, columns texts; the texts belong to the images 0, 0, 1, 2
SIMILARITY = np.array([[0.9, 0.1, 0.3, 0.3], [0.2, 0.8, 0.4, 0.1], [0.5, 0.6, 0.2, 0.3]])
OWNER = np.array([0, 0, 1, 2])


def test_recall_of_texts_is_as_worked_out():
    # ranks 1, 3, 1 and 2, the last for a tie with image 0
    assert recall_at_k(SIMILARITY, OWNER, ks=(1, 2, 3)) == {"recall@1": 50, "recall@2": 75, "recall@3": 100}


def test_recall_of_images_counts_the_best_of_their_texts():
    # ranks 1 by text 0 (text 1 is last), 2 and 3
    scores = text_recall_at_k(SIMILARITY, OWNER, ks=(1, 2, 3))
    assert scores == pytest.approx({"recall@1": 100 / 3, "recall@2": 200 / 3, "recall@3": 100})


def test_recall_of_images_does_not_count_own_texts_against_each_other():
    similarity = np.array([[3.0, 3.0, 2.0], [0.0, 0.0, 1.0]])
    assert text_recall_at_k(similarity, np.array([0, 0, 1]), ks=(1,)) == {"recall@1": 100}


@pytest.mark.parametrize("recall", [recall_at_k, text_recall_at_k])
@pytest.mark.parametrize("value", [0, -np.inf, np.nan])
def test_recall_takes_ties_and_nan_as_worst_rank(recall, value):
    scores = recall(np.full((4, 4), value, dtype=np.float32), np.arange(4), ks=(1, 3, 4))
    assert scores == {"recall@1": 0, "recall@3": 0, "recall@4": 100}


def test_recall_takes_every_image_with_an_identical_caption_as_right():
    captions = np.array(["a cat", "a dog", "a dog"])
    similarity = np.array([[0.9, 0.1, 0.2], [0.3, 0.4, 0.5], [0.2, 0.6, 0.5]])
    # text 1 is closer to image 2, which has the same caption; text 2 ties between the two
    assert recall_at_k(similarity, np.arange(3), ks=(1,))["recall@1"] == pytest.approx(100 / 3)
    assert recall_at_k(similarity, captions[:, None] == captions, ks=(1,)) == {"recall@1": 100}


def test_texts_fit_every_image_that_has_the_same_caption():
    right = same_caption(["a cat", "a dog", "a dog", "a cow"], np.array([0, 1, 0, 2]))
    assert right.tolist() == [[True, True, True, False], [False, True, True, False], [False, False, False, True]]


def test_retrieval_scores_take_images_and_texts_from_their_own_ranking():
    scores = retrieval_scores(SIMILARITY, retrieval._right_pairs(SIMILARITY, OWNER))
    assert scores["image_recall@1"] == 50 and scores["text_recall@1"] == pytest.approx(100 / 3)
    assert scores["recall_mean"] == pytest.approx((50 + 100 * 3 + 100 * 2 + 100 / 3 - 100) / 6)
    other = retrieval_scores(SIMILARITY, retrieval._right_pairs(SIMILARITY, OWNER), for_images=-SIMILARITY)
    assert other["text_recall@1"] == scores["text_recall@1"] and other["image_recall@1"] == 25


def test_exact_captions_are_counted_word_for_word():
    predictions, references = ["A dog .", "a cat", "a"], [["two", "a dog"], ["a cat runs"], ["b", "a"]]
    assert caption_exact_match(predictions, references) == pytest.approx(200 / 3)


def test_recall_of_image_without_text_is_zero_at_any_k():
    assert text_recall_at_k(np.ones((2, 1)), np.array([0]), ks=(1, 5)) == {"recall@1": 50, "recall@5": 50}


def test_recall_equals_sorting_each_query():
    similarity = np.random.default_rng(0).standard_normal((300, 600), dtype=np.float32)  # more than are taken at once
    owner = np.arange(600) // 2
    images_by_text, texts_by_image = np.argsort(-similarity, axis=0), np.argsort(-similarity, axis=1)
    texts = np.mean([owner[text] in images_by_text[:100, text] for text in range(600)])
    images = np.mean([image in owner[texts_by_image[image, :100]] for image in range(300)])
    assert recall_at_k(similarity, owner, ks=(100,)) == pytest.approx({"recall@100": 100 * texts})
    assert text_recall_at_k(similarity, owner, ks=(100,)) == pytest.approx({"recall@100": 100 * images})


@pytest.mark.parametrize("recall", [recall_at_k, text_recall_at_k])
@pytest.mark.parametrize(
    ("num_texts", "owner", "message"),
    [
        (3, [0, 1], r"got \(2,\) for a similarity of \(2, 3\)"),
        (3, [[True], [False]], r"got \(2, 1\)"),
        (3, [0, 1, 2], "0 to 1; got 0 to 2"),
        (3, [0, 1, -1], "0 to 1; got -1 to 1"),
        (0, [], "got 2 images and 0 texts"),
    ],
)
def test_recall_refuses_owner_that_does_not_fit(recall, num_texts, owner, message):
    with pytest.raises(ValueError, match=message):
        recall(np.zeros((2, num_texts)), np.array(owner))


def test_answer_without_images_goes_by_the_question_then_its_beginning_then_all():
    rows = [
        ("what color is the cat ?", ["red"]),
        ("What color is the cat", ["red", "blue"]),
        ("what color is the dog ?", ["blue"] * 3),
        ("is it a dog ?", ["yes"] * 5),
    ]
    asked = ["what color is the cat?", "what color is it ?", "how many ?", "what color", ""]
    assert answer_without_images(*zip(*rows, strict=True), asked) == ["red", "blue", "yes", "blue", "yes"]


def test_chance_is_the_mean_over_random_orders():
    # two images with two and one of three texts, and a text that fits both
    right = np.array([[True, True, False, True], [False, False, True, True]])
    generator = np.random.default_rng(0)
    drawn = [retrieval_scores(generator.random(right.shape), right) for _ in range(4000)]
    chance = chance_scores(right)
    for name, value in chance.items():
        assert value == pytest.approx(np.mean([scores[name] for scores in drawn]), abs=2)
    assert chance["text_recall@1"] == pytest.approx(100 * (3 / 4 + 2 / 4) / 2)
    assert chance["image_recall@1"] == pytest.approx(100 * (1 / 2 + 1 / 2 + 1 / 2 + 1) / 4)
    assert chance_scores(np.eye(20, dtype=bool))["recall_mean"] == pytest.approx((5 + 25 + 50) / 3)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_smoothing_floor_is_the_loss_of_the_best_logits(smoothing):
    logits = torch.zeros(1, 126, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=200, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = torch.nn.functional.cross_entropy(logits, torch.tensor([3]), label_smoothing=smoothing)
        value.backward()
        return value

    for _ in range(5):
        optimizer.step(loss)
    assert smoothing_floor(126, smoothing) == pytest.approx(loss().item(), abs=1e-4)
