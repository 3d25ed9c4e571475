"""Every statistic against loops in plain Python, a published worked number, or data drawn where the truth is known."""

import itertools
import math
import random
import re
import time
from statistics import NormalDist

import numpy as np
import pytest

from megatron_papo.evaluation import statistics
from megatron_papo.evaluation.published import SETS, TABLE1
from megatron_papo.evaluation.statistics import PromptScores
from tests.helpers import ROOT

RIGHT = np.array([[1, 0, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [0, 1, 0, 0, 0]], dtype=bool)


def drawn_scores(seed, problems, per_problem, spread=0.3):
    """Scores of prompts in clusters: a problem's own difficulty, and some of each prompt's."""
    generator = np.random.default_rng(seed)
    own = np.repeat(generator.normal(0.5, spread, problems), per_problem)
    names = np.repeat([f"p{i}" for i in range(problems)], per_problem).tolist()
    return PromptScores(own + generator.normal(0, spread / 3, len(own)), names)


def test_pass_at_k_is_the_share_of_right_choices_of_k():
    """All choices of k of the five samples, one by one."""
    for k, value in statistics.pass_at_k(RIGHT).items():
        chosen = [any(choice) for row in RIGHT for choice in itertools.combinations(row, k)]
        assert value == pytest.approx(sum(chosen) / len(chosen), abs=1e-12)
    assert list(statistics.pass_at_k(RIGHT)) == [1, 2, 3, 4, 5]
    assert statistics.pass_at_k(RIGHT)[1] == pytest.approx(RIGHT.mean())
    biased = np.mean([1 - (1 - row.mean()) ** 2 for row in RIGHT])
    assert statistics.pass_at_k(RIGHT)[2] != pytest.approx(biased, abs=1e-3)  # control: the plug-in estimate


@pytest.mark.parametrize(
    "answers, right, expected",
    [
        ("3 3 5", "110", 1.0),
        ("3 5 5", "100", 0.0),
        ("3 5 3 5", "1010", 0.5),
        ("3 5 7", "100", 1 / 3),
        ("- - - 3", "0001", 1.0),  # a response without an answer has no vote
        ("- -", "00", 0.0),
        ("3 3 5 5 7", "11000", 0.5),
    ],
)
def test_majority(answers, right, expected):
    words = answers.split()
    numbers = np.array([[words.index(word) for word in words]])
    grades = np.array([[digit == "1" for digit in right]])
    answered = np.array([[word != "-" for word in words]])
    assert statistics.majority_at_k(grades, numbers, answered) == pytest.approx(expected)


def test_pass_at_k_of_thousands_of_samples():
    """Against whole numbers of any size, and in well under the minutes that those take."""
    generator = np.random.default_rng(0)
    right = generator.random((4, 3000)) < np.array([[0.0], [0.001], [0.3], [1.0]])
    started = time.process_time()
    found = statistics.pass_at_k(right)
    assert time.process_time() - started < 5
    for k in (1, 2, 17, 400, 2999, 3000):
        chances = [1 - math.comb(3000 - c, k) / math.comb(3000, k) for c in right.sum(axis=1).tolist()]
        assert found[k] == pytest.approx(sum(chances) / 4, abs=1e-12)


def test_majority_is_a_mean_over_prompts():
    right = np.array([[True, False], [False, False]])
    assert statistics.majority_at_k(right, np.array([[1, 2], [3, 3]]), np.ones((2, 2), bool)) == pytest.approx(0.25)


def naive_clustered_error(one):
    """arXiv 2411.00640, equations 1 and 4, term by term."""
    scores, n = one.scores.tolist(), len(one.scores)
    mean = sum(scores) / n
    variance = sum((s - mean) ** 2 for s in scores) / (n - 1) / n
    pairs = sum(
        (scores[i] - mean) * (scores[j] - mean)
        for i in range(n)
        for j in range(n)
        if i != j and one.problems[i] == one.problems[j]
    )
    return math.sqrt(variance + pairs / n**2)


@pytest.mark.parametrize("per_problem", [1, 3, 5])
def test_standard_error_of_one_set(per_problem):
    one = drawn_scores(per_problem, 40, per_problem)
    assert statistics.standard_error([one]) == pytest.approx(naive_clustered_error(one), rel=1e-12)
    plain = one.scores.std(ddof=1) / math.sqrt(len(one.scores))
    assert (statistics.standard_error([one]) == pytest.approx(plain, rel=1e-12)) == (per_problem == 1)


def test_standard_error_needs_two_problems():
    assert statistics.standard_error([PromptScores(np.array([0.5, 1.0]), ["a", "a"])]) is None
    assert statistics.standard_error([PromptScores(np.array([0.5]), ["a"])]) is None


def test_standard_error_over_sets_that_share_problems():
    """The mean of two sets is a weighted mean over all their prompts: equation 4 for weights, pair by pair."""
    full = drawn_scores(1, 30, 5)
    part = PromptScores(full.scores[::5] + 0.1, full.problems[::5])
    own = PromptScores(part.scores, [f"other {problem}" for problem in part.problems])
    rows = [(0.5 * (s - one.scores.mean()) / len(one.scores), problem, len(one.scores))
            for one in (full, part) for s, problem in zip(one.scores, one.problems)]  # fmt: skip
    pairs = sum(a * b for i, (a, p, _) in enumerate(rows) for j, (b, q, _) in enumerate(rows) if i != j and p == q)
    naive = math.sqrt(sum(a * a * n / (n - 1) for a, _, n in rows) + pairs)
    assert statistics.standard_error([full, part]) == pytest.approx(naive, rel=1e-12)
    apart = math.sqrt(sum(statistics.standard_error([one]) ** 2 for one in (full, own)) / 4)
    assert statistics.standard_error([full, own]) == pytest.approx(apart, rel=1e-12)
    assert statistics.standard_error([full, part]) > 1.2 * apart  # control: as if they shared nothing


def test_variance_is_split_as_the_data_were_drawn():
    """Prompts with p drawn from Beta(2, 2): between is its variance, within E[p(1-p)] / k, each over the prompts."""
    generator, prompts, samples = np.random.default_rng(3), 40_000, 4
    p = generator.beta(2, 2, prompts)
    parts = statistics.variance_parts(generator.random((prompts, samples)) < p[:, None], list(map(str, range(prompts))))
    assert parts.between * prompts == pytest.approx(0.05, rel=0.05)  # 1/20; the estimate's own error is 1.3 %
    assert parts.within * prompts == pytest.approx(0.2 / samples, rel=0.02)
    raw = RIGHT.mean(axis=1)
    small = statistics.variance_parts(RIGHT, list("abcd"))
    assert small.between + small.within == pytest.approx(raw.var(ddof=1) / 4)
    assert statistics.variance_parts(RIGHT[:, :1], list("abcd")) is None


def three_sets():
    """A set in clusters of five, a part of it, and one of its own; two checkpoints of which the second is better."""
    full = drawn_scores(5, 60, 5)
    new = full.scores + np.random.default_rng(6).normal(0.05, 0.2, len(full.scores))
    both = np.stack([full.scores, new], axis=1)
    alone = np.random.default_rng(7).random((80, 2))
    return {
        "full": PromptScores(both, full.problems),
        "part": PromptScores(both[::5] + 0.01, full.problems[::5]),
        "alone": PromptScores(alone, [f"alone/{i}" for i in range(80)]),
    }


def test_the_bootstrap_draws_problems():
    """The spread of its draws is the clustered standard error's, of sets, differences and means over sets; naive: one
    draw at a time with lists."""
    sets = three_sets()
    drawn = statistics.bootstrap_averages(sets, seed=1)
    assert drawn["full"].shape == (10_000, 2)
    for name, one in sets.items():
        for column in (0, 1):
            error = statistics.standard_error([PromptScores(one.scores[:, column], one.problems)])
            assert drawn[name][:, column].std() == pytest.approx(error, rel=0.04)  # 0.7 % by drawing
        difference = PromptScores(one.scores[:, 1] - one.scores[:, 0], one.problems)
        spread = (drawn[name][:, 1] - drawn[name][:, 0]).std()
        assert spread == pytest.approx(statistics.standard_error([difference]), rel=0.04)
    firsts = [PromptScores(one.scores[:, 0], one.problems) for one in sets.values()]
    mean = sum(drawn[name][:, 0] for name in sets) / 3
    assert mean.std() == pytest.approx(statistics.standard_error(firsts), rel=0.04)
    apart = math.sqrt(sum(statistics.standard_error([one]) ** 2 for one in firsts)) / 3
    assert mean.std() > 1.2 * apart  # control: full and part move together


def test_the_bootstrap_against_draws_one_by_one():
    sets = three_sets()
    by_problem = {}
    for name in ("full", "part"):
        for problem, score in zip(sets[name].problems, sets[name].scores[:, 1] - sets[name].scores[:, 0]):
            by_problem.setdefault(problem, {"full": [], "part": []})[name].append(score)
    problems, generator, naive = sorted(by_problem), random.Random(0), []
    for _ in range(2000):
        chosen = generator.choices(problems, k=len(problems))
        means = []
        for name in ("full", "part"):
            scores = [score for problem in chosen for score in by_problem[problem][name]]
            means.append(sum(scores) / len(scores))
        naive.append(sum(means) / 2)
    drawn = statistics.bootstrap_averages(sets, seed=3)
    ours = sum(drawn[name][:, 1] - drawn[name][:, 0] for name in ("full", "part")) / 2
    for level in (0.025, 0.25, 0.5, 0.75, 0.975):  # a quantile of 2000 draws is known to .06 standard deviations
        assert np.quantile(ours, level) == pytest.approx(np.quantile(naive, level), abs=0.15 * np.std(naive))
    assert np.std(ours) == pytest.approx(np.std(naive), rel=0.06)


def test_the_bootstrap_is_seeded_and_no_set_depends_on_the_others():
    sets = three_sets()
    whole = statistics.bootstrap_averages(sets, seed=1, draws=300)
    again = statistics.bootstrap_averages(sets, seed=1, draws=300)
    assert all((whole[name] == again[name]).all() for name in sets)
    assert (statistics.bootstrap_averages({"alone": sets["alone"]}, seed=1, draws=300)["alone"] == whole["alone"]).all()
    assert (statistics.bootstrap_averages(sets, seed=2, draws=300)["alone"] != whole["alone"]).any()


def test_sets_are_joined_by_others():
    problems = {"a": ["1"], "b": ["2"], "c": ["3"], "d": ["2", "1"]}
    assert sorted(statistics.sets_with_common_problems(problems)) == [["a", "b", "d"], ["c"]]


def test_p_values_are_right_where_nothing_differs():
    """200 pairs of checkpoints of equal strength on 40 problems of 5 prompts: 5 % are called different, and many more
    where the clusters are not told."""
    found = {"clusters": 0, "rows": 0}
    for trial in range(200):
        change = drawn_scores(trial, 40, 5)
        scores = np.stack([np.zeros(200), change.scores - 0.5], axis=1)
        for kind, problems in (("clusters", change.problems), ("rows", list(map(str, range(200))))):
            drawn = statistics.bootstrap_averages({"set": PromptScores(scores, problems)}, seed=trial, draws=400)
            p = statistics.estimate(0.0, drawn["set"][:, 1] - drawn["set"][:, 0]).p
            found[kind] += p < 0.05
    assert 2 <= found["clusters"] <= 22  # 10 expected, deviation 3.1; forty problems make it a little bold
    assert found["rows"] > 60


def test_interval_and_p_say_the_same():
    generator = np.random.default_rng(0)
    for shift in np.linspace(-3, 3, 61):
        drawn = generator.normal(shift, 1, 10_000)
        found = statistics.estimate(float(shift), drawn)
        low, high = found.interval
        assert (low > 0 or high < 0) == (found.p < 0.05) or abs(found.p - 0.05) < 1e-3
        normal = 2 * (1 - 0.5 * (1 + math.erf(abs(shift) / math.sqrt(2))))
        assert found.p == pytest.approx(normal, abs=0.03)
    assert statistics.estimate(0.0, np.zeros(100)).p == 1
    assert statistics.estimate(1.0, np.ones(9999)).p == pytest.approx(2 / 10_000)


def test_benjamini_hochberg():
    """The worked example of the paper (1995, section 3.1): of 15, four are rejected at .05, three by Bonferroni."""
    p = [0.0001, 0.0004, 0.0019, 0.0095, 0.0201, 0.0278, 0.0298, 0.0344, 0.0459, 0.3240, 0.4262, 0.5719, 0.6528, 0.7590,
         1.0]  # fmt: skip
    mixed = random.Random(1).sample(p, len(p))
    corrected = dict(zip(mixed, statistics.benjamini_hochberg(mixed), strict=True))
    assert [value for value in p if corrected[value] < 0.05] == p[:4]
    assert [value for value in p if value * 15 < 0.05] == p[:3]
    for i, value in enumerate(p):
        assert corrected[value] == pytest.approx(min(p[j] * 15 / (j + 1) for j in range(i, 15)))
    assert statistics.benjamini_hochberg([]) == []


def test_detectable_difference():
    """(1.96 + .8416) SE; and a test of differences of that size finds 80 % of them."""
    assert statistics.detectable_difference(0.02) == pytest.approx(0.02 * (1.959964 + 0.841621), rel=1e-6)
    found = np.random.default_rng(2).normal(statistics.detectable_difference(1.0), 1, 100_000)
    assert (abs(found) > 1.959964).mean() == pytest.approx(0.8, abs=0.005)


@pytest.mark.parametrize(
    "accuracy, prompts, more, points",
    [
        (0.8, 200, {}, 6.3),  # CLEVR
        (0.5, 200, {}, 7.9),
        (0.46, 447, {}, 5.3),  # LogicVista
        (0.4, 601, {}, 4.5),  # geometry3k
        (0.72, 2000, {}, 2.2),  # MMK12
        (0.62, 1308, {}, 3.0),  # MathVerse_V, as if its rows were independent
        (0.62, 1308, dict(prompts_per_problem=3, correlation=0.5), 4.2),
        (0.62, 1308, dict(prompts_per_problem=3), 5.1),
    ],
)
def test_what_can_be_detected(accuracy, prompts, more, points):
    """Half-widths that were worked out beforehand for the published sets, in points, to a tenth."""
    assert 100 * statistics.expected_half_width(accuracy, prompts, 8, **more) == pytest.approx(points, abs=0.1)


@pytest.mark.parametrize(
    "freedom, quantile", [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (7, 2.365), (30, 2.042)]
)
def test_student_t(freedom, quantile):
    """Tables of the 97.5 % quantile, to three places."""
    assert statistics.student_t_quantile(0.975, freedom) == pytest.approx(quantile, abs=6e-4)


@pytest.mark.parametrize("freedom", [1.0, 1.855, 2.5, 7.3, 400.5])
def test_student_t_of_fractions(freedom):
    """Against the density, added up in a million steps of the angle whose tangent is t / sqrt(df); control: the whole
    number below gives another quantile."""
    angles = (np.arange(1_000_000) + 0.5) / 1e6 * math.pi / 2
    density = np.cos(angles) ** (freedom - 1)
    quantile = statistics.student_t_quantile(0.975, freedom)
    inside = density[angles < math.atan(quantile / math.sqrt(freedom))].sum() / density.sum()
    assert inside == pytest.approx(0.95, abs=1e-5)
    if freedom != int(freedom) and freedom < 100:
        assert quantile < statistics.student_t_quantile(0.975, int(freedom)) * 0.999


def test_over_seeds():
    """Three runs: mean 62, deviation 2, half-width 4.303 x 2 / sqrt(3)."""
    found = statistics.over_seeds([60.0, 62.0, 64.0])
    assert (found.runs, found.mean, found.deviation) == (3, pytest.approx(62), pytest.approx(2))
    assert found.interval == (pytest.approx(62 - 4.968, abs=1e-3), pytest.approx(62 + 4.968, abs=1e-3))
    assert statistics.over_seeds([60.0]) is None


def test_difference_over_seeds():
    """Equal variances and numbers: Welch is the t test with 2 n - 2 degrees of freedom; 2.776 sqrt(4 / 3 + 4 / 3)."""
    low, high = statistics.difference_over_seeds([60.0, 62.0, 64.0], [50.0, 52.0, 54.0])
    assert (low, high) == (pytest.approx(10 - 4.533, abs=2e-3), pytest.approx(10 + 4.533, abs=2e-3))
    assert statistics.difference_over_seeds([1.0], [1.0]) is None
    assert statistics.difference_over_seeds([2.0, 2.0], [1.0, 1.0]) == (1.0, 1.0)


def test_welch_with_a_fraction_of_a_degree():
    """By hand: standard deviations 35.355 and 26.517 of two runs each make an error of 31.25 and 1.855 degrees, whose
    t is 4.643."""
    low, high = statistics.difference_over_seeds([100.0, 62.5], [87.5, 37.5])
    assert (high + low) / 2 == pytest.approx(18.75) and (high - low) / 2 == pytest.approx(4.643 * 31.25, abs=0.1)


def test_one_run_against_several():
    """Crawford and Howell: 4.303 x 2 x sqrt(1 + 1 / 3) on either side; control: three runs that happen to agree with
    the one have a narrower interval."""
    half = 4.303 * 2 * math.sqrt(4 / 3)
    for sign, sides in ((1, ([60.0, 62.0, 64.0], [50.0])), (-1, ([50.0], [60.0, 62.0, 64.0]))):
        low, high = statistics.difference_over_seeds(*sides)
        assert (low, high) == (pytest.approx(sign * 12 - half, abs=5e-3), pytest.approx(sign * 12 + half, abs=5e-3))
    low, high = statistics.difference_over_seeds([60.0, 62.0, 64.0], [50.0, 50.0, 50.0])
    assert (high - low) / 2 < half / 1.9


def test_relative_gain():
    assert statistics.relative_gain([0.3, 0.6], [0.2, 0.5]) == pytest.approx((0.5 + 0.2) / 2)
    assert statistics.relative_gain([0.3], [0.0]) is None


def test_the_published_sizes_take_seconds():
    """11,206 prompts in nine sets, three checkpoints, 10,000 draws: 3 s on one core where it was written."""
    counts = {"geometry3k": 601, "mathvista": 1000, "we_math": 1740, "mmk12": 2000, "logicvista": 447}
    counts |= {"clevr_count": 200, "mmmu_pro": 1730}
    sets = {name: [f"{name}/{i}" for i in range(count)] for name, count in counts.items()}
    sets["mathverse"] = [f"mathverse/{i // 5}" for i in range(2180)]
    sets["mathverse_v"] = [f"mathverse/{i // 3}" for i in range(1308)]
    generator = np.random.default_rng(0)
    scores = {name: PromptScores(generator.random((len(p), 3)), p) for name, p in sets.items()}
    started = time.process_time()
    drawn = statistics.bootstrap_averages(scores, seed=1)
    assert time.process_time() - started < 30
    assert sum(len(problems) for problems in sets.values()) == 11_206 and len(drawn) == 9


def test_the_page_says_what_was_computed():
    """The table of docs/evaluation.md; control: with another share between prompts it would not."""
    page = (ROOT / "docs" / "evaluation.md").read_text()
    rows = re.findall(r"^\| (\w+) \| (\d+) \| (\d+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", page, re.MULTILINE)
    assert [row[0] for row in rows] == list(SETS)
    published = next(row for row in TABLE1 if row.name == "PAPO-G 3B").sets
    for name, prompts, problems, accuracy, half_width, detectable in rows:
        more = dict(prompts_per_problem=int(prompts) // int(problems), correlation=0.5)
        width = statistics.expected_half_width(published[name] / 100, int(prompts), 8, **more)
        error = width / NormalDist().inv_cdf(0.975)
        assert float(accuracy) == published[name]
        assert f"{100 * width:.1f}" == half_width
        assert f"{100 * statistics.detectable_difference(error):.1f}" == detectable
        other = statistics.expected_half_width(published[name] / 100, int(prompts), 8, between_share=0.9, **more)
        assert f"{100 * other:.1f}" != half_width


def test_draws_that_tie_count_on_both_sides_whatever_the_rounding():
    """Scores in tenths, whose sums are not exact, against the same draws in whole numbers."""
    rng = np.random.default_rng(7)
    right = rng.integers(4, 7, size=(40, 2))
    problems = [str(number) for number in range(40)]
    tenths, whole = (
        statistics.bootstrap_averages({"set": statistics.PromptScores(scores, problems)}, seed=1, draws=2000)["set"]
        for scores in (right / 10, right.astype(float))
    )
    exact = np.rint((whole[:, 1] - whole[:, 0]) * 40)  # whole numbers: sums of right answers
    assert (exact == 0).sum() > 5 and ((tenths[:, 1] - tenths[:, 0])[exact == 0] != 0).any()  # there are such ties
    found = statistics.estimate(0.0, tenths[:, 1] - tenths[:, 0])
    assert found.p == statistics.estimate(0.0, exact).p
