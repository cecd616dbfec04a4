"""What both warp-specialised kernels must do alike on an sm90 GPU: the contract, against the oracle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hopper_kernels import WIDE, Results, check_backward, check_forward, wide_inputs

from mla_ops.testing import Inputs

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_memory", "on_hopper")]

Check = Callable[[Inputs], Results]


@pytest.fixture(params=[check_forward, check_backward], ids=["forward", "backward"])
def check(request: pytest.FixtureRequest) -> Check:
    return request.param


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("topk", [1, 63, 64, 65, 128, 129, 2048])
def test_partial_tiles(check: Check, topk: int, dtype: torch.dtype) -> None:
    check(wide_inputs(replace(WIDE, topk=topk, seq_kv=4096), dtype))


@pytest.mark.parametrize(("heads", "kv_group"), [(1, 1), (16, 1), (63, 1), (65, 1), (128, 1), (128, 2), (120, 3)])
def test_partial_head_blocks_and_groups(check: Check, heads: int, kv_group: int) -> None:
    check(wide_inputs(replace(WIDE, heads=heads, kv_group=kv_group), attn_sink=True))


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("use", ["plain", "length", "sink"])
@pytest.mark.parametrize("batch", [None, 2])
def test_optional_arguments(check: Check, batch: int | None, use: str, index_dtype: torch.dtype) -> None:
    case = replace(WIDE, batch=batch)
    check(wide_inputs(case, index_dtype=index_dtype, topk_length=use == "length", attn_sink=use == "sink"))


@pytest.mark.parametrize("bad", [-1, -(2**31), 300, 2**31 - 1, 2**40, -(2**40), 2**63 - 1], ids=str)
def test_positions_outside_are_invalid_whatever_their_bits(check: Check, bad: int) -> None:
    inputs = wide_inputs(index_dtype=torch.int64)
    inputs.indices[:, 1::2, :, ::3] = bad
    check(inputs)


def test_repeated_positions_count_with_multiplicity(check: Check) -> None:
    inputs = wide_inputs(invalid=False)
    check(replace(inputs, indices=inputs.indices[..., :5].repeat_interleave(30, -1)))


@pytest.mark.parametrize("scale", [0.0, -0.7])
def test_zero_and_negative_scale(check: Check, scale: float) -> None:
    check(replace(wide_inputs(), softmax_scale=scale))
