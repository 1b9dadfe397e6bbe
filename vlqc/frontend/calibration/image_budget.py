"""How many image tokens each picture of a sample may become, and the shape of a picture of so many tokens."""

import math
from collections.abc import Sequence

MOST_ELONGATED = 200  # the ratio of sides beyond which Qwen2.5-VL's preparation refuses a picture


def share_budget(tokens: Sequence[int], budget: int, least: int) -> list[int] | None:
    """Tokens of every picture at its full size, tokens for all of them together -> tokens for each of them.

    All pictures get the same limit, the highest with which they fit; those that stay below it keep their size. None:
    the limit would be less than `least`, of which no picture can have fewer.
    """
    if budget < 0:
        return None
    if sum(tokens) <= budget:
        return list(tokens)
    limit, left = 0, budget
    for taken, count in enumerate(sorted(tokens)):
        limit = left // (len(tokens) - taken)  # if all that are left share alike
        if count > limit:
            break
        left -= count
    return [min(count, limit) for count in tokens] if limit >= least else None


def grid_within(height_to_width: float, least: int, most: int) -> tuple[int, int]:
    """Ratio of a picture's sides -> (rows, columns) of image tokens with least <= rows * columns <= most.

    Of all such grids the one that loses least: a distortion counts twice as much as tokens left unused. ValueError if
    least > most.
    """
    best, lowest = (0, 0), math.inf
    for rows in range(1, most + 1):
        undistorted = rows / height_to_width
        for columns in {min(max(1, each), most // rows) for each in (int(undistorted), int(undistorted) + 1, most)}:
            loss = 2 * abs(math.log(undistorted / columns)) + math.log(most / (rows * columns))
            elongated = max(rows, columns) > MOST_ELONGATED * min(rows, columns)
            if rows * columns >= least and not elongated and loss < lowest:
                best, lowest = (rows, columns), loss
    if best == (0, 0):
        raise ValueError(f"no grid has between {least} and {most} tokens")
    return best
