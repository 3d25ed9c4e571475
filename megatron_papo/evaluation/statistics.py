"""The statistics of evaluations: means, errors and differences, as functions of arrays of numpy.

`right` [prompts, samples] says which responses are right. A prompt's score is the mean over its samples, a set's avg@k
the mean over its prompts, a group's the mean over its sets. Prompts that show the same problem are not independent:
they form a cluster, in whatever sets they stand.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from math import exp, lgamma, log, sqrt
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from megatron_papo.seeds import derive_seed

Floats = NDArray[np.float64]
DRAWS = 10_000
"""Of a bootstrap."""
LEVEL = 0.05
"""Two-sided: intervals hold 95 %, and p values below it are marked."""
POWER = 0.8
"""With which a difference is called detectable."""
FEW_PROBLEMS = 30
"""With fewer, percentile intervals of a bootstrap are too narrow."""
DRAWS_AT_ONCE = 200
"""How many draws of a bootstrap are in memory at a time."""


@dataclass(frozen=True)
class PromptScores:
    """The prompts of one set, each with its score and its problem."""

    scores: Floats
    """[prompts] or, for several checkpoints at once, [prompts, checkpoints]."""
    problems: Sequence[str]
    """[prompts]: prompts with the same one are a cluster, also across sets."""


def pass_at_k(right: NDArray[np.bool_]) -> dict[int, float]:
    """Return for every k up to the number of samples the unbiased estimate of pass@k, the chance that one of k is
    right.

        mean over prompts of 1 - C(n - c, k) / C(n, k)      c of n samples right      arXiv 2107.03374, section 2.1
    """
    prompts, samples = right.shape
    wrong, times = np.unique(samples - right.sum(axis=1), return_counts=True)
    all_wrong, found = np.ones(len(wrong)), {}  # the chance that none of k is right, by number of wrong samples
    for k in range(1, samples + 1):
        all_wrong = all_wrong * np.maximum(wrong - k + 1, 0) / (samples - k + 1)  # C(n - c, k) / C(n, k)
        found[k] = float(times @ (1 - all_wrong)) / prompts
    return found


def majority_at_k(right: NDArray[np.bool_], answers: NDArray[np.int64], answered: NDArray[np.bool_]) -> float:
    """Return maj@k, k the number of samples: the share of prompts whose most frequent answer is right.

    Of answers that are equally frequent each is chosen with the same probability: the result is the expectation. A
    response without an answer has no vote; a prompt without any vote counts as wrong.

    Args:
        right: [prompts, samples]
        answers: [prompts, samples] equal numbers for equal answers to one prompt.
        answered: [prompts, samples] which responses have an answer.
    """
    return sum(map(_majority, right, answers, answered)) / len(right)


def _majority(right: NDArray[np.bool_], answers: NDArray[np.int64], answered: NDArray[np.bool_]) -> float:
    votes: dict[int, list[bool]] = {}
    for answer, grade in zip(answers[answered].tolist(), right[answered].tolist(), strict=True):
        votes.setdefault(answer, []).append(grade)
    most = max(map(len, votes.values()), default=0)
    shares = [sum(grades) / most for grades in votes.values() if len(grades) == most]
    return sum(shares) / len(shares) if shares else 0.0


def standard_error(sets: Sequence[PromptScores]) -> float | None:
    """Return the standard error of the mean over sets of the mean over prompts, clustered by problem.

        SE^2 = sum_i d_i^2 / (n (n - 1)) + 1/n^2 sum_c sum_{i != j in c} d_i d_j      d_i = score_i - mean

    for one set: arXiv 2411.00640, equation 4. For several with weight 1/S each, d_i / n becomes d_i / (S n_s) and a
    cluster c holds the prompts of a problem in all sets. Where every problem has one prompt, it is the plain standard
    error. None where there are fewer than two problems.
    """
    by_problem: dict[str, float] = {}
    correction = 0.0
    for one in sets:
        number = len(one.scores)
        if len(set(one.problems)) < 2:
            return None
        deviations = (one.scores - one.scores.mean()) / (number * len(sets))
        for problem, deviation in zip(one.problems, deviations.tolist(), strict=True):
            by_problem[problem] = by_problem.get(problem, 0.0) + deviation
        correction += float((deviations**2).sum()) / (number - 1)
    return sqrt(sum(deviation**2 for deviation in by_problem.values()) + correction)


@dataclass(frozen=True)
class VarianceParts:
    """The squared standard error of avg@k, split; both parts are unbiased estimates."""

    between: float
    """From which prompts are in the set. More samples do not lower it. An estimate, which may fall below 0."""
    within: float
    """From sampling k responses to a prompt: k times as many samples make it k times smaller."""


def variance_parts(right: NDArray[np.bool_], problems: Sequence[str]) -> VarianceParts | None:
    """Return which part of the variance of avg@k comes from the choice of prompts, and which from sampling.

    within = mean over prompts of s_i^2 / k, divided by the number of prompts, s_i^2 the variance of a prompt's samples
    with k - 1 in the denominator; between = the rest of the clustered standard error's square. None where one sample
    or one problem cannot tell.
    """
    prompts, samples = right.shape
    whole = standard_error([PromptScores(right.mean(axis=1), problems)])
    if whole is None or samples < 2:
        return None
    within = float(right.var(axis=1, ddof=1).mean()) / (samples * prompts)
    return VarianceParts(whole**2 - within, within)


def bootstrap_averages(
    sets: Mapping[str, PromptScores], *, seed: int, draws: int = DRAWS
) -> dict[str, NDArray[np.float64]]:
    """Return avg@k of every set for several checkpoints [draws, checkpoints] under one cluster bootstrap over problems.

    In every draw as many problems as there are are drawn with replacement, once for all sets that share problems, and
    a set's average is that over all prompts of the drawn problems: what is computed from the averages of one draw (a
    difference of checkpoints, a mean over sets, a gain) is paired. Sets that share no problem are drawn independently,
    and what is drawn for some does not depend on which others there are.

    Args:
        sets: by name; `scores` is [prompts, checkpoints].
        seed: of the draws.
        draws: how many.
    """
    averages: dict[str, NDArray[np.float64]] = {}
    for names in sets_with_common_problems({name: one.problems for name, one in sets.items()}):
        numbers = {problem: i for i, problem in enumerate(dict.fromkeys(chain(*(sets[n].problems for n in names))))}
        columns = [_sums_by_problem(sets[name], numbers) for name in names]
        ends = np.cumsum([column.shape[1] for column in columns])
        sums = np.concatenate(columns, axis=1)
        generator = np.random.default_rng(derive_seed(seed, "bootstrap", *names))
        drawn = np.concatenate([times @ sums for times in _times_drawn(generator, len(numbers), draws)])
        for name, start, end in zip(names, [0, *ends], ends, strict=False):
            part = drawn[:, start:end]
            with np.errstate(invalid="ignore"):  # a draw without any problem of a small set tells nothing of it
                averages[name] = part[:, 1:] / part[:, :1]
    return averages


def _sums_by_problem(one: PromptScores, numbers: Mapping[str, int]) -> Floats:
    """Return [problems, 1 + checkpoints]: a problem's number of prompts in the set, and the sums of their scores."""
    places = [numbers[problem] for problem in one.problems]
    sums = np.zeros((len(numbers), 1 + one.scores.shape[1]))
    np.add.at(sums, places, np.concatenate([np.ones((len(places), 1)), one.scores], axis=1))
    return sums


