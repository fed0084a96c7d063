"""The official VQA v2 accuracy, and the type of an answer."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import lru_cache
from statistics import fmean

from blip_ft.metrics.text_metric import TextMetric

# The rules of the official score. Source: GT-Vision-Lab/VQA, PythonEvaluationTools/vqaEvaluation/vqaEval.py. It is
# Python 2 code, where \d is 0-9 and lower() converts each character alone ("ΣΑΣ" ends in σ, not ς).
_OFFICIAL_ANSWERS = 10

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'

_COMMA_IN_NUMBER = re.compile(r"[0-9],[0-9]")

_PERIOD = re.compile(r"\.(?![0-9])")  # theirs begins with (?!<=\d), a typo for (?<!\d), which matches at every period

_ZERO_TO_TEN = "zero one two three four five six seven eight nine ten"

_NUMBER_WORDS = {word: str(number) for number, word in enumerate(_ZERO_TO_TEN.split())} | {"none": "0"}

_ARTICLES = {"a", "an", "the"}

_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""

# A word that lacks one apostrophe gets it back; somebody'd, by mistake, loses it. Their entries with a capital I (words
# are already in lower case) and let's and she's (mapped to themselves) have no effect and are left out.
_CONTRACTIONS = {
    form[:i] + form[i + 1 :]: form
    for form in _CONTRACTED.split()
    for i, character in enumerate(form)
    if character == "'"
}

_CONTRACTIONS["somebody'd"] = "somebodyd"

_MARK = re.compile(r" ?([^\w\s]|_) ?")

_THOUSANDS_COMMA = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")

_COMMA_OR_WORD_END = re.compile(r",|(?<=[^\W\d_]{2})\.(?=\w)")

_DIGITS = re.compile(r"\d*\.?\d+")

_NO_ANSWERS = (
    "A question needs at least one answer to be scored; this one has none. Remove such rows, or set answer_column to "
    "the column with the answers."
)


@lru_cache(maxsize=1 << 16)  # cleaning takes nearly all of the time, and most answers of a data set are repetitions
def _clean(text: str) -> str:
    """Process punctuation, case, number words, articles and contractions as the official code does.

    Source: vqaEval.py processPunctuation, processDigitArticle. Its bugs are kept: one number with a comma, or one space
    beside a punctuation mark, decides for the whole text whether the mark is removed or becomes a space.
    """
    has_number_with_comma = _COMMA_IN_NUMBER.search(text) is not None
    cleaned = text
    for mark in _PUNCTUATION:
        vanishes = has_number_with_comma or f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if vanishes else " ")
    # their code passes re.UNICODE, which is 32, as the count of sub, so the 33rd period stays
    cleaned = _PERIOD.sub("", cleaned, count=32)
    words = (_NUMBER_WORDS.get(word, word) for word in _lower(cleaned).split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _lower(text: str) -> str:
    # only "İ" becomes two characters in lower case; Python 2 returns the first
    return "".join(character.lower()[0] for character in text)


@lru_cache(maxsize=1 << 16)
def normalize_answer(text: str) -> str:
    """Normalize an answer for comparisons outside the official score: "An X - ray." and "x-ray" become "x ray".

    If nothing would be left, articles are kept: option "A" or "(A)" is "a", which differs from "the" and from "".
    """
    # The official cleaning depends on spaces beside punctuation marks, but the uncased tokenizer adds such spaces:
    # "x - ray", "1. 5", "1, 000", "it ' s". So they are removed first. Otherwise "1. 5" would become "1 5", and "a. m."
    # would lose an article. Marks that separate words are then found without spaces: a comma, except before three
    # digits, where it belongs to the number, and a period after two or more letters ("vs. left", unlike "u. s.").
    joined = _MARK.sub(r"\1", " ".join(text.split()))
    parted = _COMMA_OR_WORD_END.sub(" ", _THOUSANDS_COMMA.sub("", joined))
    return _clean(parted) or _lower(joined.strip(_PUNCTUATION + ".") or joined)


def most_frequent_answer(answers: Sequence[str]) -> str:
    """The most frequent answer, as written, or the first of several. Raises: ValueError if there are no answers."""
    if not answers:
        raise ValueError(_NO_ANSWERS)
    return Counter(answers).most_common(1)[0][0]


def answer_type(answers: Sequence[str]) -> str:
    """Classify a question as 'yes/no', 'number' or 'other' by its most frequent normalized answer.

    It is used for data without answer types. "two", "none" (0 in the official cleaning) and "2.5" are numbers; "2 dogs"
    and "50%" are other.
    """
    answer = most_frequent_answer([normalize_answer(answer) for answer in answers])
    if answer in ("yes", "no"):
        return "yes/no"
    return "number" if _DIGITS.fullmatch(answer) else "other"


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Accuracy of one prediction, 0-1.

    With ten or more answers, it is the official VQA v2 score: the mean over the annotators of min(1, n / 3), where n is
    the number of other annotators who agree with the prediction. With fewer answers, that score would punish a correct
    prediction (it is 0 for a single answer), so the accuracy is 1 if the normalized prediction equals any normalized
    answer, else 0. An empty prediction then scores 0.

    Raises: ValueError if there are no answers.
    Source: GT-Vision-Lab/VQA vqaEval.py evaluate. As there, nothing is cleaned if all annotators agree: "Yes" scores 0
        if all ten annotators say "yes".
    """
    if not answers:
        raise ValueError(_NO_ANSWERS)
    if len(answers) < _OFFICIAL_ANSWERS:
        normalized = normalize_answer(prediction)
        return float(normalized != "" and normalized in map(normalize_answer, answers))

    prediction, *answers = (text.replace("\n", " ").replace("\t", " ").strip() for text in (prediction, *answers))
    if len(set(answers)) > 1:
        prediction, *answers = map(_clean, (prediction, *answers))
    agree = answers.count(prediction)
    # an annotator who agrees has one agreeing other less; counting in thirds keeps 0.3, 0.6 and 0.9 exact
    thirds = agree * min(3, agree - 1) + (len(answers) - agree) * min(3, agree)
    return thirds / (3 * len(answers))


