"""Rows of the configuration tables, compiled without a device: shared memory, spills, and the instructions intended."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from offline_compiler import SMEM_BYTES, Compiled, compile_kernel

from mla_ops.device import DeviceTraits
from mla_ops.ops.sparse_attn.configs.head_dims import FAMILIES
from mla_ops.ops.sparse_attn.configs.launch import (
    HOPPER_BLOCK_H,
    BwdConfig,
    ConfigKey,
    FwdConfig,
    Row,
    bwd_smem_bytes,
    chunk_widths,
    fwd_smem_bytes,
    hopper_bwd_smem_bytes,
    hopper_smem_bytes,
    launch_options,
)
from mla_ops.ops.sparse_attn.configs.lookup import (
    TABLES,
    backward_configs,
    forward_config,
    hopper_backward_config,
    hopper_config,
)
from mla_ops.ops.sparse_attn.triton.portable import MERGED_CHANNELS, MERGED_SPLITS

triton = pytest.importorskip("triton", reason="triton is not installed")
pytestmark = pytest.mark.skipif(
    triton.knobs.runtime.interpret, reason="kernels defined under TRITON_INTERPRET=1 can't be compiled"
)

# Stack bytes a row may use: values of the prologue that return after the loop, and a reload or two inside it, where
# refusing them would halve the keys of a step. (arch, family, heads, side): the bound is what was seen, rounded up.
ALLOWED_STACK = {
    (90, "576x512", 64, "fwd"): 64,
    (90, "128x64", 64, "bwd"): 64,  # with a sink
    # Measured on the H100 as the fastest of their shape all the same: the registers that would hold these few values
    # hold a larger tile instead.
    (90, "128x64", 32, "fwd"): 64,
    (90, "128x64", 32, "bwd"): 64,
    (90, "128x64", 16, "bwd"): 64,
    (90, "144x80", 12, "bwd"): 64,
    (90, "144x80", 12, "placed"): 256,
    (90, "192x64", 32, "bwd"): 64,
    (90, "192x128", 32, "fwd"): 80,  # 64 with triton 3.6
    (90, "192x128", 32, "bwd"): 64,
    (90, "192x128", 64, "bwd"): 192,
    (90, "256x192", 32, "fwd"): 64,
    (90, "256x192", 32, "bwd"): 192,
    (90, "1024x1024", 16, "fwd"): 128,
    (90, "1024x1024", 32, "bwd"): 128,
    (90, "320x256", 32, "placed"): 128,
    (90, "576x512", 16, "fwd"): 64,
    (90, "576x512", 16, "bwd"): 128,
    (90, "576x512", 32, "fwd"): 64,
    (90, "576x512", 32, "bwd"): 128,
    (90, "576x512", 64, "bwd"): 128,
    (80, "144x80", 12, "bwd"): 64,  # none inside the loop
    (100, "144x80", 12, "bwd"): 64,  # none inside the loop
    (120, "144x80", 12, "bwd"): 64,  # none inside the loop
}
# Rows compiled on every run; the others are marked slow.
REPRESENTATIVE = {("128x64", 32), ("576x512", 16), ("576x512", 64)}


def shape_constants(
    config: FwdConfig | BwdConfig, heads: int, d_total: int, d_v: int, align: int = 16
) -> dict[str, Any]:
    block_dv, block_dt = chunk_widths(d_total, d_v, config.max_chunk)
    return {
        "HEADS": heads, "KV_GROUP": 1, "D_TOTAL": d_total, "D_V": d_v, "BLOCK_H": config.block_h,
        "BLOCK_K": config.block_k, "BLOCK_DV": block_dv, "BLOCK_DT": block_dt, "STRIDE_ALIGN": align,
        "USE_INT64_OFFSETS": False, "INPUT_PRECISION": "ieee",
    }  # fmt: skip


def compile_forward(
    config: FwdConfig, arch: int, heads: int, d_total: int, d_v: int, element: str = "bf16", **constants: Any
) -> Compiled:
    from mla_ops.ops.sparse_attn.kernels.forward import _sparse_attn_fwd_kernel

    align = constants.pop("STRIDE_ALIGN", 16)
    constants = {
        **shape_constants(config, heads, d_total, d_v, align),
        "IS_SPLIT": False,
        "IS_NEGATIVE_SCALE": False,
        **constants,
    }
    return compile_kernel(_sparse_attn_fwd_kernel, arch, constants, launch_options(config), element)


def dkv_element(element: str, is_placed: bool) -> str:
    """Return what the backward kernels write for dkv: sums in fp32, or rows as `row_dtype` has them."""
    return "bf16" if is_placed and element == "bf16" else "fp32"


def compile_backward(
    config: BwdConfig,
    arch: int,
    heads: int,
    d_total: int,
    d_v: int,
    element: str = "bf16",
    *,
    is_placed: bool = False,
    **constants: Any,
) -> Compiled:
    from mla_ops.ops.sparse_attn.kernels.backward import _sparse_attn_bwd_kernel

    align = constants.pop("STRIDE_ALIGN", 16)
    orders = {"IS_KEY_MAJOR": config.is_key_major, "IS_AHEAD": config.is_ahead, "places_ptr": None}
    constants = {**shape_constants(config, heads, d_total, d_v, align), **orders, **constants}
    if is_placed:
        del constants["places_ptr"]
    rows = dkv_element(element, is_placed)
    return compile_kernel(_sparse_attn_bwd_kernel, arch, constants, launch_options(config), element, rows)


def hopper_key(d_total: int, d_v: int) -> ConfigKey:
    return ConfigKey(90, SMEM_BYTES[90], 64, d_total, d_v, 2)


GIVEN = object()  # an argument of the launch and no constant
HOPPER_WHOLE = {"IS_SPLIT": False, "slots_per_split": None, "num_splits": None, "PREFETCHED": 0}
HOPPER_SPLIT = {"IS_SPLIT": True, "slots_per_split": GIVEN, "num_splits": GIVEN, "attn_sink_ptr": None}
HOPPER_UNPAGED = {"IS_PAGED": False, "page_size": None, "num_pages": None}
HOPPER_UNPAGED |= {"table_ptr": None, "stride_table": None, "seq_lens_ptr": None}
HOPPER_PAGED = {"IS_PAGED": True, "page_size": GIVEN, "num_pages": GIVEN}
HOPPER_TABLE = {**HOPPER_PAGED, "table_ptr": GIVEN, "stride_table": GIVEN, "seq_lens_ptr": GIVEN}
HOPPER_DENSE = {"PAYLOAD": 0, "SCALES_AT": 0, "TAIL_AT": 0, "cache_scale_ptr": None}
HOPPER_FP8 = {"PAYLOAD": 512, "SCALES_AT": 512, "TAIL_AT": 528, "PREFETCHED": 656}


def compile_hopper(heads: int, d_total: int, d_v: int, element: str = "bf16", **constants: Any) -> Compiled:
    from mla_ops.ops.sparse_attn.kernels.hopper_forward import _sparse_attn_fwd_hopper_kernel

    config = hopper_config(hopper_key(d_total, d_v))
    constants = {
        "HEADS": heads, "KV_GROUP": 1, "D_TOTAL": d_total, "D_V": d_v,
        "LEFT": config.left, "RIGHT": config.right, "TAIL": config.tail, "PAIRS": config.pairs,
        "VALUE_REGISTERS": config.value_registers, "GATHER_REGISTERS": config.gather_registers,
        "IS_NEGATIVE_SCALE": False, **HOPPER_WHOLE, **HOPPER_UNPAGED, **HOPPER_DENSE, **constants,
    }  # fmt: skip
    taken = {name: value for name, value in constants.items() if value is not GIVEN}
    return compile_kernel(_sparse_attn_fwd_hopper_kernel, 90, taken, {"num_warps": 4}, element)


def compile_hopper_backward(
    heads: int, d_total: int, d_v: int, element: str = "bf16", *, is_placed: bool = False, **constants: Any
) -> Compiled:
    from mla_ops.ops.sparse_attn.kernels.hopper_backward import _sparse_attn_bwd_hopper_kernel

    config = hopper_backward_config(hopper_key(d_total, d_v))
    constants = {
        "HEADS": heads, "KV_GROUP": 1, "D_TOTAL": d_total, "D_V": d_v,
        "WIDTH": config.half_value, "HALF_TAIL": config.half_tail, **({} if is_placed else {"places_ptr": None}),
        **constants,
    }  # fmt: skip
    rows = dkv_element(element, is_placed)
    return compile_kernel(_sparse_attn_bwd_hopper_kernel, 90, constants, {"num_warps": 4}, element, rows)


ROWS = [
    pytest.param(
        arch, row, id=f"sm{arch}-{row.family}-H{row.heads}-{row.element_size}B",
        marks=[] if (row.family, row.heads) in REPRESENTATIVE and row.element_size == 2 else pytest.mark.slow,
    )
    for arch, rows in TABLES for row in rows
]  # fmt: skip


@pytest.mark.parametrize(("arch", "row"), ROWS)
def test_row_fits_and_does_not_spill(arch: int, row: Row) -> None:
    d_total, d_v = FAMILIES[row.family]
    element = "bf16" if row.element_size == 2 else "fp32"
    key = ConfigKey(arch, SMEM_BYTES[arch], row.heads, d_total, d_v, row.element_size)
    fwd, bwd = forward_config(key), backward_configs(key)
    launches = []
    if fwd is not None:
        compiled = compile_forward(fwd, arch, row.heads, d_total, d_v, element)
        launches.append(("fwd", compiled, fwd_smem_bytes(fwd, key)))
    for config in bwd or ():
        compiled = compile_backward(config, arch, row.heads, d_total, d_v, element)
        launches.append(("bwd", compiled, bwd_smem_bytes(config, key)))
    for config in (backward_configs(key, is_deterministic=True) or ()) if row.placed else ():
        compiled = compile_backward(config, arch, row.heads, d_total, d_v, element, is_placed=True)
        launches.append(("placed", compiled, bwd_smem_bytes(config, key)))
    for side, compiled, bound in launches:
        assert compiled.shared_bytes <= bound <= SMEM_BYTES[arch], side
        assert compiled.stack_bytes <= ALLOWED_STACK.get((arch, row.family, row.heads, side), 0), side


def payloads(arch: int, *, is_q_too: bool = False) -> dict[str, Any]:
    """Return the constants of a launch whose kv, or q and kv, are bytes of e4m3 with a scale for each row."""
    import triton.language as tl

    q = {"q_scale_ptr": ..., "IS_Q_SCALED_BY_ROW": True} if is_q_too else {}
    kv = {"kv_scale_ptr": ..., "IS_KV_SCALED_BY_ROW": True}
    return {**q, **kv, "ELEMENT": tl.bfloat16, "IS_NATIVE_E4M3": DeviceTraits("cuda", arch).has_e4m3}


# (arch, family, heads): stack bytes that widened rows may add, outside of the loop or a reload or two inside it.
PAYLOAD_STACK = {(90, "128x64", 32): 32, (90, "576x512", 16): 208, (100, "576x512", 16): 48}


@pytest.mark.parametrize(("family", "heads"), [("128x64", 32), pytest.param("576x512", 16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("arch", SMEM_BYTES, ids=lambda arch: f"sm{arch}")
def test_payloads_fit_and_are_widened_once(arch: int, family: str, heads: int) -> None:
    d_total, d_v = FAMILIES[family]
    key = ConfigKey(arch, SMEM_BYTES[arch], heads, d_total, d_v, 2, has_payloads=True)
    fwd, (bwd,) = forward_config(key), backward_configs(key)
    options = payloads(arch, is_q_too=arch == 90)
    launches = [
        (compile_forward(fwd, arch, heads, d_total, d_v, **options), fwd_smem_bytes(fwd, key), fwd),
        (compile_backward(bwd, arch, heads, d_total, d_v, **options), bwd_smem_bytes(bwd, key), bwd),
    ]
    for compiled, bound, config in launches:
        assert compiled.shared_bytes <= bound <= SMEM_BYTES[arch]
        assert compiled.stack_bytes <= PAYLOAD_STACK.get((arch, family, heads), 0)
        # Rows of bytes are copied 16 at a time, and no value leaves shared memory by itself.
        assert compiled.count(r"cp\.async\.cg\.shared\.global [^;]*0x10") > 0 or config.num_stages == 1
        assert (compiled.count(r"cvt\S*e4m3x2") > 0) == DeviceTraits("cuda", arch).has_e4m3


# Tiles that no table has and `shrink_to_fit` or a tuned row may: block_h, block_k, num_stages, is_key_major.
OTHER_TILES = [(32, 32, 2, True), (16, 32, 1, True), (32, 64, 2, False), (64, 32, 1, False)]


@pytest.mark.slow
@pytest.mark.parametrize(("block_h", "block_k", "num_stages", "is_key_major"), OTHER_TILES)
@pytest.mark.parametrize("arch", [80, 90])
def test_shared_memory_of_other_backward_tiles_is_bounded(
    arch: int, block_h: int, block_k: int, num_stages: int, is_key_major: bool
) -> None:
    config = BwdConfig(block_h, block_k, 64, 4, num_stages, is_key_major)
    compiled = compile_backward(config, arch, block_h, 192, 128)
    assert compiled.shared_bytes <= bwd_smem_bytes(config, ConfigKey(arch, SMEM_BYTES[arch], block_h, 192, 128, 2))


def test_products_of_64_rows_are_wgmma_on_hopper() -> None:
    fwd = forward_config(ConfigKey(90, SMEM_BYTES[90], 64, 128, 64, 2))
    assert compile_forward(fwd, 90, 64, 128, 64).count(r"wgmma\.mma_async") > 0
    key_major = BwdConfig(block_h=32, block_k=64, max_chunk=64, num_warps=4, num_stages=2)
    compiled = compile_backward(key_major, 90, 32, 128, 64)
    assert compiled.count(r"wgmma\.mma_async") > 0
    assert compiled.count(r"mma\.sync") == 0


def test_values_are_not_gathered_a_second_time() -> None:
    config = FwdConfig(block_h=64, block_k=64, max_chunk=512, num_warps=8, num_stages=2)
    compiled = compile_forward(config, 90, 64, 576, 512, topk_length_ptr=None, attn_sink_ptr=None)
    q_and_two_row_buffers = 3 * 64 * 576 * 2
    assert q_and_two_row_buffers <= compiled.shared_bytes < q_and_two_row_buffers + 2048


@pytest.mark.parametrize(
    ("d_total", "d_v", "align", "copy_bytes"), [(128, 64, 16, 16), (72, 64, 8, 16), (100, 96, 4, 8), (144, 80, 16, 16)]
)
def test_rows_are_copied_in_the_widest_pieces_their_stride_allows(
    d_total: int, d_v: int, align: int, copy_bytes: int
) -> None:
    config = FwdConfig(block_h=16, block_k=64, max_chunk=64, num_warps=4, num_stages=2)
    compiled = compile_forward(config, 90, 16, d_total, d_v, STRIDE_ALIGN=align)
    sizes = set(re.findall(r"cp\.async\.c[ag]\.shared\.global [^;]*?, 0x([0-9a-f]+)", compiled.ptx))
    assert max(int(size, 16) for size in sizes) == copy_bytes
    # What is not a row is an index, 4 bytes.
    assert {int(size, 16) for size in sizes} <= {copy_bytes, 4}


def test_dkv_is_added_16_bytes_at_a_time_on_hopper() -> None:
    (config,) = backward_configs(ConfigKey(90, SMEM_BYTES[90], 32, 128, 64, 2))
    compiled = compile_backward(config, 90, 32, 128, 64)
    assert compiled.count(r"(?:atom|red)\.global[a-z.]*add\.v4\.f32") > 0
    assert compiled.count(r"(?:atom|red)\.global[a-z.]*add\.f32") == 0


VARIANTS = {
    "deterministic": {"is_placed": True},
    "wide offsets": {"USE_INT64_OFFSETS": True},
    "dq only": {"dkv_ptr": None},
    "dkv only": {"dq_ptr": None},
    "lse gradient only": {"dout_ptr": None},
    "constants of 1": {"stride_kv_g": 1, "stride_q_b": 1, "KV_GROUP": 4, "HEADS": 16},
}


@pytest.mark.parametrize("constants", VARIANTS.values(), ids=VARIANTS)
def test_backward_variants_compile(constants: dict[str, Any]) -> None:
    config = BwdConfig(block_h=16, block_k=32, max_chunk=64, num_warps=4, num_stages=2, is_key_major=False)
    assert compile_backward(config, 90, 16, 128, 64, **constants).stack_bytes == 0


@pytest.mark.parametrize(("d_total", "d_v", "heads", "is_split"), [(128, 64, 32, False), (576, 512, 16, True)])
@pytest.mark.parametrize("arch", SMEM_BYTES, ids=lambda arch: f"sm{arch}")
def test_max_logits_stop_at_the_logits_and_do_not_spill(
    arch: int, d_total: int, d_v: int, heads: int, is_split: bool
) -> None:
    key = ConfigKey(arch, SMEM_BYTES[arch], heads, d_total, d_v, 2)
    config = forward_config(key)
    options = {"IS_SPLIT": is_split, "out_ptr": None, "attn_sink_ptr": None}
    compiled = compile_forward(config, arch, heads, d_total, d_v, **options)
    assert compiled.stack_bytes == 0
    assert compiled.shared_bytes <= fwd_smem_bytes(config, key)
    assert compiled.count(r"ex2\.approx") == 0  # no weights, so no product with the values


def test_split_forward_merge_and_ordered_sum_compile() -> None:
    from mla_ops.kernels.row_sums import (
        _place_slots_kernel,
        _rank_slots_kernel,
        _sum_placed_rows_kernel,
    )
    from mla_ops.ops.sparse_attn.kernels.forward_split import _sparse_attn_merge_kernel

    config = FwdConfig(block_h=16, block_k=64, max_chunk=64, num_warps=4, num_stages=2)
    assert compile_forward(config, 90, 16, 576, 512, IS_SPLIT=True).stack_bytes == 0
    merge = {
        "HEADS": 16,
        "D_V": 512,
        "BLOCK_S": MERGED_SPLITS,
        "BLOCK_H": 1,
        "BLOCK_D": MERGED_CHANNELS,
        "IS_DEPENDENT": True,
    }
    assert compile_kernel(_sparse_attn_merge_kernel, 90, merge, {"num_warps": 1}, "bf16").stack_bytes == 0
    options = launch_options(config)
    ordered = {"HEAD_BLOCKS": 2, "WIDTH": 576, "BLOCK_ROWS": 32, "BLOCK_D": 128, "IS_FIRST": False}
    assert compile_kernel(_sum_placed_rows_kernel, 90, ordered, options, "bf16").stack_bytes == 0
    for kernel in (_rank_slots_kernel, _place_slots_kernel):
        assert compile_kernel(kernel, 90, {"KV_GROUP": 1, "BLOCK": 256}, options, "bf16").stack_bytes == 0


HOPPER_WIDTHS = [(d_v + tail, d_v) for d_v in (256, 320, 384, 448, 512) for tail in (0, 32, 64, 128)]


@pytest.mark.parametrize("find", [hopper_config, hopper_backward_config], ids=["forward", "backward"])
def test_the_hopper_kernels_are_for_all_wide_rows_but_one(find: Callable[..., object]) -> None:
    refused = [widths for widths in HOPPER_WIDTHS if find(hopper_key(*widths)) is None]
    assert refused == [(640, 512)]  # too little shared memory for it


def hopper_widths(find: Callable[..., object]) -> list[Any]:
    """The narrowest and the widest row that `find` gives each of its configurations, and the one with most tail.

    Between them only the masks of the channels change.
    """
    covered: dict[object, list[tuple[int, int]]] = {}
    for widths in HOPPER_WIDTHS:
        covered.setdefault(find(hopper_key(*widths)), []).append(widths)
    covered.pop(None, None)
    every_run = ((576, 512), (512, 512), (320, 256))
    return [
        pytest.param(*pair, id="x".join(map(str, pair)), marks=[] if pair in every_run else pytest.mark.slow)
        for pairs in covered.values()
        for pair in sorted({min(pairs), max(pairs), max(pairs, key=lambda pair: pair[0] - pair[1])})
    ]


def test_the_launcher_counts_the_heads_that_a_hopper_kernel_takes() -> None:
    from mla_ops.ops.sparse_attn.kernels.hopper_forward import BLOCK_H

    assert BLOCK_H.value == HOPPER_BLOCK_H


@pytest.mark.parametrize(("d_total", "d_v"), hopper_widths(hopper_config))
def test_hopper_forward_fits_and_its_products_are_wgmma(d_total: int, d_v: int) -> None:
    compiled = compile_hopper(128, d_total, d_v)
    config = hopper_config(hopper_key(d_total, d_v))
    assert compiled.shared_bytes <= hopper_smem_bytes(config)
    # 16 warps start at 128 registers; what more than that a role needs, `setmaxnreg` gives it.
    assert compiled.registers == 128
    # Where the gather only has 56 registers, what an item begins with waits there; no accumulator does.
    assert compiled.stack_bytes <= (256 if config.left == 256 else 32)
    assert compiled.count(r"wgmma\.mma_async") > 0
    assert compiled.count(r"mma\.sync\.aligned\.m16") == 0


# A compile takes five seconds, so those that have nothing to do with one another share one.
HOPPER_VARIANTS = {
    "fp16, few heads in groups": {"element": "fp16", "HEADS": 40, "KV_GROUP": 2},
    "split, no length, no sink": {**HOPPER_SPLIT, "topk_length_ptr": None, "PREFETCHED": 1152},
    "table": HOPPER_TABLE,
    "negative scale, constants of 1": {
        "IS_NEGATIVE_SCALE": True, "stride_i_g": 1, "stride_i_s": 1, "stride_q_b": 1,
    },
}  # fmt: skip


@pytest.mark.parametrize("options", HOPPER_VARIANTS.values(), ids=HOPPER_VARIANTS)
def test_hopper_forward_variants_compile(options: dict[str, Any]) -> None:
    assert compile_hopper(128, 576, 512, **options).stack_bytes <= 256


def test_hopper_rows_of_e4m3_are_loaded_and_stored_16_bytes_at_a_time() -> None:
    compiled = compile_hopper(128, 576, 512, **HOPPER_PAGED, **HOPPER_FP8, **HOPPER_SPLIT)
    assert compiled.stack_bytes <= 256
    assert compiled.shared_bytes <= SMEM_BYTES[90]
    # Of a tile a thread of the gather loads 256 channels and stores them in two bytes each; the kernel has two tiles.
    assert compiled.count(r"cvt\.rn\.f16x2\.e4m3x2") == 2 * 256 // 2
    assert len(re.findall(r"\bSTS\.128\b", compiled.sass())) >= 2 * 256 * 2 // 16


def test_hopper_rows_are_copied_16_bytes_at_a_time_and_zeroed_by_the_copy() -> None:
    ptx = compile_hopper(128, 576, 512).ptx
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global [^;]*;", ptx)
    assert copies
    # A fourth operand is the number of bytes read; the rest of the 16 become 0.
    assert all(re.search(r", 0x10, %r\d+;", copy) for copy in copies)


def test_hopper_copies_are_published_after_the_fence_of_every_thread() -> None:
    ptx = re.sub(r"(?m)^\s*(//.*|\.loc.*|\$.*)?\n|//[^\n]*", "", compile_hopper(128, 576, 512).ptx)
    waits = ptx.split("cp.async.wait_group")[1:]
    assert len(waits) == 6  # LEFT and the rest of the first stage, of the queries, of the second stage
    for after in waits:
        until_arrival = after.split("mbarrier.arrive")[0]
        fence = until_arrival.index("fence.proxy.async")
        assert re.search(r"\b(bar|barrier)(\.cta)?\.sync\b", until_arrival[fence:])


@pytest.mark.parametrize(("d_total", "d_v"), hopper_widths(hopper_backward_config))
def test_hopper_backward_fits_and_spills_no_accumulator(d_total: int, d_v: int) -> None:
    compiled = compile_hopper_backward(128, d_total, d_v)
    assert compiled.shared_bytes <= hopper_bwd_smem_bytes(hopper_backward_config(hopper_key(d_total, d_v)))
    assert compiled.registers == 168  # of 12 warps that start; what a role needs more, `setmaxnreg` gives it
    assert compiled.stack_bytes <= 64  # pointers and counts, no accumulators
    assert compiled.count(r"wgmma\.mma_async") > 0
    assert compiled.count(r"mma\.sync\.aligned\.m16") == 0


HOPPER_BACKWARD_VARIANTS = {
    "deterministic": VARIANTS["deterministic"],
    "dq only, constants of 1": {**VARIANTS["dq only"], "stride_i_g": 1, "stride_i_s": 1, "stride_q_b": 1},
    "dkv only, few heads in groups": {**VARIANTS["dkv only"], "HEADS": 80, "KV_GROUP": 2},
    "lse gradient only": VARIANTS["lse gradient only"],
    "fp16, no length, no sink": {
        "element": "fp16", "topk_length_ptr": None, "attn_sink_ptr": None, "dsink_ptr": None, "dlse_ptr": None,
    },
    "deterministic fp16": {"element": "fp16", "is_placed": True},
}  # fmt: skip


@pytest.mark.parametrize("options", HOPPER_BACKWARD_VARIANTS.values(), ids=HOPPER_BACKWARD_VARIANTS)
def test_hopper_backward_variants_compile(options: dict[str, Any]) -> None:
    assert compile_hopper_backward(128, 576, 512, **options).stack_bytes <= 64


@pytest.mark.parametrize("is_placed", [False, True], ids=["added", "placed"])
def test_hopper_products_do_not_wait_for_one_another(is_placed: bool) -> None:
    # Where registers are short, ptxas makes every product wait for the one before it.
    sass = compile_hopper_backward(128, 576, 512, is_placed=is_placed).sass()
    assert sass.count("HGMMA") > 200
    assert sass.count("WARPGROUP.DEPBAR") < 40


def test_hopper_dkv_is_added_16_bytes_at_a_time() -> None:
    ptx = compile_hopper_backward(128, 576, 512).ptx
    assert re.search(r"(?:atom|red)\.global[a-z.]*add\.v4\.f32", ptx)
    assert not re.search(r"(?:atom|red)\.global[a-z.]*add\.(?:v2\.)?f32", ptx)


def test_placed_hopper_rows_are_stored_16_bytes_at_a_time() -> None:
    ptx = compile_hopper_backward(128, 576, 512, is_placed=True, dq_ptr=None, dsink_ptr=None).ptx
    assert not re.search(r"(?:atom|red)\.global[a-z.]*add", ptx)
    assert set(re.findall(r"st\.global\.(\w+\.\w+)", ptx)) == {"v4.b32"}


def test_what_hopper_products_read_is_published_after_the_fence_of_every_thread() -> None:
    ptx = re.sub(r"(?m)^\s*(//.*|\.loc.*|\$.*)?\n|//[^\n]*", "", compile_hopper_backward(128, 576, 512).ptx)
    published = [after.split("mbarrier.arrive")[0] for after in ptx.split("fence.proxy.async")[1:]]
    assert len(published) == 3  # rows, and P and dS of both gradient groups
    for until_arrival in published:
        assert re.search(r"\b(bar|barrier)(\.cta)?\.sync\b", until_arrival)


def test_hopper_buffers_are_freed_after_the_reads_of_every_warp() -> None:
    ptx = re.sub(r"(?m)^\s*(//.*|\.loc.*|\$.*)?\n|//[^\n]*", "", compile_hopper_backward(128, 576, 512).ptx)
    for before in ptx.split("mbarrier.arrive")[:-1]:
        since_last_read = before.split("wgmma.wait_group")[-1]
        assert re.search(r"\b(bar|barrier)(\.cta)?\.sync\b", since_last_read)


def portable_kernels() -> dict[str, tuple[Any, dict[str, Any]]]:
    """Return every kernel that a compiler may inline, with the constants of a small problem."""
    from mla_ops.kernels import row_sums
    from mla_ops.ops.sparse_attn.kernels import backward, forward, forward_split

    config = BwdConfig(block_h=16, block_k=16, max_chunk=16, num_warps=1, num_stages=1)
    shape = shape_constants(config, heads=2, d_total=24, d_v=16)
    orders = {"IS_KEY_MAJOR": True, "IS_AHEAD": True}
    slots, rows = {"KV_GROUP": 1, "BLOCK": 32}, {"HEAD_BLOCKS": 1, "WIDTH": 24, "BLOCK_ROWS": 16, "BLOCK_D": 32}
    merged = {"HEADS": 2, "D_V": 16, "BLOCK_S": 8, "BLOCK_H": 8, "BLOCK_D": 16, "IS_DEPENDENT": False}
    fwd = {**shape, "IS_SPLIT": False, "IS_NEGATIVE_SCALE": False}
    return {
        "forward": (forward._sparse_attn_fwd_kernel, fwd),
        "split": (forward._sparse_attn_fwd_kernel, {**fwd, "IS_SPLIT": True}),
        "merge": (forward_split._sparse_attn_merge_kernel, merged),
        "backward": (backward._sparse_attn_bwd_kernel, {**shape, **orders, "places_ptr": None}),
        "placed": (backward._sparse_attn_bwd_kernel, {**shape, **orders}),
        "rank": (row_sums._rank_slots_kernel, slots),
        "place": (row_sums._place_slots_kernel, slots),
        "sum": (row_sums._sum_placed_rows_kernel, {**rows, "IS_FIRST": False}),
    }


# A compiled graph hands over a size that it knows to be 1 as a number of Python's, without the methods of a tensor.
@pytest.mark.parametrize("name", ["forward", "split", "merge", "backward", "placed", "rank", "place", "sum"])
def test_integer_arguments_may_be_known_to_be_1(name: str) -> None:
    kernel, constants = portable_kernels()[name]
    given = [param.name for param in kernel.params if not param.has_default and param.name not in constants]
    integers = [name for name in given if not name.endswith("_ptr") and name != "softmax_scale"]
    assert integers
    compile_kernel(kernel, 90, {**constants, **dict.fromkeys(integers, 1)}, {"num_warps": 1}, "fp32")
