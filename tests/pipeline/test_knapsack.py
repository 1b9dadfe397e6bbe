"""The multiple-choice knapsack, compared with all combinations."""

import itertools
import math
import random
import time

from hypothesis import given
from hypothesis import strategies as st

from vlqc.pipeline.knapsack import PRECISION, Option, choose_options

numbers = st.one_of(st.just(0.0), st.floats(1e-9, 1e9), st.integers(0, 9).map(float))
options = st.builds(Option, numbers, numbers, st.integers(0, 3))
problems = st.lists(st.lists(options, min_size=1, max_size=5), min_size=1, max_size=5)


def value(items: list[list[Option]], chosen: tuple[int, ...] | list[int]) -> float:
    return math.fsum(of[index].value for of, index in zip(items, chosen, strict=True))


def weight(items: list[list[Option]], chosen: tuple[int, ...] | list[int]) -> float:
    return math.fsum(of[index].weight for of, index in zip(items, chosen, strict=True))


@given(problems, st.data())
def test_within_the_limit_and_close_to_the_optimum(items: list[list[Option]], data: st.DataObject) -> None:
    """Catches a choice beyond the limit, one that is missed, and a value above the bound, for any magnitudes."""
    every = list(itertools.product(*(range(len(of)) for of in items)))
    limit = data.draw(st.one_of(numbers, st.sampled_from([weight(items, chosen) for chosen in every])))
    feasible = [value(items, chosen) for chosen in every if weight(items, chosen) <= limit]
    chosen = choose_options(items, limit)
    if chosen is None:
        assert not feasible
        return
    assert weight(items, chosen) <= limit
    assert value(items, chosen) <= (1 + PRECISION) * min(feasible) * (1 + 1e-9)


def test_hundreds_of_items_take_no_time() -> None:
    """Catches a search whose time or memory depends on the magnitude of bytes and noise, and a result far from the
    bound of the relaxed problem."""
    generator = random.Random(0)
    sizes = [generator.choice([1e6, 4e7, 7e7]) for _ in range(400)]
    items = [
        [Option(10 ** generator.uniform(-8, -3) * noise, size * part) for noise, part in ((1, 1), (9, 0.5), (99, 0.3))]
        for size in sizes
    ]
    started = time.perf_counter()
    for share in (0.3001, 0.35, 0.5, 0.9, 0.9999):
        chosen = choose_options(items, share * sum(sizes))
        assert chosen is not None and weight(items, chosen) <= share * sum(sizes)
    assert time.perf_counter() - started < 10


def test_what_is_preferred_wins_a_tie() -> None:
    """Catches options of equal value that are chosen by their order, and a heavier one where the limit forbids it."""
    items = [[Option(1.0, 5.0, rank=1), Option(1.0, 7.0, rank=0), Option(9.0, 1.0)]]
    assert choose_options(items, 10.0) == [1]
    assert choose_options(items, 6.0) == [0]
    assert choose_options(items, 0.5) is None