def _times_drawn(generator: np.random.Generator, problems: int, draws: int) -> Iterator[Floats]:
    """Yield [some draws, problems], how often each problem is drawn; in each draw the sum is the number of problems."""
    for start in range(0, draws, DRAWS_AT_ONCE):
        rows = min(DRAWS_AT_ONCE, draws - start)
        chosen = generator.integers(0, problems, size=(rows, problems)) + problems * np.arange(rows)[:, None]
        yield np.bincount(chosen.ravel(), minlength=rows * problems).reshape(rows, problems).astype(np.float64)


def sets_with_common_problems(problems: Mapping[str, Sequence[str]]) -> list[list[str]]:
    """Return the names of the sets in lists: two sets with a common problem, directly or by others, are in one."""
    found: list[tuple[list[str], set[str]]] = []
    for name, own in problems.items():
        names, together = [name], set(own)
        apart = []
        for other_names, others in found:
            if together.isdisjoint(others):
                apart.append((other_names, others))
            else:
                names, together = [*other_names, *names], together | others
        found = [*apart, (names, together)]
    return [sorted(names) for names, _ in found]


@dataclass(frozen=True)
class Estimate:
    """A difference with what a bootstrap says of it."""

    value: float
    interval: tuple[float, float]
    """95 %: the percentiles 2.5 and 97.5 of the draws."""
    p: float
    """Two-sided, of the hypothesis that it is 0."""