def scoring_rule(references: Sequence[Sequence[str]]) -> str:
    """Describe, for a report, the rule by which vqa_accuracy scores these questions.

    references: the answers of each question.
    """
    official = sum(len(answers) >= _OFFICIAL_ANSWERS for answers in references)
    if official == len(references):
        return "official, ten answers"
    if official == 0:
        return "match with any of the answers"
    return f"official, ten answers ({official} of {len(references)} questions), else match with any of the answers"


class VqaAccuracy(TextMetric):
    """Mean VQA accuracy in percent: the official VQA v2 score for questions with ten answers.

    Arguments of compute():
        predictions: one string per question; "" for an image that could not be read.
        references: a list of answers per question.
        answer_types: one name per question. None: the types given by `answer_type`.
    It returns percentages, 0-100: vqa_accuracy; exact_match, the share of non-empty predictions that equal the most
    frequent answer, both normalized; and vqa_accuracy_<type> for each type (vqa_accuracy_yes_no for "yes/no").
    """

    paper = "Goyal et al., Making the V in VQA Matter, CVPR 2017"

    def _compute(
        self, predictions: list[str], references: list[list[str]], answer_types: Sequence[str] | None = None
    ) -> dict[str, float]:
        if not predictions:
            raise ValueError("VQA accuracy needs at least one question, found none. Check eval_split and its rows.")
        if answer_types is None:
            answer_types = [answer_type(answers) for answers in references]
        if len(answer_types) != len(predictions):
            found = f"{len(answer_types)} types for {len(predictions)} questions"
            raise ValueError(
                f"answer_types needs one type per question, found {found}. Without it, types are derived from answers."
            )
        percents = [100 * vqa_accuracy(*pair) for pair in zip(predictions, references, strict=True)]
        # with a single answer, vqa_accuracy compares the normalized texts
        exact = [vqa_accuracy(p, [most_frequent_answer(a)]) for p, a in zip(predictions, references, strict=True)]
        by_type = defaultdict(list)
        for name, percent in zip(answer_types, percents, strict=True):
            by_type[re.sub(r"[\W_]+", "_", name.lower()).strip("_")].append(percent)
        return {
            "vqa_accuracy": fmean(percents),
            "exact_match": 100 * fmean(exact),
            **{f"vqa_accuracy_{name}": fmean(by_type[name]) for name in sorted(by_type)},
        }
