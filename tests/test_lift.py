"""A lifted function equals the function on merged weights: every row of the tables, values and derivatives."""

import pytest

import jpeft
from tests.cases import ROWS
from tests.harness import adapted, all_results, assert_close, smallest_gradient

pytestmark = pytest.mark.usefixtures("x64")


# On other versions of JAX, the rows of the thorough methods tell what its programs look like.
entries = [pytest.param(row, case, marks=() if row.thorough else pytest.mark.every_method) for row, case in ROWS]


@pytest.mark.parametrize(("row", "case"), entries, ids=lambda entry: entry.name)
def test_lifted_equals_merged(case, row, monkeypatch):
    problem = case.build()
    wrapped = adapted(problem, row)
    uses = jpeft.explain(problem.function, wrapped, *problem.args).uses
    assert {use.how for use in uses} == row.expected(case)
    # A product with factors has two forms: operands made two-dimensional on CPU, and operands that keep their axes.
    both = any((use.how, use.primitive) == ("low-rank", "dot_general") for use in uses)
    *found, want = all_results(monkeypatch, problem, wrapped, ("cpu", "tpu") if both else ("cpu",), case.forward_only)
    for got in found:
        assert_close(got, want)
    still = row.dormant | row.flat.get(case.name, frozenset())
    assert case.no_gradient == (not case.forward_only and smallest_gradient(want[1], still) < 1e-6)
