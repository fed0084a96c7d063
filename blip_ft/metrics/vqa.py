"""The official VQA v2 accuracy, and the type of an answer."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import lru_cache
from statistics import fmean

from blip_ft.metrics.text_metric import TextMetric

# The vocabulary of the official score. Source: GT-Vision-Lab/VQA, PythonEvaluationTools/vqaEvaluation/vqaEval.py. It is
# Python 2, where \d is 0-9 and lower() goes sign by sign ("ΣΑΣ" ends in σ, not ς).
_OFFICIAL_ANSWERS = 10

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'

_COMMA_IN_NUMBER = re.compile(r"[0-9],[0-9]")

_PERIOD = re.compile(r"\.(?![0-9])")  # theirs starts with (?!<=\d), a slip for (?<!\d), which holds at every period

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

# A form that lost one apostrophe gets it back; somebody'd, wrongly, loses it. Their entries with a capital I (words are
# lower case by then) and let's and she's (mapped to themselves) do nothing and are left out.
_CONTRACTIONS = {
    form[:i] + form[i + 1 :]: form for form in _CONTRACTED.split() for i, sign in enumerate(form) if sign == "'"
}

_CONTRACTIONS["somebody'd"] = "somebodyd"

_MARK = re.compile(r" ?([^\w\s]|_) ?")

_THOUSANDS_COMMA = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")

_COMMA_OR_WORD_END = re.compile(r",|(?<=[^\W\d_]{2})\.(?=\w)")

_DIGITS = re.compile(r"\d*\.?\d+")

_NO_ANSWERS = (
    "A question needs at least one answer to be scored; this one has none. Leave such rows out, or set answer_column "
    "to the column that holds the answers."
)


@lru_cache(maxsize=1 << 16)  # cleaning is nearly all of a score's time, and a few answers make up most of a data set
def _clean(text: str) -> str:
    """Punctuation, case, number words, articles and contractions as the official code handles them.

    Source: vqaEval.py processPunctuation, processDigitArticle. We follow its bugs: one number with a comma, or one
    space beside a mark, decides whether the mark vanishes or becomes a space in the whole text.
    """
    has_number_with_comma = _COMMA_IN_NUMBER.search(text) is not None
    cleaned = text
    for mark in _PUNCTUATION:
        vanishes = has_number_with_comma or f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if vanishes else " ")
    # their re.UNICODE, which is 32, stands where sub takes its count: the 33rd period stays
    cleaned = _PERIOD.sub("", cleaned, count=32)
    words = (_NUMBER_WORDS.get(word, word) for word in _lower(cleaned).split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _lower(text: str) -> str:
    # "İ" alone has two letters in lower case, of which Python 2 gives the first
    return "".join(sign.lower()[0] for sign in text)


@lru_cache(maxsize=1 << 16)
def normalize_answer(text: str) -> str:
    """The form in which answers are compared outside the official score: "An X - ray." and "x-ray" give "x ray".

    Where cleaning leaves nothing articles stay: option "A" or "(A)" is "a", not the same as "the" or no answer.
    """
    # The official cleaning goes by the spaces beside a mark, and the uncased tokenizer writes its own: "x - ray",
    # "1. 5", "1, 000", "it ' s". So those go first; afterwards "1. 5" would be "1 5", and "a. m." have lost an article.
    # What they told apart is then read from the signs: a comma before three digits belongs to the number, any other
    # parts words, and so does a period after two letters or more ("vs. left", unlike "u. s.").
    joined = _MARK.sub(r"\1", " ".join(text.split()))
    parted = _COMMA_OR_WORD_END.sub(" ", _THOUSANDS_COMMA.sub("", joined))
    return _clean(parted) or _lower(joined.strip(_PUNCTUATION + ".") or joined)


def most_frequent_answer(answers: Sequence[str]) -> str:
    """The answer given most often, as written; the first on ties. Raises ValueError if there are no answers."""
    if not answers:
        raise ValueError(_NO_ANSWERS)
    return Counter(answers).most_common(1)[0][0]


def answer_type(answers: Sequence[str]) -> str:
    """'yes/no', 'number' or 'other' by the most frequent normalized answer, for data that does not say.

    "two", "none" (0 in the official cleaning) and "2.5" are numbers; "2 dogs" and "50%" are other.
    """
    answer = most_frequent_answer([normalize_answer(answer) for answer in answers])
    if answer in ("yes", "no"):
        return "yes/no"
    return "number" if _DIGITS.fullmatch(answer) else "other"


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Accuracy of one prediction, 0-1.

    Ten answers or more: the official VQA v2 score, the mean over the annotators of min(1, other annotators who agree
    with the prediction / 3). Fewer, where that punishes a right prediction (0 with one answer): 1 if the prediction
    equals any answer, both normalized, else 0; an empty prediction is always 0.

    Raises: ValueError if there are no answers.
    Source: GT-Vision-Lab/VQA vqaEval.py evaluate. As there, nothing is cleaned where all annotators agree: "Yes" scores
        0 when all ten say "yes".
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
    # who agrees is not among their own others; counting whole thirds keeps 0.3, 0.6 and 0.9 exact
    thirds = agree * min(3, agree - 1) + (len(answers) - agree) * min(3, agree)
    return thirds / (3 * len(answers))


def scoring_rule(references: Sequence[Sequence[str]]) -> str:
    """Which rule of vqa_accuracy scores these questions, in words for a report. references: each question's answers."""
    official = sum(len(answers) >= _OFFICIAL_ANSWERS for answers in references)
    if official == len(references):
        return "official, ten answers"
    if official == 0:
        return "match with any of the answers"
    return f"official, ten answers ({official} of {len(references)} questions), else match with any of the answers"


class VqaAccuracy(TextMetric):
    """VQA accuracy in percent over many questions: the official VQA v2 score where a question has ten answers.

    compute() takes
        predictions: a string per question; "" for an image that could not be read.
        references: the list of answers per question.
        answer_types: None for the rule of `answer_type`, or a name per question.
    and returns percents, 0-100: vqa_accuracy; exact_match, which is equality with the most frequent answer, both
    normalized, never of an empty prediction; and vqa_accuracy_<type> for each type present, as a key
    ("yes/no": vqa_accuracy_yes_no).
    """

    paper = "Goyal et al., Making the V in VQA Matter, CVPR 2017"

    def _compute(
        self, predictions: list[str], references: list[list[str]], answer_types: Sequence[str] | None = None
    ) -> dict[str, float]:
        if not predictions:
            raise ValueError("VQA accuracy needs at least one question; got none. Check eval_split and its rows.")
        if answer_types is None:
            answer_types = [answer_type(answers) for answers in references]
        if len(answer_types) != len(predictions):
            found = f"{len(answer_types)} types for {len(predictions)} questions"
            raise ValueError(f"answer_types needs one type per question; got {found}. Leave it out for types by rule.")
        percents = [100 * vqa_accuracy(*pair) for pair in zip(predictions, references, strict=True)]
        # against a single answer vqa_accuracy is equality once normalized
        exact = [vqa_accuracy(p, [most_frequent_answer(a)]) for p, a in zip(predictions, references, strict=True)]
        by_type = defaultdict(list)
        for name, percent in zip(answer_types, percents, strict=True):
            by_type[re.sub(r"[\W_]+", "_", name.lower()).strip("_")].append(percent)
        return {
            "vqa_accuracy": fmean(percents),
            "exact_match": 100 * fmean(exact),
            **{f"vqa_accuracy_{name}": fmean(by_type[name]) for name in sorted(by_type)},
        }
