"""Rotary positions of Qwen2.5-VL: time, row and column for image tokens, one running number for text. Equal to
transformers' get_rope_index."""

from collections.abc import Sequence

import torch

MERGE = 2
"""Patches per image token along each side, in every Qwen2.5-VL."""


def mrope_position_ids(
    token_ids: torch.Tensor | Sequence[int], image_grids: Sequence[tuple[int, int, int]], image_token_id: int
) -> torch.Tensor:
    """Return the positions of one row whose image-pad tokens are expanded.

    Args:
        token_ids: [s].
        image_grids: (1, rows, columns) of the patches of each picture, in reading order.
        image_token_id: the id of the image-pad token.

    Returns a LongTensor [3, s].

    Text counts on from one past the largest position so far, in all three coordinates (arXiv 2409.12191, section 2.1).
    Raises ValueError, with both numbers, where the image tokens of the row are not those of its grids.
    """
    token_ids = torch.as_tensor(token_ids)
    length = token_ids.numel()
    is_image = token_ids == image_token_id
    expected = sum(_tokens(grid) for grid in image_grids)
    if int(is_image.sum()) != expected:
        raise ValueError(
            f"the row has {int(is_image.sum())} image tokens, its image grids {list(image_grids)} have {expected}"
        )
    positions, cursor, next_position = [], 0, 0
    starts = is_image.nonzero().flatten().tolist()
    for grid in image_grids:
        start, count = starts[0], _tokens(grid)
        if starts[:count] != list(range(start, start + count)):
            raise ValueError(f"the {count} image tokens of grid {grid} that begin at {start} are not contiguous")
        del starts[:count]
        positions.append(_text(next_position, start - cursor))
        next_position += start - cursor
        positions.append(_image(next_position, grid))
        next_position += max(grid[1], grid[2]) // MERGE
        cursor = start + count
    positions.append(_text(next_position, length - cursor))
    return torch.cat(positions, dim=1)


def _tokens(grid: tuple[int, int, int]) -> int:
    time, rows, columns = grid
    if time != 1 or rows % MERGE or columns % MERGE:
        raise ValueError(f"image grid {grid}: expected (1, even rows, even columns)")
    return rows * columns // MERGE**2


def _text(start: int, count: int) -> torch.Tensor:
    return torch.arange(start, start + count).expand(3, -1)


def _image(start: int, grid: tuple[int, int, int]) -> torch.Tensor:
    rows, columns = grid[1] // MERGE, grid[2] // MERGE
    cells = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).reshape(-1, 2).T
    return start + torch.cat([torch.zeros_like(cells[:1]), cells])
