"""The paged kernel, compiled without a device: shared memory, spills, and how rows are copied and converted."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest
import torch
from offline_compiler import SMEM_BYTES, Compiled
from test_index_topk_offline import compile_launch

from mla_ops.device import DeviceTraits
from mla_ops.ops.sparse_attn.configs.launch import ConfigKey, FwdConfig, fwd_smem_bytes, launch_options
from mla_ops.ops.sparse_attn.configs.lookup import forward_config
from mla_ops.ops.sparse_attn_paged.call import SparseAttnPagedCall, SparseAttnPagedProblem
from mla_ops.ops.sparse_attn_paged.configs.tables import quantised_smem_bytes
from mla_ops.ops.sparse_attn_paged.triton.kernel_sets import PORTABLE
from mla_ops.ops.sparse_attn_paged.triton.portable import PortablePlan, arguments_of, key_of
from mla_ops.row_formats import row_format

triton = pytest.importorskip("triton", reason="triton is not installed")
pytestmark = pytest.mark.skipif(
    triton.knobs.runtime.interpret, reason="kernels defined under TRITON_INTERPRET=1 can't be compiled"
)

# Stack bytes that a kernel may use: what was seen, rounded up.
ALLOWED_STACK: dict[tuple[int, str, int], int] = {}


def make_call(name: str, d_total: int, d_v: int, heads: int, *, has_table: bool = False) -> SparseAttnPagedCall:
    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    dtype = torch.bfloat16 if name == "dense" else torch.uint8
    width = d_total if name == "dense" else row_format(name).layout(d_total, d_v).row_bytes
    return SparseAttnPagedCall(
        *(empty(4, 1, heads, d_total, dtype=torch.bfloat16), empty(8, 64, 1, width, dtype=dtype)),
        *(empty(4, 1, 1, 2048), d_v, 0.1, name, empty(4, 8) if has_table else None),
    )


def compile_call(
    call: SparseAttnPagedCall, arch: int, config: FwdConfig | None = None, **options: Any
) -> tuple[Compiled, PortablePlan]:
    from mla_ops.ops.sparse_attn_paged.kernels.forward import _sparse_attn_paged_fwd_kernel as kernel

    traits = DeviceTraits(type="cuda", arch=arch, smem_bytes=SMEM_BYTES[arch], num_sms=132)
    plan = PORTABLE.plan(call, traits, config=config, **options)
    out = torch.empty(1, dtype=torch.float32 if plan.grid[1] > 1 else torch.bfloat16, device="meta")
    lse = torch.empty(1, device="meta")
    if plan.resolve is not None:
        call = plan.resolve.as_resolved(call)
    arguments = dict(zip(kernel.arg_names, arguments_of(call, plan, out, lse), strict=True))
    compiled = compile_launch(kernel, arch, {**arguments, **launch_options(plan.config)})
    key = key_of(SparseAttnPagedProblem.of(call), traits)
    if call.row_format != "dense":
        assert compiled.shared_bytes <= quantised_smem_bytes(plan.config, call.row_format, key) <= SMEM_BYTES[arch]
    return compiled, plan


@pytest.mark.parametrize(
    ("arch", "name", "d_total", "d_v", "heads"),
    [
        (80, "fp8", 576, 512, 16),
        (90, "fp8", 576, 512, 16),
        (90, "fp8_all", 128, 64, 28),
        (100, "fp8", 576, 512, 64),
        (120, "fp8", 576, 512, 16),
        pytest.param(90, "model1", 512, 512, 16, marks=pytest.mark.slow),
        pytest.param(90, "fp8_cache", 576, 512, 16, marks=pytest.mark.slow),
        pytest.param(80, "fp8_all", 128, 64, 28, marks=pytest.mark.slow),
        pytest.param(120, "fp8", 128, 64, 28, marks=pytest.mark.slow),
    ],
)
def test_rows_are_copied_16_bytes_at_a_time_and_converted_once(
    arch: int, name: str, d_total: int, d_v: int, heads: int
) -> None:
    compiled, plan = compile_call(make_call(name, d_total, d_v, heads, has_table=True), arch)
    assert compiled.stack_bytes <= ALLOWED_STACK.get((arch, name, heads), 0)
    copies = Counter(re.findall(r"cp\.async\.c[ag]\.shared\.global [^;]*?, 0x([0-9a-f]+)", compiled.ptx))
    # A block is copied in front of the loop once for each stage but one, and in the loop.
    layout = row_format(name).layout(d_total, d_v)
    block_bytes = plan.config.block_k * (layout.d_payload + 2 * layout.d_tail16)
    copied = copies["10"] * 16 * 32 * plan.config.num_warps
    assert copied >= plan.config.num_stages * block_bytes
    sass = compiled.sass()
    # A tile read byte by byte takes a load a value; a few bytes of predicates may pass through shared memory.
    assert len(re.findall(r"LD[SG]\.(?:E\.)?[US]8", sass)) <= 8
    if arch > 80:
        values = plan.config.block_k * layout.d_payload
        # An instruction converts two values of a thread. Converted once for each product they would be twice as many.
        assert sass.count("UNPACK_B") == values // (64 * plan.config.num_warps)


def test_wide_blocks_of_heads_are_multiplied_asynchronously_on_hopper() -> None:
    compiled, plan = compile_call(make_call("fp8", 576, 512, 64), 90)
    assert plan.multiplies.startswith("rows are multiplied by their scales in fp32 and rounded")
    assert compiled.count(r"wgmma\.mma_async") > 0
    assert compiled.stack_bytes == 0


def test_dense_pages_take_what_dense_rows_take() -> None:
    compiled, plan = compile_call(make_call("dense", 128, 64, 32, has_table=True), 90)
    key = ConfigKey(90, SMEM_BYTES[90], 32, 128, 64, 2)
    assert plan.config == forward_config(key)
    assert compiled.shared_bytes <= fwd_smem_bytes(plan.config, key)
    assert compiled.stack_bytes <= 64
