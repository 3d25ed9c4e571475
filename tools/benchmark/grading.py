"""Time to grade ordinary responses, alone and among hostile ones.

    python -m tools.benchmark.grading --responses 2000 --hostile 200

Ordinary: fractions, roots, polynomials and letters against answers of the same kinds, half of them right. Hostile:
towers of powers, factorials, decimals of a billion digits, deep nesting, long texts, continued fractions, sums of
roots, and what is within a billionth of the answer; no two the same. The rewards of the
ordinary ones must be the same among them: exit status 1 if not. Where other processes want the same cores, seconds of
the processors say more than seconds. The last line is one JSON object.
"""

import argparse
import json
import random
import resource
import sys
import time

from megatron_papo.config import RewardConfig
from megatron_papo.rollout.rewards import Grader
from megatron_papo.run.command_line import run
from megatron_papo.run.records import Rewards

Pair = tuple[str, str]
HOSTILE = (
    lambda n: f"9**9**9**{n + 9}",
    lambda n: f"{n + 99999}!",
    lambda n: f"(({n % 5 + 5}!)!)!",
    lambda n: f"{n + 1}e999999999",
    lambda n: "(" * (n + 500) + "x" + ")" * (n + 500),
    lambda n: "\\frac{" * (n + 500) + "x" + "}{2}" * (n + 500),
    lambda n: "9" * (n + 4000),
    lambda n: "1,000" * (n + 1000),
    lambda n: f"(x+{n})**9999",
    lambda n: f"(x+y)**{n + 90}/(x-y)**90",
    lambda n: "+".join(f"sqrt({k})" for k in range(n + 2, n + 150)),
    lambda n: f"x**{n + 99999}-1",
    lambda n: f"1/(x+{n}*y+" * 9 + "1" + ")" * 9,
    lambda n: f"((x+{n})**9+y)**9/(x-y)**9",
    lambda n: "+".join(f"1/(x+{k}*y)" for k in range(n + 1, n + 30)),
    lambda n: "x/2+(" + f"1/(x+{n}*y+" * 9 + "1" + ")" * 9 + ")/10**9",
    lambda n: f"1/(f(x)*x+{n}+" * 9 + "1" + ")" * 9,
    lambda n: f"sqrt(x+{n}*" * 9 + "1" + ")" * 9,
)
ANSWER = "\\frac{x}{2}"
"""What no hostile text equals, and what is compared by sympy."""


def ordinary(number: int, draw: random.Random) -> Pair:
    """Return a response and an answer that people write."""
    a, b = draw.randrange(2, 99), draw.randrange(2, 99)
    answer = draw.choice(
        [f"{a}", f"\\frac{{{a}}}{{{b}}}", f"{a}\\sqrt{{{b}}}", f"{a}x+{b}", "ABCD"[a % 4], f"({a}, {b})"]
    )
    said = answer if number % 2 else answer.replace(str(a), str(a + 1)).replace("frac", "dfrac")
    return f"<think>{number}</think>\\boxed{{{said}}}", answer


def hostile(number: int) -> Pair:
    kind, turn = number % len(HOSTILE), number // len(HOSTILE)
    return f"<think>{number}</think>\\boxed{{{HOSTILE[kind](turn)}}}", ANSWER


def graded(pairs: list[Pair], config: RewardConfig) -> tuple[float, float, list[Rewards]]:
    """Return the seconds that grading took, those of the processors that grade, the start of the processes included,
    and the rewards."""
    begun, before = time.monotonic(), _processor_seconds()
    with Grader(config) as grader:
        under_way = [grader.submit(response, answer, False) for response, answer in pairs]
        rewards = [grader.result(submitted) for submitted in under_way]
    return time.monotonic() - begun, _processor_seconds() - before, rewards


def _processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--responses", type=int, default=2000, help="ordinary ones and hostile ones (default 2000)")
    parser.add_argument("--hostile", type=int, default=200, help="of them (default 200)")
    parser.add_argument("--workers", type=int, default=2, help="processes that grade (default 2)")
    args = parser.parse_args()
    draw, config = random.Random(1), RewardConfig(workers=args.workers)
    normal = [ordinary(number, draw) for number in range(args.responses)]
    mixed: list[Pair] = list(normal)
    places = draw.sample(range(args.responses), args.hostile)
    for number, place in enumerate(places):
        mixed[place] = hostile(number)
    alone_seconds, alone_work, alone = graded(normal, config)
    among_seconds, among_work, among = graded(mixed, config)
    left = set(range(args.responses)) - set(places)
    same = all(alone[place] == among[place] for place in left)
    late = sum(among[place].timed_out for place in places)
    print(f"{args.responses} ordinary: {alone_seconds:.1f} s, {alone_work:.1f} s of the processors")
    print(
        f"{args.hostile} of them hostile: {among_seconds:.1f} s, {among_work:.1f} s of the processors"
        f" ({among_work / alone_work:.1f} times); {late} stopped after {config.time_limit_seconds:g} s, the others"
        " refused or graded"
    )
    seconds = {"seconds_alone": alone_seconds, "seconds_among": among_seconds}
    work = {"processor_seconds_alone": alone_work, "processor_seconds_among": among_work}
    print(json.dumps(seconds | work | {"late": late, "same": same}))
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    run(main)