ROUNDING = 1e-12
"""Two averages that differ by less are equal: sums of thirds and tenths are not exact, and ties count on both sides."""


def estimate(value: float, drawn: Floats) -> Estimate:
    """Return a difference with its percentile interval and the two-sided p value that belongs to it.

        p = 2 (1 + min(#draws <= 0, #draws >= 0)) / (draws + 1), at most 1

    so that p < .05 where the 95 % interval leaves 0 out. It is never below 2 / (draws + 1).

    Args:
        value: of the data themselves.
        drawn: [draws] the same, of each draw.
    """
    drawn = drawn[~np.isnan(drawn)]
    drawn = np.where(np.abs(drawn) < ROUNDING, 0.0, drawn)
    low, high = np.quantile(drawn, [LEVEL / 2, 1 - LEVEL / 2]).tolist()
    fewer = min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
    return Estimate(value, (low, high), min(1.0, 2 * (1 + fewer) / (len(drawn) + 1)))


def benjamini_hochberg(p_values: Sequence[float]) -> list[float]:
    """Return p values corrected for their number, in the given order: rejecting those below q keeps the expected share
    of false rejections among all rejections below q.

        p_(i) corrected = min over j >= i of p_(j) m / j, at most 1      Benjamini and Hochberg 1995
    """
    number = len(p_values)
    order = sorted(range(number), key=lambda place: p_values[place])
    corrected, smallest = [1.0] * number, 1.0
    for rank in range(number, 0, -1):
        smallest = min(smallest, p_values[order[rank - 1]] * number / rank)
        corrected[order[rank - 1]] = smallest
    return corrected


def detectable_difference(error: float) -> float:
    """Return the smallest difference that a two-sided test at 5 % finds with a probability of 80 %.

        (z_.975 + z_.8) SE of the difference      arXiv 2411.00640, section 5, solved for the difference

    error: standard error of the difference. For two checkpoints that are not paired, sqrt(2) times that of one.
    """
    normal = NormalDist()
    return (normal.inv_cdf(1 - LEVEL / 2) + normal.inv_cdf(POWER)) * error


def expected_half_width(
    accuracy: float,
    prompts: int,
    samples: int,
    *,
    between_share: float = 0.6,
    prompts_per_problem: int = 1,
    correlation: float = 1.0,
) -> float:
    """Return the half-width that the 95 % interval of an unpaired difference of two checkpoints will about have.

        1.96 sqrt(2 a (1 - a) (b (1 + (m - 1) r) + (1 - b) / k) / n)

    Args:
        accuracy: a, of both.
        prompts: n, of the set.
        samples: k, of a prompt.
        between_share: b, the part of a (1 - a) that lies between prompts: an assumption until variance_parts says it.
        prompts_per_problem: m.
        correlation: r, of the prompts of one problem in what lies between prompts.
    """
    between = between_share * (1 + (prompts_per_problem - 1) * correlation)
    variance = accuracy * (1 - accuracy) * (between + (1 - between_share) / samples) / prompts
    return NormalDist().inv_cdf(1 - LEVEL / 2) * sqrt(2 * variance)


def relative_gain(new: Sequence[float], base: Sequence[float]) -> float | None:
    """Return the mean over sets of (new - base) / base, as PAPO's tables have it (arXiv 2507.06448); None where a base
    is 0."""
    if not all(base):
        return None
    return sum((after - before) / before for after, before in zip(new, base, strict=True)) / len(base)


