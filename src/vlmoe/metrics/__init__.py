"""Metrics as the official evaluators compute them, each with a 95% bootstrap interval. Imports nothing of ours."""

from vlmoe.metrics.caption import bleu4, cider_d
from vlmoe.metrics.nlvr2 import consistency, sentence_id
from vlmoe.metrics.retrieval import ranks, recall
from vlmoe.metrics.scores import Score, bootstrap, mean_score
from vlmoe.metrics.vqa import normalize_answer, soft_scores, vqa_accuracy

__all__ = [
    "Score",
    "bleu4",
    "bootstrap",
    "cider_d",
    "consistency",
    "mean_score",
    "normalize_answer",
    "ranks",
    "recall",
    "sentence_id",
    "soft_scores",
    "vqa_accuracy",
]
