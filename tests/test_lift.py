"""A lifted function equals the function on merged weights: every row of the tables, values and derivatives."""

import jax
import pytest

import jpeft
from tests.cases import CASES, METHODS
from tests.harness import adapted, all_results, assert_close, smallest_gradient

pytestmark = pytest.mark.usefixtures("x64")


@pytest.mark.parametrize("row", METHODS, ids=lambda row: row.name)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_lifted_equals_merged(case, row, monkeypatch):
    problem = case.build()
    wrapped = adapted(problem, row)
    # A product with factors has two forms: operands made two-dimensional on CPU, and operands that keep their axes.
    platforms = ("cpu", "tpu") if row.factors else ("cpu",)
    *found, want = all_results(monkeypatch, problem, wrapped, platforms, case.forward_only)
    for got in found:
        assert_close(got, want)
    assert case.no_gradient == (not case.forward_only and smallest_gradient(want[1]) < 1e-6)
    assert {use.how for use in jpeft.explain(problem.function, wrapped, *problem.args).uses} == row.expected(case)
