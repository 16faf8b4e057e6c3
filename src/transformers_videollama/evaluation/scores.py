"""`Score`: a measured number with its 95% interval, and how intervals are computed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

NUM_RESAMPLES = 1000


@dataclass(frozen=True)
class Score:
    """
    A measured number.

    Args:
        name (`str`): What was measured.
        value (`float`, *optional*): The number; shares and captions' scores as percentages. None: not defined.
        low, high (`float`, *optional*): The 95% interval.
        count (`int`): Of how many questions.
        group (`str`): Of which of them; empty for all.
    """

    name: str
    value: float | None
    low: float | None
    high: float | None
    count: int
    group: str = ""


def share(name: str, hits: Sequence[bool], group: str = "") -> Score:
    """The percentage of hits, with the interval of E. B. Wilson (1927)."""
    from scipy.stats import binomtest

    if not hits:
        return Score(name, None, None, None, 0, group)
    interval = binomtest(sum(hits), len(hits)).proportion_ci(method="wilson")
    return Score(
        name, 100 * sum(hits) / len(hits), 100 * float(interval.low), 100 * float(interval.high), len(hits), group
    )


def mean(name: str, values: Sequence[float], seed: int, group: str = "") -> Score:
    """The mean of values, with a bootstrap interval."""
    array = np.asarray(values, dtype=float)
    return bootstrapped(name, lambda indices: float(array[indices].mean()), len(array), seed, group)


def bootstrapped(
    name: str,
    statistic: Callable[[np.ndarray], float | None],
    count: int,
    seed: int,
    group: str = "",
    strata: Sequence[np.ndarray] | None = None,
) -> Score:
    """
    A statistic with the interval between the 2.5% and 97.5% quantiles of its values for questions drawn again.

    Args:
        name, group (`str`): See [`Score`].
        statistic (`Callable[[np.ndarray], float | None]`):
            What the questions of some indices, int64 `(questions,)`, give; None where that is not defined.
        count (`int`): How many questions there are.
        seed (`int`): Of the draws; the same seed gives the same interval.
        strata (`Sequence[np.ndarray]`, *optional*):
            Indices of the questions that are drawn among themselves; by default all are.
    """
    strata = [np.arange(count)] if strata is None else strata
    value = statistic(np.arange(count)) if count else None
    if value is None:
        return Score(name, None, None, None, count, group)
    rng = np.random.default_rng(seed)
    draws = (np.concatenate([rng.choice(stratum, len(stratum)) for stratum in strata]) for _ in range(NUM_RESAMPLES))
    values = [number for number in map(statistic, draws) if number is not None]
    return Score(name, value, *quantiles(values), count, group)


def quantiles(values: Sequence[float]) -> tuple[float, float]:
    """The 2.5% and 97.5% quantiles of values."""
    return float(np.quantile(values, 0.025)), float(np.quantile(values, 0.975))
