"""Scores of predictions against references: strings or similarities in, numbers out."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from functools import lru_cache
from statistics import fmean
from typing import Any

import datasets
import evaluate
import numpy as np

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


class _TextMetric(evaluate.Metric):
    """Strings against lists of strings in the form of the evaluate library; instantiated, not loaded: works offline."""

    paper: str

    def __init__(self, keep_in_memory: bool = True, **kwargs: Any):
        # on disk, concurrent runs on one machine would wait for each other's cache file
        super().__init__(keep_in_memory=keep_in_memory, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        strings = datasets.Value("string")
        return evaluate.MetricInfo(
            description=self.__doc__.partition("\n")[0],
            citation=self.paper,
            inputs_description=self.__doc__,
            features=datasets.Features({"predictions": strings, "references": datasets.Sequence(strings)}),
        )


class VqaAccuracy(_TextMetric):
    """VQA accuracy in percent over many questions: the official VQA v2 score where a question has ten answers.

    compute() takes
        predictions: a string per question; "" for a picture that could not be read.
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


# What pycocoevalcap's tokenizer makes of a caption: the Penn Treebank's words in lower case, without most punctuation.
# It means to drop brackets too, but compares "-lrb-" with "-LRB-", so they stay words.
_SPELLED = str.maketrans(
    {"(": " -lrb- ", ")": " -rrb- ", "[": " -lsb- ", "]": " -rsb- ", "{": " -lcb- ", "}": " -rcb- ", "’": "'"}
)
_SPLIT = re.compile(
    r"(?=n't\b|'(?:s|m|d|ll|re|ve)\b|(?<=\bcan)not\b|(?<=\bgon)na\b|(?<=\bwan)na\b|(?<=\bgot)ta\b)"  # do n't, can not
)
_WORD = re.compile(
    r"-[lr][rsc]b-|'(?:s|m|d|ll|re|ve)\b"
    r"|(?:[^\W\d_]\.){2,}|(?:ave|dr|etc|jr|mrs?|ms|rd|sr|st|vs)\."  # u.s. and those that captions have
    r"|\w+(?:(?:['/.-]|(?<=\d)[,:](?=\d))\w+)*"  # t-shirt, n't, and/or, 1,000, 12:30
    r"|[!?]{2,}|[^\w\s\"'`.,:;!?…–—“”‘-]"  # "!" is dropped, "!!" is not; & and $ are words
)
_MAX_NGRAM = 4
_NgramCounts = list[Counter[tuple[str, ...]]]  # of one caption; entry n - 1 is for runs of n words


def _caption_words(caption: str) -> list[str]:
    """A caption's words as pycocoevalcap's scorers see them. Words joined by spaces come back as they were."""
    return _WORD.findall(_SPLIT.sub(" ", caption.lower().translate(_SPELLED)))


def _count_ngrams(words: list[str]) -> _NgramCounts:
    return [Counter(zip(*(words[i:] for i in range(n)), strict=False)) for n in range(1, _MAX_NGRAM + 1)]


def _bleu(candidates: list[_NgramCounts], references: list[list[_NgramCounts]]) -> list[float]:
    """BLEU-1 to BLEU-4 of the whole set, 0-1, from the n-gram counts of each candidate and each of its references.

    Source: pycocoevalcap 1.2 bleu_scorer.py compute_score(option="closest"), with its two constants against zeros.
    """
    matched, proposed = np.zeros(_MAX_NGRAM), np.zeros(_MAX_NGRAM)
    closest_length = 0
    for candidate, captions in zip(candidates, references, strict=True):
        length = candidate[0].total()
        closest_length += min((abs(caption[0].total() - length), caption[0].total()) for caption in captions)[1]
        for n, counts in enumerate(candidate):
            proposed[n] += counts.total()
            matched[n] += sum(
                min(count, max(caption[n].get(ngram, 0) for caption in captions)) for ngram, count in counts.items()
            )
    precisions = (matched + 1e-15) / (proposed + 1e-9)
    brevity = math.exp(min(0.0, 1 - (closest_length + 1e-9) / (proposed[0] + 1e-15)))
    return [brevity * float(precisions[:n].prod()) ** (1 / n) for n in range(1, _MAX_NGRAM + 1)]


