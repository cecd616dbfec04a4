"""The documentation's Python runs as printed: the README's and every page's under docs/.

A page is one session: its blocks run in order and share their names. A block that opens with `>>> ` is a command and
what it prints. A block fenced as `python needs=<module>` runs where that module can be imported.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import mla_ops

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]


def run_page(page: Path) -> dict:
    namespace: dict = {}
    for module, block in re.findall(r"```python(?: needs=(\S+))?\n(.*?)```", page.read_text(), flags=re.DOTALL):
        if module:
            pytest.importorskip(module)
        if block.startswith(">>> "):
            command, _, expected = block.partition("\n")
            expression = command.removeprefix(">>> print(").removesuffix(")")
            assert str(eval(expression, namespace)) == expected.rstrip("\n")
        else:
            exec(block, namespace)
    return namespace


@pytest.mark.parametrize("page", [page for page in PAGES if page != README], ids=lambda page: page.stem)
def test_every_python_block_of_a_page_runs(page: Path) -> None:
    assert run_page(page), f"{page.name} has no Python block"


def test_readme_blocks_run_and_do_what_they_say() -> None:
    namespace = run_page(README)
    assert namespace["out"].shape == (2, 512, 28, 64)
    assert namespace["q"].grad.shape == namespace["q"].shape
    compiled = namespace["step"](namespace["q"], namespace["kv"], namespace["indices"], 64)
    assert torch.equal(
        compiled[0], torch.ops.mla.sparse_attn(*[namespace[n] for n in ("q", "kv", "indices")], 64, 0.1)[0]
    )


def test_readme_error_text_is_real() -> None:
    (shown,) = re.findall(r"InvalidInputError: (kv must have the dtype.*)", README.read_text())
    q, kv = torch.randn(4, 2, 8), torch.randn(4, 1, 8).half()
    with pytest.raises(mla_ops.InvalidInputError) as info:
        mla_ops.sparse_attn(q, kv, torch.zeros(4, 1, 2, dtype=torch.int32), d_v=4, softmax_scale=1.0)
    assert str(info.value) == shown
