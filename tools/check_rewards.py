"""Grade a file of known rewards and compare.

    .venv/bin/python -m tools.check_rewards tests/golden/rewards.json

FILE is a JSON list of {"response", "answer", "overall", "format", "accuracy"}. Prints a line per difference and one of
summary; exit status 1 if anything differs, 0 if nothing does.
"""

import argparse
import json
import sys
from pathlib import Path

from megatron_papo.config import RewardConfig
from megatron_papo.errors import UserError
from megatron_papo.rollout.rewards import Grader
from megatron_papo.run.command_line import run
from megatron_papo.run.records import Rewards

FIELDS = ("overall", "format", "accuracy")
TOLERANCE = 1e-9
"""Of overall, a sum of two products of float64."""


def read_cases(path: Path) -> list[dict]:
    """Read FILE. Raises UserError if it is not such a list."""
    try:
        cases = json.loads(path.read_text())
        complete = all(isinstance(case, dict) and {"response", "answer", *FIELDS} <= case.keys() for case in cases)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: cannot be read as a JSON list of rewards: {error}")
    if not cases or not complete:
        raise UserError(f"{path}: expected a list of objects with the keys response, answer, {', '.join(FIELDS)}")
    return cases


def grade(cases: list[dict]) -> list[Rewards]:
    """Return the default reward (weights 0.9 and 0.1) of each case."""
    with Grader(RewardConfig()) as grader:
        under_way = [grader.submit(case["response"], case["answer"], cut_off=False) for case in cases]
        return [grader.result(submitted) for submitted in under_way]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, metavar="FILE")
    path = parser.parse_args().file
    cases = read_cases(path)
    different = 0
    for number, (case, rewards) in enumerate(zip(cases, grade(cases))):
        wrong = [name for name in FIELDS if abs(getattr(rewards, name) - case[name]) > TOLERANCE]
        different += bool(wrong)
        for name in wrong:
            late = " (timed out)" if rewards.timed_out else ""
            print(
                f"{path}: case {number}: {name} is {getattr(rewards, name)}{late}, expected {case[name]}:"
                f" {case['response']!r}"
            )
    print(f"{path}: {len(cases)} graded, {different} differ")
    sys.exit(1 if different else 0)


if __name__ == "__main__":
    run(main)
