"""Distributes a token budget over the images of a sample, and chooses image shapes that fit it."""

import math
from collections.abc import Sequence


def split_budget(tokens: Sequence[int], budget: int, min_tokens: int) -> list[int] | None:
    """Limits the image tokens of each image so that all images together fit a budget.

    Every image has the same limit, the highest for which they fit; images below it keep their size.

    Args:
        tokens: image tokens of every image at its full size.
        budget: image tokens of all images together.
        min_tokens: the smallest number of image tokens of an image.

    Returns:
        Image tokens of every image; None if the limit would be below `min_tokens`.
    """
    if budget < 0:
        return None
    if sum(tokens) <= budget:
        return list(tokens)
    limit, left = 0, budget
    for index, count in enumerate(sorted(tokens)):
        limit = left // (len(tokens) - index)  # if all remaining images have equal parts
        if count > limit:
            break
        left -= count
    return [min(count, limit) for count in tokens] if limit >= min_tokens else None


def fit_grid(height_to_width: float, min_tokens: int, max_tokens: int, max_aspect_ratio: float) -> tuple[int, int]:
    """Shape of an image in image tokens, (rows, columns) with min_tokens <= rows * columns <= max_tokens.

    Minimizes distortion and unused tokens; distortion counts twice. No side is more than max_aspect_ratio times as long
    as the other. Raises ValueError if no shape fits.
    """
    best, lowest = (0, 0), math.inf
    for rows in range(1, max_tokens + 1):
        undistorted = rows / height_to_width
        for columns in {
            min(max(1, each), max_tokens // rows) for each in (int(undistorted), int(undistorted) + 1, max_tokens)
        }:
            loss = 2 * abs(math.log(undistorted / columns)) + math.log(max_tokens / (rows * columns))
            elongated = max(rows, columns) > max_aspect_ratio * min(rows, columns)
            if rows * columns >= min_tokens and not elongated and loss < lowest:
                best, lowest = (rows, columns), loss
    if best == (0, 0):
        raise ValueError(f"no grid has between {min_tokens} and {max_tokens} tokens")
    return best
