"""Kernels of `mla::index_topk`, compiled without a device: shared memory, spills, and the instructions intended."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from offline_compiler import SMEM_BYTES, Compiled, cuobjdump

from mla_ops.device import DeviceTraits
from mla_ops.ops.index_topk.call import IndexTopkCall, IndexTopkProblem
from mla_ops.ops.index_topk.configs.launch import ConfigKey, smem_bytes
from mla_ops.ops.index_topk.triton.launch import plan_topk

triton = pytest.importorskip("triton", reason="triton is not installed")
pytestmark = pytest.mark.skipif(
    triton.knobs.runtime.interpret, reason="kernels defined under TRITON_INTERPRET=1 can't be compiled"
)

ELEMENTS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float8_e4m3fn: "fp8e4nv"}
TYPES = {**ELEMENTS, torch.uint8: "u8", torch.int32: "i32", torch.int64: "i64"}
# Stack bytes that a kernel may use: what was seen, rounded up. With 128 registers a thread two programs share an SM.
# What the streamed selection spills then belongs to a full buffer, and in the split selection to the row read again,
# both of which few rows see. The others spill a value of the prologue.
ALLOWED_STACK = {
    "_select_stream_kernel": 240,
    "_select_splits_kernel": 96,
    "_select_kernel": 8,
    "_score_passing_heads_kernel": 16,
}


def traits(arch: int) -> DeviceTraits:
    return DeviceTraits(type="cuda", arch=arch, smem_bytes=SMEM_BYTES[arch], num_sms=132)


def compile_launch(kernel: Any, arch: int, arguments: dict[str, Any]) -> Compiled:
    """Compile what a launch with these arguments compiles: tensors and integers are specialised as Triton does."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    options = {name: value for name, value in arguments.items() if name not in kernel.arg_names}
    for place, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        is_specialised = not parameter.do_not_specialize
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = f"*{TYPES[value.dtype]}"
            attributes[(place,)] = [["tt.divisibility", 16]]
        elif parameter.is_constexpr or value is None or (is_specialised and value == 1):
            signature[parameter.name] = "constexpr"
            constants[(place,)] = value
        else:
            signature[parameter.name] = "i64" if abs(value) >= 2**31 else "i32"
            if is_specialised and value % 16 == 0:
                attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    usage = cuobjdump("--dump-resource-usage", compiled.asm["cubin"])
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    return Compiled(compiled.asm["ptx"], compiled.asm["cubin"], compiled.metadata.shared, registers, stack)


def compile_call(call: IndexTopkCall, arch: int, **chosen: Any) -> dict[str, Compiled]:
    """Compile every kernel that a call launches, by its name."""
    compiled: dict[str, Compiled] = {}

    class Compile:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: Any) -> Any:
            def launch(*args: Any, **options: Any) -> None:
                name = self.kernel.fn.__name__
                if name not in compiled:
                    arguments = dict(zip(self.kernel.arg_names, args, strict=False)) | options
                    compiled[name] = compile_launch(self.kernel, arch, arguments)

            return launch

    problem = IndexTopkProblem.of(call)
    plan = plan_topk(call, problem, traits(arch), **chosen)
    assert plan.strips
    call = call._replace(weights=call.weights.mT.contiguous()) if plan.scores.copies_weights else call
    from mla_ops.ops.index_topk.triton import launch

    scratch = torch.empty(plan.scratch_words, dtype=torch.int32, device="meta")
    indices = torch.empty(plan.out_shape, dtype=torch.int32, device="meta")
    for strip in plan.strips[:1]:
        launch.run_scores(call, strip, scratch, plan.row_stride, plan.scores, Compile)
        launch.run_selection(call, strip, scratch, plan.row_stride, indices, plan.selection, Compile)
    key = ConfigKey(arch, SMEM_BYTES[arch], problem.heads_per_group, problem.index_head_dim, problem.dtype.itemsize)
    (scores,) = (kernel for name, kernel in compiled.items() if name.startswith("_score"))
    assert scores.shared_bytes <= smem_bytes(plan.scores.config, key)
    return compiled


def make_call(
    batch: int, seq_q: int, seq_kv: int, heads: int, head_dim: int, topk: int, dtype: torch.dtype = torch.bfloat16,
    **options: Any,
) -> IndexTopkCall:  # fmt: skip
    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    if dtype == torch.float8_e4m3fn:
        options["k_scale"] = empty(batch, seq_kv, 1, dtype=torch.float32)
    weights = empty(batch, seq_q, heads, dtype=torch.float32)
    return IndexTopkCall(
        empty(batch, seq_q, heads, head_dim), empty(batch, seq_kv, 1, head_dim), weights, topk, **options
    )


CALLS = {
    "4x64 4096": make_call(1, 4096, 4096, 4, 64, 256),
    "64x128 4096": make_call(1, 4096, 4096, 64, 128, 2048),
    "64x128 32768": make_call(1, 4096, 32768, 64, 128, 2048),
    "64x128 e4m3": make_call(1, 4096, 32768, 64, 128, 2048, torch.float8_e4m3fn),
    "decode": make_call(8, 1, 131072, 64, 128, 2048),
}


# Every call on the architecture that is measured, and one of few and of many heads on each of the others.
CASES = [(90, name) for name in CALLS] + [(80, "4x64 4096"), (100, "64x128 e4m3"), (120, "decode")]


@pytest.mark.parametrize(("arch", "name"), CASES)
def test_kernels_fit_and_do_not_spill(arch: int, name: str) -> None:
    call = CALLS[name]
    for kernel, compiled in compile_call(call, arch).items():
        assert compiled.shared_bytes <= SMEM_BYTES[arch], kernel
        assert compiled.stack_bytes <= ALLOWED_STACK.get(kernel, 0), (kernel, compiled.stack_bytes)
        if arch == 90 and kernel in ("_select_kernel", "_score_passing_heads_kernel"):
            # The cap that lets three programs of e4m3 products share an SM costs them one value of the prologue.
            assert compiled.stack_bytes == (8 if "e4m3" in name else 0), kernel
