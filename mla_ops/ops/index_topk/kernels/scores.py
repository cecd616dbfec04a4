"""Scores of a strip of rows: the bits of fp32 `sum_j weights_j * relu(<q_j, k>)` for its queries and every key.

A strip holds `num_queries` queries from `first_query` on, of every plane (a batch element and a KV group) from
`first_plane` on: row `(plane - first_plane) * num_queries + query - first_query`. Rows are `row_stride` apart, a
multiple of BLOCK_K. So stores need no mask along a row, which would make them 4 bytes wide. A strip is 256 MiB at most,
or one row: 32 bits count its words. Where no query of a tile
may choose a key, nothing is computed, read or written.

Three kernels differ in what stays in shared memory. With few heads queries of all heads stay and keys pass by
(`_score_passing_keys_kernel`). With many heads keys stay and heads pass by (`_score_passing_heads_kernel`). With few
queries, as in decoding, heads are the rows of the products (`_score_head_rows_kernel`), or most rows would be padding.
"""

# ruff: noqa: RUF005 (Triton has no starred expressions)

import triton
import triton.language as tl

from mla_ops.kernels.primitives import add_row_products, known_multiple, load_chunks
from mla_ops.ops.index_topk.kernels.order import eligible


@triton.jit
def _clipped(products, HAS_RELU: tl.constexpr):
    """Return a head's `[rows, keys]` products clipped at 0; NaN stays NaN."""
    if HAS_RELU:
        products = tl.maximum(products, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return products


@triton.jit
def _stored(total, k_scale_ptr, stride_scale_s, keys, is_key):
    """Return scores `[..., keys]`, times the scales of their keys where there are any, as the words of a strip."""
    if k_scale_ptr is not None:
        total *= tl.load(k_scale_ptr + keys.to(tl.int64) * stride_scale_s, mask=is_key, other=0.0)
    return total.to(tl.int32, bitcast=True)


@triton.jit
def _tile_of_queries(
    starts_ptr, stride_starts_b, stride_starts_s, ends_ptr, stride_ends_b, stride_ends_s,
    first_plane, first_query, num_queries, seq_q, seq_kv, key_blocks,
    KV_GROUP: tl.constexpr, BLOCK_Q: tl.constexpr, IS_CAUSAL: tl.constexpr,
):  # fmt: skip
    """Return `(plane, rows, is_row, queries, first, past)`: a program's rows of a strip, and the keys they may choose.

    Those are from the first key that any of the queries may choose to one past the last.

    Programs of one query block are neighbours: DRAM sees its queries once. The longest causal rows come first.
    """
    query_blocks = tl.cdiv(num_queries, BLOCK_Q)
    row_block = tl.program_id(0) // key_blocks
    query_block = query_blocks - 1 - row_block % query_blocks
    plane = first_plane + row_block // query_blocks
    batch = (plane // KV_GROUP).to(tl.int64)
    rows = query_block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    is_row = rows < num_queries
    queries = first_query + rows
    first = 0
    past = seq_kv
    if starts_ptr is not None:
        bounds_ptr = starts_ptr + batch * stride_starts_b
        starts = tl.load(bounds_ptr + queries.to(tl.int64) * stride_starts_s, mask=is_row, other=seq_kv)
        first = tl.min(tl.maximum(tl.minimum(starts, seq_kv), 0).to(tl.int32), 0)
    if ends_ptr is not None:
        bounds_ptr = ends_ptr + batch * stride_ends_b
        ends = tl.load(bounds_ptr + queries.to(tl.int64) * stride_ends_s, mask=is_row, other=0)
        past = tl.max(tl.maximum(tl.minimum(ends, seq_kv), 0).to(tl.int32), 0)
    if IS_CAUSAL:
        last_query = first_query + tl.minimum(query_block * BLOCK_Q + BLOCK_Q, num_queries) - 1
        past = tl.minimum(past, last_query + (seq_kv - seq_q) + 1)
    return plane, rows, is_row, queries, first, past


# Lengths, and the batch strides that follow from them, change from call to call: one binary serves them all.
@triton.jit(
    do_not_specialize=[
        "stride_q_b", "stride_k_b", "stride_w_b", "stride_w_s", "stride_w_h", "stride_scale_b", "stride_starts_b",
        "stride_ends_b", "row_stride", "first_plane", "first_query", "num_queries", "seq_q", "seq_kv", "key_blocks",
    ]
)  # fmt: skip
def _score_passing_heads_kernel(
    q_ptr, stride_q_b, stride_q_s, stride_q_h,
    k_ptr, stride_k_b, stride_k_s, stride_k_g,
    weights_ptr, stride_w_b, stride_w_s, stride_w_h,
    k_scale_ptr, stride_scale_b, stride_scale_s, stride_scale_g,
    starts_ptr, stride_starts_b, stride_starts_s, ends_ptr, stride_ends_b, stride_ends_s,
    strip_ptr, row_stride, first_plane, first_query, num_queries, seq_q, seq_kv, key_blocks,
    HEADS: tl.constexpr, KV_GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, STRIDE_ALIGN: tl.constexpr,
    IS_CAUSAL: tl.constexpr, HAS_RELU: tl.constexpr, IS_WIDE: tl.constexpr,
):  # fmt: skip
    plane, rows, is_row, queries, first, past = _tile_of_queries(
        starts_ptr, stride_starts_b, stride_starts_s, ends_ptr, stride_ends_b, stride_ends_s,
        first_plane, first_query, num_queries, seq_q, seq_kv, key_blocks, KV_GROUP, BLOCK_Q, IS_CAUSAL,
    )  # fmt: skip
    batch, group = (plane // KV_GROUP).to(tl.int64), plane % KV_GROUP
    first_key = (tl.program_id(0) % key_blocks) * BLOCK_K
    if (first_key >= past) | (first_key + BLOCK_K <= first):
        return
    keys = first_key + tl.arange(0, BLOCK_K)
    is_key = keys < seq_kv
    head = group.to(tl.int64) * HEADS
    stride_q_h = known_multiple(stride_q_h, STRIDE_ALIGN)
    q_ptr += batch * known_multiple(stride_q_b, STRIDE_ALIGN) + head * stride_q_h
    k_ptr += batch * known_multiple(stride_k_b, STRIDE_ALIGN)
    k_ptr += group.to(tl.int64) * known_multiple(stride_k_g, STRIDE_ALIGN)
    stride_w_h = tl.cast(stride_w_h, tl.int64)
    weights_ptr += batch * stride_w_b + head * stride_w_h
    q_offsets = queries.to(tl.int64) * known_multiple(stride_q_s, STRIDE_ALIGN)
    k_offsets = keys.to(tl.int64) * known_multiple(stride_k_s, STRIDE_ALIGN)
    w_offsets = queries.to(tl.int64) * stride_w_s
    if k_scale_ptr is not None:
        k_scale_ptr += batch * stride_scale_b + group.to(tl.int64) * stride_scale_g

    total = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
    if IS_WIDE:
        # Rows that don't fit shared memory: keys are read again for every head, WIDTH channels at a time.
        cols = tl.arange(0, WIDTH)
        for h in tl.range(0, HEADS):
            products = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
            for start in tl.range(0, CHUNKS * WIDTH, WIDTH, num_stages=STAGES):
                is_col = (start + cols < HEAD_DIM)[None, :]
                q_cols = q_ptr + q_offsets[:, None] + h * stride_q_h + start + cols[None, :]
                q_tile = tl.load(q_cols, mask=is_row[:, None] & is_col, other=0.0)
                k_cols = k_ptr + k_offsets[:, None] + start + cols[None, :]
                k_tile = tl.load(k_cols, mask=is_key[:, None] & is_col, other=0.0)
                products = tl.dot(q_tile, tl.trans(k_tile), products, input_precision="ieee")
            weight = tl.load(weights_ptr + w_offsets + h * stride_w_h, mask=is_row, other=0.0)
            clipped = _clipped(products, HAS_RELU)
            total += weight.to(tl.float32)[:, None] * clipped
    else:
        k_tiles = load_chunks(k_ptr, k_offsets, is_key, 0, WIDTH, CHUNKS, HEAD_DIM)
        for h in tl.range(0, HEADS, num_stages=STAGES):
            q_tiles = load_chunks(q_ptr + h * stride_q_h, q_offsets, is_row, 0, WIDTH, CHUNKS, HEAD_DIM)
            weight = tl.load(weights_ptr + w_offsets + h * stride_w_h, mask=is_row, other=0.0)
            products = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
            products = add_row_products(products, q_tiles, k_tiles, CHUNKS, "ieee")
            clipped = _clipped(products, HAS_RELU)
            total += weight.to(tl.float32)[:, None] * clipped
    strip_rows = (plane - first_plane) * num_queries + rows
    strip_rows = strip_rows[:, None] * known_multiple(row_stride, BLOCK_K)
    words = _stored(total, k_scale_ptr, stride_scale_s, keys, is_key)
    tl.store(strip_ptr + strip_rows + keys[None, :], words, mask=is_row[:, None])


@triton.jit(
    do_not_specialize=[
        "stride_q_b", "stride_k_b", "stride_w_b", "stride_w_s", "stride_w_h", "stride_scale_b", "stride_starts_b",
        "stride_ends_b", "row_stride", "first_plane", "first_query", "num_queries", "seq_q", "seq_kv", "key_blocks",
    ]
)  # fmt: skip
def _score_passing_keys_kernel(
    q_ptr, stride_q_b, stride_q_s, stride_q_h,
    k_ptr, stride_k_b, stride_k_s, stride_k_g,
    weights_ptr, stride_w_b, stride_w_s, stride_w_h,
    k_scale_ptr, stride_scale_b, stride_scale_s, stride_scale_g,
    starts_ptr, stride_starts_b, stride_starts_s, ends_ptr, stride_ends_b, stride_ends_s,
    strip_ptr, row_stride, first_plane, first_query, num_queries, seq_q, seq_kv, key_blocks,
    HEADS: tl.constexpr, KV_GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, STRIDE_ALIGN: tl.constexpr,
    IS_CAUSAL: tl.constexpr, HAS_RELU: tl.constexpr, KEY_TILES: tl.constexpr,
):  # fmt: skip
    # `key_blocks` counts runs of KEY_TILES tiles here: a program's queries are loaded once for all of them.
    plane, rows, is_row, queries, first, past = _tile_of_queries(
        starts_ptr, stride_starts_b, stride_starts_s, ends_ptr, stride_ends_b, stride_ends_s,
        first_plane, first_query, num_queries, seq_q, seq_kv, key_blocks, KV_GROUP, BLOCK_Q, IS_CAUSAL,
    )  # fmt: skip
    batch, group = (plane // KV_GROUP).to(tl.int64), plane % KV_GROUP
    first_key = (tl.program_id(0) % key_blocks) * (KEY_TILES * BLOCK_K)
    past = tl.minimum(past, first_key + KEY_TILES * BLOCK_K)
    if starts_ptr is not None:
        first_key = tl.maximum(first_key, first // BLOCK_K * BLOCK_K)
    if first_key >= past:
        return
    head = group.to(tl.int64) * HEADS
    stride_q_h = known_multiple(stride_q_h, STRIDE_ALIGN)
    stride_k_s = known_multiple(stride_k_s, STRIDE_ALIGN)
    q_ptr += batch * known_multiple(stride_q_b, STRIDE_ALIGN) + head * stride_q_h
    k_ptr += batch * known_multiple(stride_k_b, STRIDE_ALIGN)
    k_ptr += group.to(tl.int64) * known_multiple(stride_k_g, STRIDE_ALIGN)
    stride_w_h = tl.cast(stride_w_h, tl.int64)
    weights_ptr += batch * stride_w_b + head * stride_w_h
    if k_scale_ptr is not None:
        k_scale_ptr += batch * stride_scale_b + group.to(tl.int64) * stride_scale_g
    q_offsets = queries.to(tl.int64) * known_multiple(stride_q_s, STRIDE_ALIGN)
    w_offsets = queries.to(tl.int64) * stride_w_s
    q_tiles = ()  # [HEADS * CHUNKS] of [BLOCK_Q, WIDTH]
    weights = ()  # [HEADS] of [BLOCK_Q]
    for h in tl.static_range(HEADS):
        q_tiles = q_tiles + load_chunks(q_ptr + h * stride_q_h, q_offsets, is_row, 0, WIDTH, CHUNKS, HEAD_DIM)
        weight = tl.load(weights_ptr + w_offsets + h * stride_w_h, mask=is_row, other=0.0)
        weights = weights + (weight.to(tl.float32),)
    strip_rows = (plane - first_plane) * num_queries + rows
    strip_ptr += strip_rows[:, None] * known_multiple(row_stride, BLOCK_K)
    for start in tl.range(first_key, past, BLOCK_K, num_stages=STAGES):
        keys = start + tl.arange(0, BLOCK_K)
        is_key = keys < seq_kv
        k_tiles = load_chunks(k_ptr, keys.to(tl.int64) * stride_k_s, is_key, 0, WIDTH, CHUNKS, HEAD_DIM)
        total = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
        for h in tl.static_range(HEADS):
            products = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
            for c in tl.static_range(CHUNKS):
                k_tile = tl.trans(k_tiles[c])
                products = tl.dot(q_tiles[h * CHUNKS + c], k_tile, products, input_precision="ieee")
            clipped = _clipped(products, HAS_RELU)
            total += weights[h][:, None] * clipped
        words = _stored(total, k_scale_ptr, stride_scale_s, keys, is_key)
        tl.store(strip_ptr + keys[None, :], words, mask=is_row[:, None])


@triton.jit(
    do_not_specialize=[
        "stride_q_b", "stride_k_b", "stride_w_b", "stride_w_s", "stride_w_h", "stride_scale_b", "stride_starts_b",
        "stride_ends_b", "row_stride", "first_plane", "first_query", "num_queries", "seq_q", "seq_kv", "key_blocks",
    ]
)  # fmt: skip
def _score_head_rows_kernel(
    q_ptr, stride_q_b, stride_q_s, stride_q_h,
    k_ptr, stride_k_b, stride_k_s, stride_k_g,
    weights_ptr, stride_w_b, stride_w_s, stride_w_h,
    k_scale_ptr, stride_scale_b, stride_scale_s, stride_scale_g,
    starts_ptr, stride_starts_b, stride_starts_s, ends_ptr, stride_ends_b, stride_ends_s,
    strip_ptr, row_stride, first_plane, first_query, num_queries, seq_q, seq_kv, key_blocks,
    HEADS: tl.constexpr, KV_GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, STRIDE_ALIGN: tl.constexpr,
    IS_CAUSAL: tl.constexpr, HAS_RELU: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    plane = first_plane + program // key_blocks
    batch, group = (plane // KV_GROUP).to(tl.int64), plane % KV_GROUP
    first_key = (program % key_blocks) * BLOCK_K
    keys = first_key + tl.arange(0, BLOCK_K)
    is_key = keys < seq_kv
    stride_q_h = known_multiple(stride_q_h, STRIDE_ALIGN)
    stride_q_s = known_multiple(stride_q_s, STRIDE_ALIGN)
    q_ptr += batch * known_multiple(stride_q_b, STRIDE_ALIGN) + group.to(tl.int64) * HEADS * stride_q_h
    k_ptr += batch * known_multiple(stride_k_b, STRIDE_ALIGN)
    k_ptr += group.to(tl.int64) * known_multiple(stride_k_g, STRIDE_ALIGN)
    weights_ptr += batch * stride_w_b + group.to(tl.int64) * HEADS * stride_w_h
    if k_scale_ptr is not None:
        k_scale_ptr += batch * stride_scale_b + group.to(tl.int64) * stride_scale_g
    k_offsets = keys.to(tl.int64) * known_multiple(stride_k_s, STRIDE_ALIGN)
    k_tiles = load_chunks(k_ptr, k_offsets, is_key, 0, WIDTH, CHUNKS, HEAD_DIM)
    strip_ptr += (plane - first_plane) * num_queries * known_multiple(row_stride, BLOCK_K)
    for row in tl.range(0, num_queries):
        query = first_query + row
        starts = query * 0
        ends = starts + seq_kv
        if starts_ptr is not None:
            starts = tl.load(starts_ptr + batch * stride_starts_b + tl.cast(query, tl.int64) * stride_starts_s)
        if ends_ptr is not None:
            ends = tl.load(ends_ptr + batch * stride_ends_b + tl.cast(query, tl.int64) * stride_ends_s)
        first, past = eligible(query, starts, ends, seq_q, seq_kv, IS_CAUSAL)
        if (first_key < past) & (first_key + BLOCK_K > first):
            total = tl.zeros([BLOCK_K], tl.float32)
            for start in tl.range(0, HEADS, BLOCK_H, num_stages=STAGES):
                heads = start + tl.arange(0, BLOCK_H)
                is_head = heads < HEADS
                q_offsets = heads.to(tl.int64) * stride_q_h
                row_ptr = q_ptr + tl.cast(query, tl.int64) * stride_q_s
                q_tiles = load_chunks(row_ptr, q_offsets, is_head, 0, WIDTH, CHUNKS, HEAD_DIM)
                w_offsets = tl.cast(query, tl.int64) * stride_w_s + heads.to(tl.int64) * stride_w_h
                weight = tl.load(weights_ptr + w_offsets, mask=is_head, other=0.0).to(tl.float32)
                products = tl.zeros([BLOCK_H, BLOCK_K], tl.float32)
                products = add_row_products(products, q_tiles, k_tiles, CHUNKS, "ieee")
                weighted = weight[:, None] * _clipped(products, HAS_RELU)
                # The zeros of a padded head times an infinite key are NaN.
                total += tl.sum(tl.where(is_head[:, None], weighted, 0.0), 0)
            words = _stored(total, k_scale_ptr, stride_scale_s, keys, is_key)
            tl.store(strip_ptr + row * known_multiple(row_stride, BLOCK_K) + keys, words)
