"""Kernels compiled without a device, and what the assembler reports of them."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")

# By architecture, what one block may opt in to.
SMEM_BYTES = {80: 166912, 90: 232448, 100: 232448, 120: 101376}
# What the kernels of the index scores have in fp32 beside inputs in bf16.
INDEX_SCORES_FP32 = ("weights_ptr", "scores_ptr", "dscores_ptr", "dk_ptr", "dw_ptr")
# What says of q and kv that they are bytes of e4m3.
SCALES = ("q_scale_ptr", "kv_scale_ptr")
INT32_POINTERS = ("indices_ptr", "topk_length_ptr", "places_ptr", "ranks_ptr", "counters_ptr", "starts_ptr")
INT32_POINTERS += ("table_ptr", "seq_lens_ptr")
FP32_POINTERS = ("lse_ptr", "dlse_ptr", "dsink_ptr", "attn_sink_ptr", "mass_ptr", "cache_scale_ptr")
FP32_POINTERS += (*SCALES, *INDEX_SCORES_FP32)


@dataclass(frozen=True)
class Compiled:
    """What the assembler reports of one kernel."""

    ptx: str
    cubin: bytes
    shared_bytes: int
    registers: int
    stack_bytes: int

    def count(self, pattern: str) -> int:
        return len(re.findall(pattern, self.ptx))

    def sass(self) -> str:
        return cuobjdump("-sass", self.cubin)


def cuobjdump(option: str, cubin: bytes) -> str:
    program = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([str(program), option, file.name], capture_output=True, text=True, check=True).stdout


def compile_kernel(
    kernel: Any, arch: int, constants: dict[str, Any], options: dict[str, int], element: str, rows: str = "fp32"
) -> Compiled:
    """Compile for `arch` as a launch would: pointers and specialised strides divisible by 16, or by STRIDE_ALIGN.

    `rows` is the element of dkv. A constant of `...` is none: a pointer that would be None by default is given then.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    names = list(kernel.arg_names)
    defaults = {param.name: param.default for param in kernel.params if param.has_default}
    constants = {name: value for name, value in {**defaults, **constants}.items() if value is not ...}

    def type_of(name: str) -> str:
        if name in constants:
            return "constexpr"
        if f"{name.removesuffix('_ptr')}_scale_ptr" in set(names) - set(constants):
            return "*u8"
        if name in ("softmax_scale",):
            return "fp32"
        if not name.endswith("_ptr"):
            return "i32"
        if name in INT32_POINTERS:
            return "*i32"
        if name == "kv_ptr" and constants.get("PAYLOAD", 0):
            return "*u8"
        if name in FP32_POINTERS or (name == "out_ptr" and constants.get("IS_SPLIT", False) and kernel.is_gluon()):
            return "*fp32"
        if name in ("dkv_ptr", "sums_ptr", "partial_ptr"):
            return f"*{rows}"
        return "*fp32" if "partial" in name else f"*{element}"

    is_aligned = constants.get("STRIDE_ALIGN", 16) == 16
    specialised = {param.name for param in kernel.params if not param.do_not_specialize}
    aligned = [n for n in names if n.endswith("_ptr") or (is_aligned and n.startswith("stride_") and n in specialised)]
    source = (GluonASTSource if kernel.is_gluon() else ASTSource)(
        fn=kernel,
        signature={name: type_of(name) for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned if name not in constants},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    usage = cuobjdump("--dump-resource-usage", compiled.asm["cubin"])
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    return Compiled(compiled.asm["ptx"], compiled.asm["cubin"], compiled.metadata.shared, registers, stack)
