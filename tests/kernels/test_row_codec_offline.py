"""The writer and the reader of quantised rows, compiled without a device: spills, and how bytes are moved and made."""

from __future__ import annotations

import pytest
import torch
from offline_compiler import SMEM_BYTES, Compiled
from test_index_topk_offline import compile_launch

from mla_ops.device import DeviceTraits
from mla_ops.ops.append_rows.call import AppendRowsCall, AppendRowsProblem
from mla_ops.ops.append_rows.triton import launch as append
from mla_ops.ops.read_rows.call import ReadRowsCall, ReadRowsProblem
from mla_ops.ops.read_rows.triton import launch as read
from mla_ops.row_formats import row_format

triton = pytest.importorskip("triton", reason="triton is not installed")
pytestmark = pytest.mark.skipif(
    triton.knobs.runtime.interpret, reason="kernels defined under TRITON_INTERPRET=1 can't be compiled"
)


def traits_of(arch: int) -> DeviceTraits:
    return DeviceTraits(type="cuda", arch=arch, smem_bytes=SMEM_BYTES[arch], num_sms=132)


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def make_pages(name: str, d_total: int, d_v: int) -> torch.Tensor:
    if name == "dense":
        return empty(8, 64, 1, d_total)
    layout = row_format(name).layout(d_total, d_v)
    pool = empty(8, layout.page_bytes(64), dtype=torch.uint8)
    return pool[:, : 64 * layout.row_bytes].unflatten(1, (64, 1, layout.row_bytes))


def scale_of(name: str) -> torch.Tensor | None:
    return empty(1, dtype=torch.float32) if name == "fp8_cache" else None


def compile_append(
    arch: int, name: str, d_total: int = 576, d_v: int = 512, rule: str = "pow2", *, rows: int = 128
) -> Compiled:
    from mla_ops.ops.append_rows.kernels.append import _append_rows_kernel as kernel

    latent, tail = empty(rows, 1, d_v), empty(rows, 1, d_total - d_v) if d_total > d_v else None
    numbers = empty(rows, dtype=torch.int32)
    call = AppendRowsCall(latent, tail, numbers, make_pages(name, d_total, d_v), d_v, name, rule, scale_of(name))
    plan = append.plan_append(call, AppendRowsProblem.of(call), traits_of(arch))
    owners = empty(512, dtype=torch.int32) if plan.is_claimed else None
    arguments = dict(zip(kernel.arg_names, append.arguments_of(call, plan, owners), strict=True))
    return compile_launch(kernel, arch, {**arguments, **plan.options})


def compile_read(arch: int, name: str, d_total: int = 576, d_v: int = 512) -> Compiled:
    from mla_ops.ops.read_rows.kernels.read import _read_rows_kernel as kernel

    rows = empty(128, dtype=torch.int32)
    call = ReadRowsCall(make_pages(name, d_total, d_v), rows, d_total, d_v, name, torch.bfloat16, scale_of(name))
    plan = read.plan_read(call, ReadRowsProblem.of(call), traits_of(arch))
    out = empty(*plan.shape)
    arguments = dict(zip(kernel.arg_names, read.arguments_of(call, plan, out), strict=True))
    return compile_launch(kernel, arch, {**arguments, "num_warps": plan.config.num_warps})


# Every architecture has every format between both widths and rules.
LAUNCHES = [
    (80, "fp8", 576, 512, "pow2"), (80, "fp8_all", 128, 64, "amax"), (80, "mxfp8", 512, 512, "pow2"),
    (90, "fp8", 576, 512, "amax"), (90, "fp8_cache", 576, 512, "pow2"), (90, "model1", 512, 512, "pow2"),
    (90, "dense", 576, 512, "pow2"), (100, "fp8_all", 576, 512, "pow2"), (120, "fp8", 128, 64, "amax"),
    pytest.param(80, "fp8_cache", 576, 512, "pow2", marks=pytest.mark.slow),
    pytest.param(80, "model1", 512, 512, "pow2", marks=pytest.mark.slow),
    pytest.param(100, "mxfp8", 576, 512, "pow2", marks=pytest.mark.slow),
    pytest.param(100, "model1", 512, 512, "pow2", marks=pytest.mark.slow),
    pytest.param(120, "mxfp8", 576, 512, "pow2", marks=pytest.mark.slow),
    pytest.param(120, "fp8_cache", 128, 64, "pow2", marks=pytest.mark.slow),
]  # fmt: skip


@pytest.mark.parametrize(("arch", "name", "d_total", "d_v", "rule"), LAUNCHES)
def test_writer_and_reader_do_not_spill(arch: int, name: str, d_total: int, d_v: int, rule: str) -> None:
    for compiled in (compile_append(arch, name, d_total, d_v, rule), compile_read(arch, name, d_total, d_v)):
        assert compiled.stack_bytes == 0
        assert compiled.registers <= 96
        # A constant below the smallest normal fp32 would make the compiler count in fp64.
        assert compiled.count(r"\.f64") == 0
        assert (compiled.count(r"e4m3x2") > 0) == (arch > 80 and name != "dense")


def test_quotients_are_those_of_ieee_division() -> None:
    # Other divisions are off in the last bit, which decides ties; a power of two needs no division but that by 448.
    counts = [compile_append(90, "fp8", rule=rule).count(r"div\.rn\.f32") for rule in ("pow2", "amax")]
    assert counts[0] < counts[1]
    assert compile_append(90, "fp8", rule="amax").count(r"div\.(?:full|approx)") == 0


@pytest.mark.parametrize("arch", [80, 90])
def test_thousands_of_rows_are_stored_16_bytes_at_a_time(arch: int) -> None:
    compiled = compile_append(arch, "fp8", rows=8192)
    assert compiled.stack_bytes == 0
    assert compiled.count(r"st\.global\.v4\.b32") > 0
    # Before it knows the owners of rows the writer waits for the kernel that claims them, where it starts with it.
    assert compiled.count(r"griddepcontrol\.wait") == (1 if arch == 90 else 0)
