"""Caption scores: those of pycocoevalcap, and values worked out by hand."""

import json
import math
from collections import Counter

import pytest
from conftest import GOLDEN

from blip_ft.metrics import captions
from blip_ft.metrics.captions import CaptionScores, caption_exact_match, caption_scores

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
    # recall 2/3 for the first image, 0 for the second
    assert scores["bleu1"] == pytest.approx(100 * 2 / 3 * math.exp(1 - 4 / 3), abs=1e-6)
    assert scores["bleu2"] == pytest.approx(100 * math.sqrt(2 / 3) * math.exp(1 - 4 / 3), abs=1e-6)
    assert scores["rouge_l"] == pytest.approx(100 * 2.44 * (2 / 3) / (2 / 3 + 1.44) / 2, abs=1e-6)


def test_cider_of_short_prediction_is_as_worked_out():
    scores = caption_scores(["a dog", "x"], [["a dog runs"], ["y z"]])
    # every n-gram is in one image only, so weights are equal: cosine 2 / sqrt(2 * 3) of words, 1 / sqrt(1 * 2) of
    # bigrams, lengths differ by one bigram; the mean over four n-gram lengths, then over two images
    expected = (2 / math.sqrt(6) + 1 / math.sqrt(2)) / 4 * math.exp(-1 / 72) / 2
    assert scores["cider"] == pytest.approx(1000 * expected, abs=1e-6)


def test_cider_weighs_words_by_the_references_of_the_set():
    captions = ["a dog runs away", "a red bus stops"]
    assert caption_scores(captions, [[caption] for caption in captions])["cider"] == pytest.approx(1000)
    # words in every image, or in the only image, have no weight
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
        (["a dog"], [["a dog"], ["a cat"]], "found 1 predictions for 2 images"),
        (["a dog", "a cat"], [["a dog"], []], "image 1 has none. Remove such rows, or set caption_column"),
    ],
)
def test_caption_scores_refuse_inputs_that_do_not_fit(predictions, references, message):
    with pytest.raises(ValueError, match=message):
        caption_scores(predictions, references)


def test_caption_scores_work_grows_with_the_number_of_captions(monkeypatch):
    """Each caption is split and counted once, and each prediction is compared with its own references only."""
    calls = Counter()

    def count(name):
        function = getattr(captions, name)

        def counted(*args):
            calls[name] += 1
            return function(*args)

        monkeypatch.setattr(captions, name, counted)

    for name in ("_caption_words", "_count_ngrams", "_longest_common_subsequence"):
        count(name)
    rows = CAPTION_SETS["flickr8k_200_four_references"]["tokenized"]
    caption_scores([prediction for prediction, *_ in rows], [references for _, *references in rows])
    num_captions, num_references = sum(map(len, rows)), sum(map(len, rows)) - len(rows)
    assert calls == {
        "_caption_words": num_captions,
        "_count_ngrams": num_captions,
        "_longest_common_subsequence": num_references,
    }


def test_caption_scores_metric_equals_function(tmp_path):
    metric = CaptionScores(cache_dir=str(tmp_path))
    predictions, references = ["a dog runs", "two cats"], [["a dog", "the dog runs"], ["two cats sit"]]
    for prediction, own in zip(predictions, references, strict=True):
        metric.add_batch(predictions=[prediction], references=[own])
    assert metric.compute() == caption_scores(predictions, references)
    with pytest.raises(ValueError, match="expected a list"):
        metric.compute(predictions=["a dog"], references=["a dog"])


def test_exact_captions_are_counted_word_for_word():
    predictions, references = ["A dog .", "a cat", "a"], [["two", "a dog"], ["a cat runs"], ["b", "a"]]
    assert caption_exact_match(predictions, references) == pytest.approx(200 / 3)
