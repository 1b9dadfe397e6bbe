"""Hypothesis examples that depend on nothing but the test and its seed."""

from hypothesis.internal.conjecture.providers import HypothesisProvider
from hypothesis.internal.constants_ast import Constants


def ignore_constants_of_modules() -> None:
    """Hypothesis also draws constants from the source of all modules imported so far, even with a fixed seed: a test
    gets other examples when run alone, in another worker, or after a change of unrelated code. No public setting."""
    HypothesisProvider._local_constants = Constants()
