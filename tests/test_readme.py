"""The README's Python runs as printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import mla_ops

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_every_python_block_runs() -> None:
    namespace: dict = {}
    for block in BLOCKS:
        if block.startswith(">>> "):
            command, _, expected = block.partition("\n")
            expression = command.removeprefix(">>> print(").removesuffix(")")
            assert str(eval(expression, namespace)) == expected.rstrip("\n")
        else:
            exec(block, namespace)
    assert namespace["out"].shape == (2, 512, 28, 64)
    assert namespace["q"].grad.shape == namespace["q"].shape
    compiled = namespace["step"](namespace["q"], namespace["kv"], namespace["indices"], 64)
    assert torch.equal(
        compiled[0], torch.ops.mla.sparse_attn(*[namespace[n] for n in ("q", "kv", "indices")], 64, 0.1)[0]
    )


def test_error_text_is_real() -> None:
    (shown,) = re.findall(r"InvalidInputError: (kv must have the dtype.*)", README)
    q, kv = torch.randn(4, 2, 8), torch.randn(4, 1, 8).half()
    with pytest.raises(mla_ops.InvalidInputError) as info:
        mla_ops.sparse_attn(q, kv, torch.zeros(4, 1, 2, dtype=torch.int32), d_v=4, softmax_scale=1.0)
    assert str(info.value) == shown