@dataclass(frozen=True)
class OverSeeds:
    """avg@k over training runs that differ in their seed alone."""

    runs: int
    mean: float
    deviation: float
    """Standard deviation of one run, with runs - 1 in the denominator."""
    interval: tuple[float, float]
    """95 %, of the mean over seeds; by Student's t. Prompts are taken as they are."""


def over_seeds(averages: Sequence[float]) -> OverSeeds | None:
    """Return mean, standard deviation and interval over training runs; None for fewer than two."""
    runs = len(averages)
    if runs < 2:
        return None
    mean = sum(averages) / runs
    deviation = sqrt(sum((average - mean) ** 2 for average in averages) / (runs - 1))
    half = student_t_quantile(1 - LEVEL / 2, runs - 1) * deviation / sqrt(runs)
    return OverSeeds(runs, mean, deviation, (mean - half, mean + half))


def difference_over_seeds(new: Sequence[float], base: Sequence[float]) -> tuple[float, float] | None:
    """Return the 95 % interval over training seeds of the difference of two means, by Welch's t; None where both sides
    are one run.

        v_s = variance of side s / n_s      half-width = t(df) sqrt(v_1 + v_2)
        df = (v_1 + v_2)^2 / (v_1^2 / (n_1 - 1) + v_2^2 / (n_2 - 1))      Welch 1947

    A side of one run has no spread of its own and is taken to have the other's: df = n - 1 and the half-width
    t(df) s sqrt(1 + 1 / n), n and s those of the other (Crawford and Howell 1998). Where the one run is the start of
    training, which has no seed, that is wider than it need be.
    """
    if len(new) < 2 and len(base) < 2:
        return None
    difference = sum(new) / len(new) - sum(base) / len(base)
    several = [float(np.var(side, ddof=1)) for side in (new, base) if len(side) > 1]
    if not any(several):
        return difference, difference
    if len(several) == 1:
        runs = max(len(new), len(base))
        squared, freedom = several[0] * (1 + 1 / runs), float(runs - 1)
    else:
        parts = [variance / len(side) for variance, side in zip(several, (new, base), strict=True)]
        squared = sum(parts)
        freedom = squared**2 / sum(part**2 / (len(side) - 1) for part, side in zip(parts, (new, base), strict=True))
    half = student_t_quantile(1 - LEVEL / 2, freedom) * sqrt(squared)
    return difference - half, difference + half


def student_t_quantile(probability: float, freedom: float) -> float:
    """Return the quantile of Student's t for a probability over 1/2. freedom: its degrees, from 1 on, fractions too."""
    low, high = 0.0, 1.0
    while _student_t_below(high, freedom) < probability:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_t_below(middle, freedom) < probability else (low, middle)
    return high


def _student_t_below(value: float, freedom: float) -> float:
    """Return the probability below a value that is not negative.

    1 - I_x(df / 2, 1 / 2) / 2      x = df / (df + t^2)      Abramowitz and Stegun 26.7.1
    """
    return 1 - _incomplete_beta(freedom / (freedom + value**2), freedom / 2, 0.5) / 2


def _incomplete_beta(x: float, a: float, b: float) -> float:
    """Return I_x(a, b) for 0 < x <= 1, by the continued fraction DLMF 8.17.22, from its end to its beginning."""
    if x > (a + 1) / (a + b + 2):  # where the fraction is slow
        return 1 - (_incomplete_beta(1 - x, b, a) if x < 1 else 0.0)
    fraction = 1.0
    for step in range(200, 0, -1):
        half = step // 2
        if step % 2:
            term = -(a + half) * (a + b + half) * x / ((a + step - 1) * (a + step))
        else:
            term = half * (b - half) * x / ((a + step - 1) * (a + step))
        fraction = 1 + term / fraction
    front = exp(a * log(x) + b * log(1 - x) - lgamma(a) - lgamma(b) + lgamma(a + b)) / a
    return front / fraction
