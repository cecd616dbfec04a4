"""Cases, inputs and closeness checks shared by the test suite and by users who test their own integrations.

The library itself never imports this package.
"""

from mla_ops.testing.cases import CONTRACT_CASES, Case
from mla_ops.testing.closeness import assert_bf16_bars, assert_within_budget
from mla_ops.testing.index_inputs import IndexCase, IndexInputs, make_index_inputs
from mla_ops.testing.inputs import Inputs, make_inputs
from mla_ops.testing.loss_inputs import LossInputs, make_loss_inputs
from mla_ops.testing.oracle import assert_matches_oracle, run_reference

__all__ = [
    "CONTRACT_CASES",
    "Case",
    "IndexCase",
    "IndexInputs",
    "Inputs",
    "LossInputs",
    "assert_bf16_bars",
    "assert_matches_oracle",
    "assert_within_budget",
    "make_index_inputs",
    "make_inputs",
    "make_loss_inputs",
    "run_reference",
]
