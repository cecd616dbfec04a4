"""The Python of the drop-in and quantisation pages runs as printed, top to bottom."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"


@pytest.mark.parametrize("page", ["flash_mla.md", "quantized.md"])
def test_every_python_block_runs(page: str) -> None:
    if page == "quantized.md":
        pytest.importorskip("torchao", reason="torchao is not installed: pip install 'mla_ops[torchao]'")
    namespace: dict = {}
    for block in re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), flags=re.DOTALL):
        exec(block, namespace)
    assert "refusal" in namespace or "lse2" in namespace
