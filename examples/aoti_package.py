"""Package a sparse-MLA layer with AOTInductor and run it where neither mla_ops nor Python kernels exist.

    python examples/aoti_package.py [--out DIR]      needs a CUDA device and a C++ compiler (CXX, else g++)

Exports a layer with dynamic batch and sequence lengths, packages it, then starts a process that loads the package
without importing mla_ops, runs it at sizes it was not exported with, and compares with eager. The package holds the
kernel as machine code for this GPU's architecture; widths, heads and the scale are constants of it. Lengths start at 2:
decoding one token at a time needs a package of its own, exported with a static length. A program that comes from
`torch.export.load` is not traced here any more: call `mla_ops.lowering.enable()` before packaging it.

`--control` packages the same layer with the operator left out: what it says about a toolchain is not about mla_ops.
So it was found that with torch 2.11's CUDA wheels on x86-64 any package, the control too, crashes while it is loaded:
torch's libraries hold parts of libstdc++, and the regular expression with which a package reads its device's name meets
locale facets of two copies. Loaded before torch, the system's libstdc++ is the only one: see `LD_PRELOAD` below.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim

HEADS, D_TOTAL, D_V, TOPK = 16, 128, 64, 32
SIZES = [(2, 64, 128), (3, 40, 200)]  # batch, seq_q, seq_kv; exported with the first

# What runs in the other process.
RUN = """
import sys, torch
from pathlib import Path
folder = Path(sys.argv[1])
layer = torch._inductor.aoti_load_package(str(folder / "layer.pt2"))
for inputs, expected in torch.load(folder / "cases.pt"):
    error = ((layer(*inputs).float() - expected.float()).norm() / expected.float().norm()).item()
    assert error < 1e-2, error  # bf16 has 0.4 %
    print(f"matches eager at x {list(inputs[0].shape)}, kv {list(inputs[1].shape)}: relative error {error:.1e}")
assert not any(name.split(".")[0] == "mla_ops" for name in sys.modules)
"""


class Layer(nn.Module):
    """Projections around the operator."""

    def __init__(self, *, is_control: bool) -> None:
        super().__init__()
        self.is_control = is_control
        self.q_proj = nn.Linear(256, HEADS * D_TOTAL, bias=False)
        self.out_proj = nn.Linear(HEADS * D_V, 256, bias=False)

    def forward(self, x: Tensor, kv: Tensor, indices: Tensor) -> Tensor:
        """Map `x` `[B, Sq, 256]` to `[B, Sq, 256]`; kv `[B, Skv, 1, 128]`, indices `[B, Sq, 1, topk]`."""
        q = self.q_proj(x).unflatten(-1, (HEADS, D_TOTAL))
        if self.is_control:
            rows = indices.clamp(min=0).sum(dim=(2, 3)) % kv.shape[1]  # every input is used
            out = q[..., :D_V] * kv[:, :, :, :D_V].mean(dim=1, keepdim=True) + rows[..., None, None]
        else:
            out, _ = torch.ops.mla.sparse_attn(q, kv, indices, D_V, 96**-0.5)
        return self.out_proj(out.flatten(2))


def draw(batch: int, seq_q: int, seq_kv: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return random inputs; a tenth of the slots names no key."""
    x = torch.randn(batch, seq_q, 256, device=device, dtype=torch.bfloat16)
    kv = torch.randn(batch, seq_kv, 1, D_TOTAL, device=device, dtype=torch.bfloat16)
    indices = torch.randint(-seq_kv // 9, seq_kv, (batch, seq_q, 1, TOPK), device=device, dtype=torch.int32)
    return x, kv, indices


def main() -> int:
    """Export, package, load elsewhere, compare; returns the exit status of the other process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "mla-ops-aoti")
    parser.add_argument("--control", action="store_true", help="leave the operator out")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not options.control:
        import mla_ops  # noqa: F401  (registers torch.ops.mla)

        if device.type == "cpu":
            parser.error("no CUDA device: on the CPU the operator is Python and can't be packaged")

    torch.manual_seed(0)
    options.out.mkdir(parents=True, exist_ok=True)
    layer = Layer(is_control=options.control).to(device, torch.bfloat16).eval()
    with torch.no_grad():
        cases = [(inputs, layer(*inputs)) for inputs in (draw(*sizes, device) for sizes in SIZES)]
        batch, seq_q, seq_kv = Dim("batch", min=2), Dim("seq_q", min=2), Dim("seq_kv", min=2, max=2**20)
        shapes = {"x": {0: batch, 1: seq_q}, "kv": {0: batch, 1: seq_kv}, "indices": {0: batch, 1: seq_q}}
        exported = torch.export.export(layer, cases[0][0], dynamic_shapes=shapes)
        torch._inductor.aoti_compile_and_package(exported, package_path=str(options.out / "layer.pt2"))
    torch.save(cases, options.out / "cases.pt")
    print(f"packaged {options.out / 'layer.pt2'}", flush=True)

    # -P: the folder this is called from, perhaps a checkout, is not on the path.
    command = [sys.executable, "-P", "-c", RUN, str(options.out)]
    return subprocess.run(command, env={**os.environ, "LD_PRELOAD": libstdcxx()}, check=False).returncode


def libstdcxx() -> str:
    """Return the path of the C++ compiler's own libstdc++."""
    command = [os.environ.get("CXX", "g++"), "-print-file-name=libstdc++.so.6"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
