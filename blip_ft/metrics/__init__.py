"""Scores for answers, captions and retrieval. They need only strings and arrays, no model."""

from blip_ft.metrics.captions import CaptionScores, caption_scores
from blip_ft.metrics.retrieval import recall_at_k, retrieval_scores
from blip_ft.metrics.vqa import VqaAccuracy, normalize_answer, vqa_accuracy

__all__ = [
    "CaptionScores",
    "VqaAccuracy",
    "caption_scores",
    "normalize_answer",
    "recall_at_k",
    "retrieval_scores",
    "vqa_accuracy",
]
