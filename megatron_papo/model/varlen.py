"""Attention of many sequences of different lengths in one call of the kernel: torch.nn.attention.varlen, on a GPU in
bfloat16.

A launch costs the same however short the sequence. Sequences are given as index tables, made once per micro-batch.
Causal means that the last query of a sequence sees all of its keys (bottom-right), as in torch's causal_lower_right,
which calls the same kernel.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from megatron_papo.distributed.transfer import to_device

Groups = Sequence[tuple[int, list[int]]]
"""(prompt length, response lengths) of each group of a row, one after the other."""


def has_kernel(query: Tensor) -> bool:
    """Say whether the kernel takes these: flash attention knows no float32, and there is none for CPUs."""
    return query.is_cuda and query.dtype == torch.bfloat16


@dataclass(frozen=True)
class Table:
    """Where the sequences of a call are: the queries stand one after the other, keys and values are gathered."""

    queries: list[int]
    """Length of each sequence of queries."""
    keys: list[int]
    """Length of each sequence of keys."""
    ends_of_queries: Tensor
    """int32 [sequences + 1]: where each begins, on the device, and the end of the last."""
    ends_of_keys: Tensor
    """The same of the gathered keys."""
    gathers: Tensor | None
    """[keys]: the place in the rows of each key; None: they stand where the queries stand."""

    @classmethod
    def of(
        cls, queries: Sequence[int], keys: Sequence[int], gathers: Tensor | None, device: torch.device | str
    ) -> "Table":
        """Return the table of sequences of these lengths, in order."""
        ends = [torch.tensor([0, *accumulate(lengths)], dtype=torch.int32) for lengths in (queries, keys)]
        gathers = None if gathers is None else to_device(gathers, device)
        return cls(list(queries), list(keys), to_device(ends[0], device), to_device(ends[1], device), gathers)


def table_of_groups(groups: Groups, length: int, rows: int, device: torch.device | str) -> Table:
    """Return the table of some rows of the same groups: a prompt's queries see the prompt, a response's the prompt and
    the response. What follows the last group is a sequence of its own, which nobody looks at.

    Args:
        groups: of each row.
        length: of a row, with padding.
        rows: how many.
        device: where the table is used.
    """
    queries, keys, places = [], [], []
    for row in range(rows):
        start = row * length
        for prompt, responses in groups:
            of_prompt = torch.arange(start, start + prompt)
            queries.append(prompt)
            keys.append(prompt)
            places.append(of_prompt)
            start += prompt
            for response in filter(None, responses):
                queries.append(response)
                keys.append(prompt + response)
                places += [of_prompt, torch.arange(start, start + response)]
                start += response
        padding = (row + 1) * length - start
        if padding:
            queries.append(padding)
            keys.append(padding)
            places.append(torch.arange(start, start + padding))
    return Table.of(queries, keys, torch.cat(places), device)


def attend(query: Tensor, key: Tensor, value: Tensor, table: Table, *, is_causal: bool) -> Tensor:
    """Return the attention of all sequences by one call. [tokens, heads, d], [tokens, kv groups, d] twice -> [tokens,
    heads, d]."""
    if table.gathers is not None:
        key, value = key.index_select(0, table.gathers), value.index_select(0, table.gathers)
    out = varlen_attn(
        query,
        key,
        value,
        table.ends_of_queries,
        table.ends_of_keys,
        max(table.queries),
        max(table.keys),
        window_size=(-1, 0) if is_causal else (-1, -1),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(out, Tensor)  # a pair only where more is asked for
    return out
