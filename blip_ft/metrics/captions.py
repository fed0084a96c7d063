"""Caption scores: CIDEr-D, BLEU and ROUGE-L as in pycocoevalcap, without Java."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from statistics import fmean

import numpy as np

from blip_ft.metrics.text_metric import TextMetric

# The tokenizer of pycocoevalcap splits a caption into Penn Treebank words in lower case, without most punctuation. It
# should also remove brackets, but compares "-lrb-" with "-LRB-", so brackets remain as words.
_SPELLED = str.maketrans(
    {"(": " -lrb- ", ")": " -rrb- ", "[": " -lsb- ", "]": " -rsb- ", "{": " -lcb- ", "}": " -rcb- ", "’": "'"}
)

_SPLIT = re.compile(
    r"(?=n't\b|'(?:s|m|d|ll|re|ve)\b|(?<=\bcan)not\b|(?<=\bgon)na\b|(?<=\bwan)na\b|(?<=\bgot)ta\b)"  # do n't, can not
)

_WORD = re.compile(
    r"-[lr][rsc]b-|'(?:s|m|d|ll|re|ve)\b"
    r"|(?:[^\W\d_]\.){2,}|(?:ave|dr|etc|jr|mrs?|ms|rd|sr|st|vs)\."  # u.s., and abbreviations found in captions
    r"|\w+(?:(?:['/.-]|(?<=\d)[,:](?=\d))\w+)*"  # t-shirt, n't, and/or, 1,000, 12:30
    r"|[!?]{2,}|[^\w\s\"'`.,:;!?…–—“”‘-]"  # "!" is dropped, "!!" is not; & and $ are words
)

_MAX_NGRAM = 4

_NgramCounts = list[Counter[tuple[str, ...]]]  # for one caption; entry n - 1 counts the n-grams


def _caption_words(caption: str) -> list[str]:
    """Split a caption into words as pycocoevalcap does. Splitting the words joined by spaces gives the same words."""
    return _WORD.findall(_SPLIT.sub(" ", caption.lower().translate(_SPELLED)))


def _count_ngrams(words: list[str]) -> _NgramCounts:
    return [Counter(zip(*(words[i:] for i in range(n)), strict=False)) for n in range(1, _MAX_NGRAM + 1)]


def _bleu(candidates: list[_NgramCounts], references: list[list[_NgramCounts]]) -> list[float]:
    """Corpus BLEU-1 to BLEU-4, 0-1, from the n-gram counts of each candidate and of its references.

    Source: pycocoevalcap 1.2 bleu_scorer.py compute_score(option="closest"), with its two constants that avoid zeros.
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
    """CIDEr-D, 0-10, from the n-gram counts of each candidate and of its references.

    Source: pycocoevalcap 1.2 cider_scorer.py compute_cider. As there, the weight of an n-gram is computed from the
        references of this set, so a set of one image scores 0, and the compared lengths are the numbers of bigrams.
    """
    images_with = Counter()
    for captions in references:
        images_with.update(set().union(*(counts for caption in captions for counts in caption)))
    log_images = math.log(len(references))
    rarity = {ngram: log_images - math.log(count) for ngram, count in images_with.items()}

    def weigh(caption: _NgramCounts) -> list[dict[tuple[str, ...], float]]:
        return [{ngram: n * rarity.get(ngram, log_images) for ngram, n in counts.items()} for counts in caption]

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
    """ROUGE-L of one candidate's words, 0-1, from the best precision and best recall over the references, beta 1.2.

    Source: pycocoevalcap 1.2 rouge.py calc_score. Unlike there, an empty candidate against an empty reference scores 0,
        not 1.
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
    """Compute the scores of pycocoevalcap, times 100, for one caption per image.

    Args:
        predictions: one caption per image; "" counts as wrong.
        references: one or more human captions per image. In CIDEr, a word that fewer images of the set have weighs
            more, so scores of different sets, or of parts of a set, are not comparable.
    Returns: cider, 0-1000 (120 is a good model on COCO); bleu1 to bleu4, for the whole set, and rouge_l, 0-100.
    Raises: ValueError if there are no images, an image has no reference, or the numbers of predictions and images
        differ.
    Source: pycocoevalcap 1.2. Two regular expressions replace its Java tokenizer. They give the same words for all of
        5,500 captions of Flickr8k and COCO, and other words for rare forms such as 2.5cm (there "2.5 cm"), '90s and
        web addresses.
    """
    if not predictions:
        raise ValueError("Caption scores need at least one image, found none. Check eval_split and its rows.")
    if len(predictions) != len(references):
        found = f"{len(predictions)} predictions for {len(references)} images"
        raise ValueError(f"Caption scores need one prediction per image, found {found}.")
    for i, captions in enumerate(references):
        if not captions:
            raise ValueError(
                f"Caption scores need at least one reference per image; image {i} has none. Remove such rows, or set "
                "caption_column to the column with the captions."
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
    """ROUGE-L of one caption, 0-1. The mean over images, times 100, is rouge_l of caption_scores."""
    return _rouge_l(_caption_words(prediction), [_caption_words(caption) for caption in references])


def caption_exact_match(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Percentage of images whose prediction has the same words as a reference. Arguments as in caption_scores."""
    return 100 * fmean(
        _caption_words(prediction) in [_caption_words(caption) for caption in captions]
        for prediction, captions in zip(predictions, references, strict=True)
    )


class CaptionScores(TextMetric):
    """Caption scores times 100: CIDEr-D, BLEU-1 to BLEU-4 and ROUGE-L as in pycocoevalcap.

    compute() has the arguments and the result of `caption_scores`.
    """

    paper = "Chen et al., Microsoft COCO Captions: Data Collection and Evaluation Server, 2015"

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, float]:
        return caption_scores(predictions, references)
