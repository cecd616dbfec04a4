"""Rows of the tables of the indexer's loss, compiled without a device: shared memory, spills, instructions intended."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
from offline_compiler import SMEM_BYTES, Compiled, compile_kernel

from mla_ops.ops.attn_mass.configs.tables import ROWS, mass_config
from mla_ops.ops.index_scores.configs.tables import (
    BACKWARD,
    FORWARD,
    backward_config,
    backward_smem_bytes,
    column_slabs,
    forward_config,
)
from mla_ops.tiling import (
    DEFAULT_ARCH,
    TileConfig,
    TileKey,
    chunk_widths,
    padded_width,
    product_pieces,
    product_smem_bytes,
)

triton = pytest.importorskip("triton", reason="triton is not installed")
pytestmark = pytest.mark.skipif(
    triton.knobs.runtime.interpret, reason="kernels defined under TRITON_INTERPRET=1 can't be compiled"
)

SIDES: dict[str, tuple[Any, ...]] = {
    "mass": (ROWS, mass_config, product_smem_bytes),
    "scores": (FORWARD, forward_config, product_smem_bytes),
    "scores_bwd": (BACKWARD, backward_config, backward_smem_bytes),
}
# Two pointers of the prologue, which the assembler sets aside where registers are few.
MAX_STACK_BYTES = 16
# Heads and widths between the rows of the tables, or beyond them.
OTHERS = [
    *(("mass", *sizes) for sizes in ((1, 40), (64, 1000))),
    *(("scores", *sizes) for sizes in ((32, 128), (3, 300))),
    *(("scores_bwd", *sizes) for sizes in ((16, 1000),)),
]


def compile_side(
    side: str, config: TileConfig, arch: int, heads: int, width: int, element: str = "bf16", **constants: Any
) -> Compiled:
    from mla_ops.ops.attn_mass.kernels.mass import _attn_mass_kernel
    from mla_ops.ops.index_scores.kernels.backward import _index_scores_bwd_kernel
    from mla_ops.ops.index_scores.kernels.scores import _index_scores_kernel

    kernel = {"mass": _attn_mass_kernel, "scores": _index_scores_kernel, "scores_bwd": _index_scores_bwd_kernel}[side]
    shape = {
        "HEADS": heads, "KV_GROUP": 1, "BLOCK_H": config.block_h, "BLOCK_K": config.block_k,
        "STRIDE_ALIGN": 16, "USE_INT64_OFFSETS": False, "topk_length_ptr": None,
    }  # fmt: skip
    if side == "scores_bwd":
        first, end = column_slabs(config, width)[0]
        pieces = {"FIRST": first, "END": end}
        pieces["BLOCK_D"], pieces["BLOCK_T"] = chunk_widths(end - first, config.max_chunk)
    else:
        pieces = dict(zip(("BLOCK_D", "BLOCK_T", "IS_STREAMED"), product_pieces(config, width), strict=True))
    own: dict[str, Any] = {"D_TOTAL": width} if side == "mass" else {"HEAD_DIM": width, "HAS_RELU": True}
    if side == "scores_bwd":
        own["places_ptr"] = None
    if constants.pop("is_placed", False):
        del own["places_ptr"]
    return compile_kernel(kernel, arch, {**shape, **pieces, **own, **constants}, config.options, element)


def check(side: str, arch: int, heads: int, width: int, element_size: int, **constants: Any) -> Compiled:
    """Compile what the table gives for a problem; it must fit and not spill."""
    _, find, smem_bytes = SIDES[side]
    key = TileKey(arch, SMEM_BYTES[arch], heads, width, element_size)
    config = find(key)
    compiled = compile_side(side, config, arch, heads, width, {2: "bf16", 4: "fp32"}[element_size], **constants)
    assert compiled.shared_bytes <= smem_bytes(config, key) <= SMEM_BYTES[arch]
    assert compiled.stack_bytes <= MAX_STACK_BYTES
    return compiled


# Rows without an architecture of their own are those of all others: the first one stands for the rest on 10.0 and 12.0.
PROBLEMS = [
    pytest.param(*problem, id="-".join(map(str, problem)))
    for side, (rows, *_) in SIDES.items()
    for arch in SMEM_BYTES
    for row in [row for row in rows if row.arch == (arch if arch == 90 else DEFAULT_ARCH)][: 1 if arch > 90 else None]
    for problem in [(side, arch, row.heads, row.width, row.element_size)]
]


@pytest.mark.parametrize(("side", "arch", "heads", "width", "element_size"), PROBLEMS)
def test_rows_fit_and_do_not_spill(side: str, arch: int, heads: int, width: int, element_size: int) -> None:
    check(side, arch, heads, width, element_size)


@pytest.mark.parametrize(("side", "heads", "width"), OTHERS, ids=str)
def test_problems_that_have_no_row_fit_and_do_not_spill(side: str, heads: int, width: int) -> None:
    check(side, 90, heads, width, 2)


# What decides about registers where they are few, and other variants where compilation is quick.
VARIANTS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "deterministic": (64, 128, {"is_placed": True}),
    "no relu": (64, 128, {"HAS_RELU": False}),
    "wide offsets": (4, 64, {"USE_INT64_OFFSETS": True}),
    "dq only": (4, 64, {"dk_ptr": None, "dw_ptr": None}),
    "dk only": (4, 64, {"dq_ptr": None, "dw_ptr": None}),
    "constants of 1": (4, 64, {"stride_k_g": 1, "stride_q_b": 1, "seq_q": 1, "topk": 1, "KV_GROUP": 2, "HEADS": 8}),
}


@pytest.mark.parametrize(("heads", "width", "constants"), VARIANTS.values(), ids=VARIANTS)
def test_backward_variants_fit_and_do_not_spill(heads: int, width: int, constants: dict[str, Any]) -> None:
    check("scores_bwd", 90, heads, width, 2, **constants)


@pytest.mark.parametrize(("side", "heads", "width"), [("mass", 64, 576), ("scores", 64, 128), ("scores_bwd", 64, 128)])
def test_products_of_64_rows_are_wgmma_on_hopper(side: str, heads: int, width: int) -> None:
    compiled = check(side, 90, heads, width, 2)
    assert compiled.count(r"wgmma\.mma_async") > 0
    assert compiled.count(r"mma\.sync") == 0


@pytest.mark.parametrize(("side", "heads", "width"), [("mass", 64, 576), ("scores", 64, 128), ("scores_bwd", 4, 64)])
def test_rows_are_copied_16_bytes_at_a_time(side: str, heads: int, width: int) -> None:
    compiled = check(side, 90, heads, width, 2)
    assert compiled.count(r"cp\.async\.c[ag]\.shared\.global [^;]*?, 0x10,") > 0
    assert compiled.count(r"cp\.async\.c[ag]\.shared\.global [^;]*?, 0x8,") == 0


@pytest.mark.parametrize(("heads", "width"), [(4, 64), (64, 128)])
def test_dk_is_added_16_bytes_at_a_time_on_hopper(heads: int, width: int) -> None:
    compiled = check("scores_bwd", 90, heads, width, 2)
    assert compiled.count(r"(?:atom|red)\.global[a-z.]*add\.v4\.f32") > 0
    assert compiled.count(r"(?:atom|red)\.global[a-z.]*add\.f32") == 0


def test_the_mass_of_wide_rows_streams_64_columns_of_queries_and_keys() -> None:
    compiled = check("mass", 90, 64, 576, 2)
    three_stages = 3 * (64 + 512) * 64 * 2
    assert three_stages <= compiled.shared_bytes < three_stages + 2048


@pytest.mark.parametrize(
    ("width", "max_chunk", "pieces"),
    [(576, 512, (512, 64)), (576, 64, (64, 16)), (128, 128, (128, 16)), (40, 64, (64, 16)), (300, 128, (128, 64))],
)
def test_the_pieces_of_a_row(width: int, max_chunk: int, pieces: tuple[int, int]) -> None:
    assert chunk_widths(width, max_chunk) == pieces
    assert padded_width(width, max_chunk) >= width


@pytest.mark.parametrize("arch", SMEM_BYTES)
@pytest.mark.parametrize("side", SIDES)
def test_every_width_has_a_configuration(side: str, arch: int) -> None:
    _, find, smem_bytes = SIDES[side]
    for heads, width, element_size in product((1, 4, 7, 64, 200), (1, 24, 64, 576, 1000, 8192), (2, 4)):
        key = TileKey(arch, SMEM_BYTES[arch], heads, width, element_size)
        config = find(key)
        assert smem_bytes(config, key) <= SMEM_BYTES[arch]
        assert config.block_h <= max(16, 2 * heads)


def test_columns_are_streamed_where_rows_do_not_fit_or_a_row_says_so() -> None:
    assert mass_config(TileKey(90, SMEM_BYTES[90], 16, 600, 2)).columns is None
    assert mass_config(TileKey(90, SMEM_BYTES[90], 64, 600, 2)).columns == 64
    assert mass_config(TileKey(90, SMEM_BYTES[90], 64, 2048, 2)).columns == 64
    assert forward_config(TileKey(90, SMEM_BYTES[90], 64, 576, 2)).columns is None
    assert forward_config(TileKey(90, SMEM_BYTES[90], 64, 2048, 2)).columns == 64
    for width, slabs in ((576, [(0, 576)]), (1000, [(0, 512), (512, 1000)])):
        assert column_slabs(backward_config(TileKey(90, SMEM_BYTES[90], 16, width, 2)), width) == slabs
