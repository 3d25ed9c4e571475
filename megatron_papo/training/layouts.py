"""How rollouts stand in the model's input: two layouts that give the same numbers.

plain: one input row per rollout, prompt (images expanded) and response, padded on the right.
group: one input row for all, in which each prompt stands once and its responses follow it (model/group_attention.py).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby

import torch
from torch import Tensor

from megatron_papo.config import TrainingConfig
from megatron_papo.distributed.balance import balanced
from megatron_papo.errors import UserError
from megatron_papo.model.group_attention import GroupSegments
from megatron_papo.training.rows import Grid, TrainingRollout

Part = Sequence[TrainingRollout]
"""The rollouts of one micro-batch."""
RotaryPositions = Callable[[Sequence[int], Sequence[Grid]], Tensor]
"""[s] token ids and the grids of their pictures -> [3, s] rotary positions."""


@dataclass(frozen=True)
class InputRow:
    """One row of the model's input, without padding."""

    token_ids: Tensor
    """[s]"""
    position_ids: Tensor
    """[3, s] rotary positions."""
    predicting: Tensor
    """[N]: the place in the row that predicts each response token."""


@dataclass(frozen=True)
class Arranged:
    """A micro-batch in its layout."""

    rows: list[InputRow]
    segments: GroupSegments | None
    """What attends to what, where a row holds more than one sequence."""


class Layout(ABC):
    """What depends on the layout."""

    @abstractmethod
    def plan(self, rows: Part, size: int, copies: int = 1) -> list[Part]:
        """Cut the rollouts, in order, into micro-batches.

        Args:
            rows: the rollouts of this rank.
            size: the configured number of rollouts in a micro-batch.
            copies: 2 if each rollout carries its masked-image twin.
        """

    @abstractmethod
    def split_over_ranks(self, step: Part, ranks: int) -> list[list[int]]:
        """Return where each data-parallel rank's rollouts of an optimizer step stand in it."""

    @abstractmethod
    def by_prompt(self, part: Part) -> list[list[TrainingRollout]]:
        """Return the rollouts that stand behind each prompt of the input, in reading order."""

    @abstractmethod
    def arrange(self, part: Part, rotary_positions: RotaryPositions) -> Arranged:
        """Return the rows of the model's input that these rollouts make."""

    @abstractmethod
    def row_lengths(self, part: Part) -> list[int]:
        """Return the number of tokens in each row of the model's input, without padding."""

    def lengths(self, part: Part) -> list[tuple[int, list[int]]]:
        """Return for each prompt of the input its length and those of the responses that share it."""
        return [(len(rows[0].prompt_token_ids), [row.response_length for row in rows]) for rows in self.by_prompt(part)]


class PlainLayout(Layout):
    """One row per rollout; micro-batches are slices, ranks take every so many-th rollout."""

    def plan(self, rows: Part, size: int, copies: int = 1) -> list[Part]:
        return [rows[start : start + size] for start in range(0, len(rows), size)]

    def split_over_ranks(self, step: Part, ranks: int) -> list[list[int]]:
        return [list(range(rank, len(step), ranks)) for rank in range(ranks)]

    def by_prompt(self, part: Part) -> list[list[TrainingRollout]]:
        return [[row] for row in part]

    def arrange(self, part: Part, rotary_positions: RotaryPositions) -> Arranged:
        return Arranged([sequence_of([row], rotary_positions) for row in part], None)

    def row_lengths(self, part: Part) -> list[int]:
        return [len(row.prompt_token_ids) + row.response_length for row in part]


@dataclass(frozen=True)
class GroupLayout(Layout):
    """One row for all rollouts of a micro-batch, each prompt once."""

    max_tokens: int
    """Of a micro-batch, twins included; a single rollout that is longer is a micro-batch of its own."""

    def plan(self, rows: Part, size: int, copies: int = 1) -> list[Part]:
        """As many groups, or parts of one, as max_tokens holds; size does not matter."""
        plan: list[list[TrainingRollout]] = []
        tokens = 0
        for row in rows:
            shares_prompt = bool(plan) and plan[-1][-1].rollout.group == row.rollout.group
            with_prompt = copies * (len(row.prompt_token_ids) + row.response_length)
            cost = copies * row.response_length if shares_prompt else with_prompt
            if not plan or tokens + cost > self.max_tokens:
                plan.append([])
                tokens, cost = 0, with_prompt
            plan[-1].append(row)
            tokens += cost
        return list(plan)

    def split_over_ranks(self, step: Part, ranks: int) -> list[list[int]]:
        """Whole groups, the longest first to the least loaded rank."""
        sizes = [len(rows) for rows in self.by_prompt(step)]
        starts = [0, *accumulate(sizes)]
        cost = [prompt + sum(responses) for prompt, responses in self.lengths(step)]
        return [
            [position for group in share for position in range(starts[group], starts[group + 1])]
            for share in balanced(cost, ranks)
        ]

    def by_prompt(self, part: Part) -> list[list[TrainingRollout]]:
        return [list(rows) for _, rows in groupby(part, key=lambda row: row.rollout.group)]

    def arrange(self, part: Part, rotary_positions: RotaryPositions) -> Arranged:
        sequences = [sequence_of(rows, rotary_positions) for rows in self.by_prompt(part)]
        starts = torch.tensor([0, *(len(sequence.token_ids) for sequence in sequences[:-1])]).cumsum(0).tolist()
        row = InputRow(
            torch.cat([sequence.token_ids for sequence in sequences]),
            torch.cat([sequence.position_ids for sequence in sequences], dim=1),
            torch.cat([sequence.predicting + start for sequence, start in zip(sequences, starts, strict=True)]),
        )
        return Arranged([row], GroupSegments(qkv_format="sbhd", groups=self.lengths(part)))

    def row_lengths(self, part: Part) -> list[int]:
        return [sum(prompt + sum(responses) for prompt, responses in self.lengths(part))]


def layout_of(training: TrainingConfig) -> Layout:
    """Return the configured layout."""
    if training.layout == "plain":
        return PlainLayout()
    if training.max_tokens_per_micro_batch is None:
        raise UserError("training.layout group needs training.max_tokens_per_micro_batch")
    return GroupLayout(training.max_tokens_per_micro_batch)


def sequence_of(rows: Part, rotary_positions: RotaryPositions) -> InputRow:
    """Return a prompt and its responses, one after the other.

    Every response's positions go on from the prompt's, and its first token is predicted by the prompt's last.
    """
    prompt = rows[0].prompt_token_ids
    longest = max(rows, key=lambda row: row.response_length).rollout.response_token_ids
    positions = rotary_positions(prompt + longest, rows[0].grids)
    lengths = [row.response_length for row in rows]
    token_ids = torch.tensor(prompt + [token for row in rows for token in row.rollout.response_token_ids])
    of_prompt = positions[:, : len(prompt)]
    of_responses = [positions[:, len(prompt) : len(prompt) + length] for length in lengths]
    predicting: list[int] = []
    start = len(prompt)
    for length in lengths:
        if length:
            predicting += [len(prompt) - 1, *range(start, start + length - 1)]
        start += length
    return InputRow(token_ids, torch.cat([of_prompt, *of_responses], dim=1), torch.tensor(predicting, dtype=torch.long))
