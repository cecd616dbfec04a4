"""The warp-specialised forward for few heads, compiled without a device, and what its launcher decides."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from offline_compiler import SMEM_BYTES, Compiled, compile_kernel

from mla_ops.device import DeviceTraits
from mla_ops.ops.sparse_attn.call import Hints, SparseAttnProblem
from mla_ops.ops.sparse_attn.configs.launch import ConfigKey, few_heads_smem_bytes
from mla_ops.ops.sparse_attn.configs.lookup import few_heads_config
from mla_ops.ops.sparse_attn.triton.hopper_few_heads import (
    HopperFewHeadsKernels,
    gather_registers,
    plan_items,
    split_count,
)
from mla_ops.row_formats import row_format

triton = pytest.importorskip("triton", reason="triton is not installed")
pytestmark = pytest.mark.skipif(
    triton.knobs.runtime.interpret, reason="kernels defined under TRITON_INTERPRET=1 can't be compiled"
)

H100 = DeviceTraits(type="cuda", arch=90, smem_bytes=232448, num_sms=132, l2_bytes=50 << 20)
FORMATS = ["dense", "fp8", "fp8_all", "fp8_cache"]
WIDTHS = [(d_v + tail, d_v) for d_v in (256, 320, 384, 448, 512) for tail in (0, 64)]
EVERY_RUN = [("dense", 576, 512, 16), ("dense", 576, 512, 32), ("fp8", 576, 512, 16), ("fp8_all", 320, 256, 16)]


def key_of(d_total: int, d_v: int, heads: int) -> ConfigKey:
    return ConfigKey(90, SMEM_BYTES[90], heads, d_total, d_v, 2)


@cache
def compile_few(name: str, d_total: int, d_v: int, heads: int, **constants: Any) -> Compiled:
    from mla_ops.ops.sparse_attn.kernels.hopper_few_heads import _sparse_attn_fwd_few_heads_kernel

    form = row_format(name)
    layout, has_scales = form.layout(d_total, d_v), form.scales_at == "row"
    config = few_heads_config(key_of(d_total, d_v, heads), has_scales=has_scales)
    constants = {
        "HEADS": heads, "KV_GROUP": 1, "D_TOTAL": d_total, "D_V": d_v, "VALUE": config.value, "TAIL": config.tail,
        "BLOCK_H": config.block_h, "STAGES": config.stages, "Q_BUFFERS": config.q_buffers,
        "GATHER_REGISTERS": gather_registers(config, is_converting=layout.d_payload > 0),
        "IS_PAGED": name != "dense", "IS_NEGATIVE_SCALE": False, "D_PAYLOAD": layout.d_payload,
        "D_TAIL": layout.d_tail16 if layout.d_payload else 0, "NUM_SCALES": layout.num_scales if has_scales else 0,
        "SCALE_OFFSET": layout.scale_offset, "TAIL_OFFSET": layout.tail_offset, "table_ptr": None,
        "seq_lens_ptr": None, "topk_length_ptr": None, "attn_sink_ptr": None,
        **({} if name == "fp8_cache" else {"cache_scale_ptr": None}), **constants,
    }  # fmt: skip
    return compile_kernel(_sparse_attn_fwd_few_heads_kernel, 90, constants, {"num_warps": 4}, "bf16")


@pytest.mark.parametrize(
    ("name", "d_total", "d_v", "heads"),
    [
        *EVERY_RUN,
        *(
            pytest.param(name, *widths, heads, marks=pytest.mark.slow)
            for name in FORMATS
            for widths in WIDTHS
            for heads in (16, 32)
            if (name, *widths, heads) not in EVERY_RUN
        ),
    ],
)
def test_it_fits_and_its_products_are_wgmma(name: str, d_total: int, d_v: int, heads: int) -> None:
    has_scales = row_format(name).scales_at == "row"
    config = few_heads_config(key_of(d_total, d_v, heads), has_scales=has_scales)
    compiled = compile_few(name, d_total, d_v, heads)
    assert compiled.shared_bytes <= few_heads_smem_bytes(config, has_scales=has_scales) <= SMEM_BYTES[90]
    # Addresses and counts wait on the stack, accumulators do not.
    assert compiled.stack_bytes <= 384
    assert compiled.count(rf"wgmma\.mma_async\.sync\.aligned\.m64n{config.block_h}k16") > 0
    assert compiled.count(r"mma\.sync\.aligned\.m16") == 0


@pytest.mark.parametrize("name", ["dense", "fp8"])
def test_its_products_do_not_wait_for_one_another(name: str) -> None:
    # Where registers are short, ptxas makes every product wait for the one before it.
    sass = compile_few(name, 576, 512, 16).sass()
    assert sass.count("HGMMA") == 36 + 32
    assert sass.count("WARPGROUP.DEPBAR") < 10


def test_its_rows_are_copied_16_bytes_at_a_time_and_zeroed_by_the_copy() -> None:
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global [^;]*;", compile_few("dense", 576, 512, 16).ptx)
    assert copies
    assert all(re.search(r", 0x10, %r\d+;", copy) for copy in copies)


def test_rows_of_e4m3_are_loaded_and_stored_16_bytes_at_a_time_and_converted_once() -> None:
    compiled = compile_few("fp8", 576, 512, 16)
    # Two groups of 128 threads, each with the 64 rows of a tile.
    assert compiled.count(r"cvt\.rn\.f16x2\.e4m3x2") == 2 * 64 * 512 // 128 // 2
    assert compiled.sass().count("STS.128") == 2 * 64 * 1152 // 128 // 16


@pytest.mark.parametrize(
    ("queries", "streamed", "other"),
    [(0, 1, 1), (1, 32, 32), (16, 8, 8), (32, 4, 4), (64, 1, 2), (100, 1, 5), (128, 1, 1), (132, 1, 1), (4096, 1, 1)],
)
def test_few_queries_share_their_slots_out(queries: int, streamed: int, other: int) -> None:
    assert split_count(queries, 32, 132, is_streamed=True) == streamed
    assert split_count(queries, 32, 132, is_streamed=False) == other


@pytest.mark.parametrize("topk", [0, 1, 64, 65, 700, 2048])
@pytest.mark.parametrize("groups", [1, 7, 50, 1000])
def test_splits_cover_all_slots_and_none_is_empty(groups: int, topk: int) -> None:
    plan = plan_items(few_heads_config(key_of(576, 512, 16)), groups, topk, H100, is_streamed=True)
    assert plan.items == groups * plan.num_splits
    assert plan.num_splits * plan.slots_per_split >= topk
    assert (plan.num_splits - 1) * plan.slots_per_split < max(topk, 1)


PROBLEM = SparseAttnProblem(
    d_total=576, d_v=512, topk=2048, heads=16, kv_group=1, dtype=torch.bfloat16, needs_grad=False
)
REFUSALS = {
    "too many heads": ({"heads": 33}, Hints(64, 1, 8192), "33 heads"),
    "narrow": ({"d_total": 192, "d_v": 128}, Hints(64, 1, 8192), "192/128"),
    "fp32": ({"dtype": torch.float32}, Hints(64, 1, 8192), "float32"),
    "keys that stay in the cache": ({}, Hints(1, 4096, 8192), "the cache holds"),
}


@pytest.mark.parametrize(("change", "hints", "reason"), REFUSALS.values(), ids=REFUSALS)
def test_what_is_refused_says_why(change: dict[str, Any], hints: Hints, reason: str) -> None:
    kernels = HopperFewHeadsKernels()
    assert kernels.refusal("forward", PROBLEM, Hints(64, 1, 8192), H100) is None
    assert reason in kernels.refusal("forward", replace(PROBLEM, **change), hints, H100)
