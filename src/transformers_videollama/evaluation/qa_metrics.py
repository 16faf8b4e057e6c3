"""Scores of answers to open questions that need no judge."""

import re
import string
from collections.abc import Sequence
from typing import Any

from .items import Item
from .scores import Score, mean, share


def normalise(text: str) -> str:
    """Small letters without punctuation and articles, words joined by single blanks, as SQuAD compares answers."""
    text = text.lower().translate(str.maketrans(string.punctuation, " " * len(string.punctuation)))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def score_answers(items: Sequence[Item], records: Sequence[dict[str, Any]], seed: int) -> list[Score]:
    """
    How often an answer is the reference or contains it word for word, and the F1 of ROUGE-1 and ROUGE-L, in percent.

    Args:
        items (`Sequence[Item]`): The questions that were answered.
        records (`Sequence[dict]`): The `"answer"` of each.
        seed (`int`): Of the intervals of ROUGE.
    """
    from rouge_score.rouge_scorer import RougeScorer

    pairs = [(normalise(r["answer"]), normalise(item.references[0])) for item, r in zip(items, records, strict=True)]
    rouge = RougeScorer(["rouge1", "rougeL"], use_stemmer=True)
    overlaps = [rouge.score(reference, answer) for answer, reference in pairs]
    contains = [f" {reference} " in f" {answer} " for answer, reference in pairs]
    return [
        share("exact match", [answer == reference for answer, reference in pairs]),
        share("contains the answer", contains),
        mean("ROUGE-1", [100 * overlap["rouge1"].fmeasure for overlap in overlaps], seed),
        mean("ROUGE-L", [100 * overlap["rougeL"].fmeasure for overlap in overlaps], seed),
        *(
            share(
                "contains the answer", [hit for hit, item in zip(contains, items, strict=True) if item.group == g], g
            )
            for g in dict.fromkeys(item.group for item in items)
        ),
    ]