def _cider(candidates: list[_NgramCounts], references: list[list[_NgramCounts]]) -> float:
    """CIDEr-D, 0-10, from the n-gram counts of each candidate and each of its references.

    Source: pycocoevalcap 1.2 cider_scorer.py compute_cider. As there, the weight of an n-gram comes from the references
        of this set, so a single picture scores 0; and the length that is compared is the number of bigrams.
    """
    pictures_with = Counter()
    for captions in references:
        pictures_with.update(set().union(*(counts for caption in captions for counts in caption)))
    log_pictures = math.log(len(references))
    rarity = {ngram: log_pictures - math.log(count) for ngram, count in pictures_with.items()}

    def weigh(caption: _NgramCounts) -> list[dict[tuple[str, ...], float]]:
        return [{ngram: n * rarity.get(ngram, log_pictures) for ngram, n in counts.items()} for counts in caption]

    total = 0.0
    for candidate, captions in zip(candidates, references, strict=True):
        candidate_weights = weigh(candidate)
        candidate_norms = [math.hypot(*weights.values()) for weights in candidate_weights]
        for caption in captions:
            alike = 0.0
            for ours, norm, theirs in zip(candidate_weights, candidate_norms, weigh(caption), strict=True):
                product = sum(min(w, theirs[ngram]) * theirs[ngram] for ngram, w in ours.items() if ngram in theirs)
                if product:
                    alike += product / (norm * math.hypot(*theirs.values()))
            bigrams_apart = candidate[1].total() - caption[1].total()
            total += alike / _MAX_NGRAM / len(captions) * math.exp(-(bigrams_apart**2) / (2 * 6.0**2))
    return 10 * total / len(candidates)


def _rouge_l(candidate: list[str], captions: list[list[str]]) -> float:
    """ROUGE-L of one candidate's words, 0-1: the best precision and the best recall over the references, beta 1.2.

    Source: pycocoevalcap 1.2 rouge.py calc_score. Unlike it, nothing against an empty reference is 0, not 1.
    """
    common = [_longest_common_subsequence(candidate, caption) for caption in captions]
    if not any(common):
        return 0.0
    precision = max(common) / len(candidate)
    recall = max(length / max(1, len(caption)) for length, caption in zip(common, captions, strict=True))
    return (1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision)


def _longest_common_subsequence(one: list[str], other: list[str]) -> int:
    lengths = [0] * (len(other) + 1)
    for word in one:
        diagonal = 0
        for i, other_word in enumerate(other, start=1):
            longest = diagonal + 1 if word == other_word else max(lengths[i], lengths[i - 1])
            diagonal, lengths[i] = lengths[i], longest
    return lengths[-1]


