"""A transformers model whose layers lie on two devices, neither of which need be the current one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from tiny_transformers import FORMS, assert_all_close, attention_layer, make_model, run_padded, spread

from mla_ops.adapters import transformers as adapter

# On the CPU only the helpers are tried.
DEVICES = [
    pytest.param("cpu", "cpu", id="cpu"),
    pytest.param("cuda:0", "cuda:1", id="cuda", marks=[pytest.mark.gpu, pytest.mark.gpu2]),
    pytest.param("cuda:1", "cuda:0", id="cuda-current-last", marks=[pytest.mark.gpu, pytest.mark.gpu2]),
]


@pytest.mark.parametrize(("first", "second"), DEVICES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["DeepseekV32", "HYV4"])
def test_layers_on_two_devices_equal_eager_attention_on_one(name: str, form: Any, first: str, second: str) -> None:
    model = make_model(name)
    model.set_experts_implementation("eager")  # grouped matrix products on CUDA are bf16's
    expected = run_padded(copy.deepcopy(model).to(first), first)
    spread(model, first, second)
    assert str(attention_layer(model, 1).kv_b_proj.weight.device) == second
    with adapter.attach(model, form=form, backend="auto" if first == "cpu" else "triton"):
        got = run_padded(model, first)
    assert_all_close({n: tensor.to(first) for n, tensor in got.items()}, expected)