def caption_scores(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Scores of one caption per picture against the picture's references, as pycocoevalcap gives them, times 100.

    Args:
        predictions: a caption per picture; "" counts as wrong.
        references: the human captions per picture, one or more. CIDEr weighs words by how few pictures of this set
            have them, so scores of different sets, or of part of a set, do not compare.
    Returns: cider, 0-1000 (120 is a good model on COCO); bleu1 to bleu4, of the whole set, and rouge_l, 0-100.
    Raises: ValueError if there is no picture, a picture without a reference, or not one prediction per picture.
    Source: pycocoevalcap 1.2. Two expressions stand for its Java tokenizer: the same words in all of 5,500 captions of
        Flickr8k and COCO; other words in rare forms such as 2.5cm (there "2.5 cm"), '90s and web addresses.
    """
    if not predictions:
        raise ValueError("Caption scores need at least one picture; got none. Check eval_split and its rows.")
    if len(predictions) != len(references):
        found = f"{len(predictions)} predictions for {len(references)} pictures"
        raise ValueError(f"Caption scores need one prediction per picture; got {found}.")
    for i, captions in enumerate(references):
        if not captions:
            raise ValueError(
                f"Caption scores need at least one reference per picture; picture {i} has none. Leave such rows out, "
                "or set caption_column to the column that holds the captions."
            )

    candidates = [_caption_words(caption) for caption in predictions]
    captions_of = [[_caption_words(caption) for caption in captions] for captions in references]
    candidate_counts = [_count_ngrams(words) for words in candidates]
    caption_counts = [[_count_ngrams(words) for words in captions] for captions in captions_of]
    bleu = _bleu(candidate_counts, caption_counts)
    rouge_l = fmean(_rouge_l(*pair) for pair in zip(candidates, captions_of, strict=True))
    return {
        "cider": 100 * _cider(candidate_counts, caption_counts),
        **{f"bleu{n}": 100 * score for n, score in enumerate(bleu, start=1)},
        "rouge_l": 100 * rouge_l,
    }


def caption_rouge_l(prediction: str, references: Sequence[str]) -> float:
    """0 to 1 for one caption; the mean over pictures is caption_scores' rouge_l."""
    return _rouge_l(_caption_words(prediction), [_caption_words(caption) for caption in references])


def caption_exact_match(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Share of pictures whose prediction has the very words of a reference, in percent; arguments as caption_scores."""
    return 100 * fmean(
        _caption_words(prediction) in [_caption_words(caption) for caption in captions]
        for prediction, captions in zip(predictions, references, strict=True)
    )


class CaptionScores(_TextMetric):
    """Caption scores times 100: CIDEr-D, BLEU-1 to BLEU-4 and ROUGE-L as pycocoevalcap has them.

    compute() takes and returns what `caption_scores` does.
    """

    paper = "Chen et al., Microsoft COCO Captions: Data Collection and Evaluation Server, 2015"

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, float]:
        return caption_scores(predictions, references)


_QUERIES_AT_ONCE = 256  # so that no second copy of a large similarity is made


def _right_pairs(similarity: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """(num_images, num_texts), True where the text belongs to the image. For `owner` see recall_at_k."""
    num_images, num_texts = similarity.shape
    if not similarity.size:
        found = f"{num_images} images and {num_texts} texts"
        raise ValueError(f"Recall needs at least one image and one text; got {found}. Check eval_split and its rows.")
    if owner.shape == similarity.shape:
        return owner.astype(bool)
    if owner.shape != (num_texts,):
        found = f"{owner.shape} for a similarity of {similarity.shape}"
        raise ValueError(f"owner needs one image row per text, or a mark per (image, text); got {found}.")
    if not 0 <= owner.min() <= owner.max() < num_images:
        found = f"{owner.min()} to {owner.max()}"
        raise ValueError(f"owner holds rows of similarity, 0 to {num_images - 1}; got {found}.")
    return owner == np.arange(num_images)[:, None]


def _recall(similarity: np.ndarray, right: np.ndarray, ks: Sequence[int]) -> dict[str, float]:
    """recall@k of the rows. similarity, right: (num_queries, num_candidates)."""
    wrong_ahead = []
    for start in range(0, len(similarity), _QUERIES_AT_ONCE):
        scores = similarity[start : start + _QUERIES_AT_ONCE]
        is_right = right[start : start + _QUERIES_AT_ONCE]
        best = np.where(is_right, scores, -np.inf).max(axis=1, keepdims=True)
        # not "scores >= best", which holds for no NaN: a diverged model would be right everywhere
        ahead = (~(scores < best) & ~is_right).sum(axis=1)
        wrong_ahead.append(np.where(is_right.any(axis=1), ahead, np.inf))
    return {f"recall@{k}": 100 * float(np.mean(np.concatenate(wrong_ahead) < k)) for k in ks}


def recall_at_k(similarity: np.ndarray, owner: np.ndarray, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """Share of texts whose own image is among the k most similar.

    Args:
        similarity: (num_images, num_texts); larger is closer.
        owner: (num_texts,); owner[j] is the row of text j's image. Several texts may share an image. Where a text fits
            several images, as identical captions do: (num_images, num_texts), owner[i, j] True if text j fits image i;
            the most similar of them counts.
    Returns: "recall@k" in percent, 0-100.
    Raises: ValueError if owner's length is not num_texts, or it names a row that similarity lacks.
    Source: BLIP train_retrieval.py itm_eval. Unlike it, a tie counts as the worst rank, and so does NaN.
    """
    return _recall(similarity.T, _right_pairs(similarity, owner).T, ks)


def text_recall_at_k(similarity: np.ndarray, owner: np.ndarray, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """Share of images of which any own text is among the k most similar; an image without a text counts as wrong.

    Arguments, result and errors as in `recall_at_k`.
    """
    return _recall(similarity, _right_pairs(similarity, owner), ks)


def same_caption(captions: Sequence[str], owner: np.ndarray) -> np.ndarray:
    """(num_images, num_texts), True where one of the image's captions is that text, word for word.

    captions: (num_texts,) and owner: (num_texts,), the image of each.
    """
    kinds = np.unique(np.asarray(captions), return_inverse=True)[1]
    has_kind = np.zeros((owner.max() + 1, kinds.max() + 1), bool)
    has_kind[owner, kinds] = True
    return has_kind[:, kinds]


def retrieval_scores(
    similarity: np.ndarray, right: np.ndarray, for_images: np.ndarray | None = None
) -> dict[str, float]:
    """text_recall@1, 5 and 10, image_recall@1, 5 and 10 and recall_mean, the mean of the six, in percent.

    text_recall: pictures one of whose captions is found; image_recall: captions whose picture is found.

    Args:
        similarity, right: (num_images, num_texts), as in recall_at_k.
        for_images: another similarity to find pictures by; each direction has candidates of its own.
    """
    found_images = recall_at_k(similarity if for_images is None else for_images, right)
    return _in_both_directions(text_recall_at_k(similarity, right), found_images)


def _in_both_directions(texts: dict[str, float], images: dict[str, float]) -> dict[str, float]:
    """Recalls named by what is found, and recall_mean."""
    recalls = {f"text_{name}": value for name, value in texts.items()}
    recalls |= {f"image_{name}": value for name, value in images.items()}
    return {**recalls, "recall_mean": fmean(recalls.values())}


# ---- what is reached without learning from an image ----


def answer_without_images(
    questions: Iterable[str], answers: Iterable[Sequence[str]], asked: Sequence[str]
) -> list[str]:
    """The answer to each question asked that its words alone suggest.

    It is the most frequent training answer to the same question; if it was not trained on, to questions that begin
    with the same two words; else of all.

    Args:
        questions, answers: of the rows trained on, one question and its answers each.
    """
    wanted = {key for question in asked for key in _keys_of(question)}
    counts: defaultdict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
    for question, given in zip(questions, answers, strict=True):
        for key in wanted.intersection(_keys_of(question)):
            counts[key].update(given)
    best = {key: count.most_common(1)[0][0] for key, count in counts.items()}
    return [next(best[key] for key in _keys_of(question) if key in best) for question in asked]


def _keys_of(question: str) -> list[tuple[str, ...]]:
    words = tuple(question.lower().rstrip(" ?").split())
    return [("is", *words), ("begins with", *words[:2]), ()]


def chance_scores(right: np.ndarray) -> dict[str, float]:
    """What retrieval_scores gives on average for a random order, in percent. right: (num_images, num_texts)."""

    def chance(right: np.ndarray) -> dict[str, float]:
        num_queries, num_candidates = right.shape
        wrong = num_candidates - right.sum(axis=1)  # (num_queries,)
        recalls, missed = {}, np.ones(num_queries)
        for drawn in range(10):
            # the odds that no right one is drawn now, after as many wrong ones
            odds = np.clip((wrong - drawn) / max(1, num_candidates - drawn), 0, 1)
            missed *= np.where(wrong == num_candidates, 1, odds)
            recalls[f"recall@{drawn + 1}"] = 100 * float(1 - missed.mean())
        return {f"recall@{k}": recalls[f"recall@{k}"] for k in (1, 5, 10)}

    return _in_both_directions(chance(right), chance(right.T))


def smoothing_floor(num_words: int, label_smoothing: float) -> float:
    """The least cross-entropy of a token under smoothed labels: the entropy of the labels.

    label_smoothing, 0 to 1, is spread evenly over all num_words, as torch's cross_entropy does.
    """
    other = label_smoothing / num_words
    own = 1 - label_smoothing + other
    return -sum(times * share * math.log(share) for times, share in ((1, own), (num_words - 1, other)) if share)
