"""Row numbers of positions: one look-up for all who read the rows.

A table inside the forward kernel takes it a sixth longer at 576/512: every layout in which the kernel needs the places
of rows repeats the division and the load. A kernel of its own takes 2 us.
"""

import triton
import triton.language as tl

from mla_ops.kernels.row_codec import split_row


@triton.jit(
    do_not_specialize=["stride_i_b", "stride_t_b", "seq_q", "num_keys", "num_pages", "page_size", "page_rows", "topk"]
)
def _resolve_rows_kernel(
    indices_ptr, stride_i_b, stride_i_s, stride_i_g,
    block_table_ptr, stride_t_b, seq_lens_ptr,  # None: indices are row numbers; None: all positions are keys
    rows_ptr,  # [rows, kv_group, topk]; -1 where a slot names no row
    seq_q, num_keys, num_pages, page_size, page_rows, topk,
    KV_GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write where the rows stand that indices name, counted in rows from the start of the pool.

    A page takes `page_rows` rows of it: more than `page_size` where pages are padded.
    """
    program = tl.program_id(0).to(tl.int64)
    row, group = program // KV_GROUP, program % KV_GROUP
    batch, query = row // seq_q, row % seq_q
    if seq_lens_ptr is not None:
        num_keys = tl.minimum(tl.load(seq_lens_ptr + batch), num_keys)
    slots = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = slots < topk
    indices_ptr += batch * stride_i_b + query * stride_i_s + group * stride_i_g
    position = tl.load(indices_ptr + slots, mask=mask, other=-1)
    is_key = (position >= 0) & (position < num_keys)
    page, place = split_row(position, page_size)
    if block_table_ptr is not None:
        # Compared before it is narrowed: 2**40 is not page 0.
        page = tl.load(block_table_ptr + batch * stride_t_b + page, mask=is_key, other=-1)
        is_key = (page >= 0) & (page < num_pages)
    found = page.to(tl.int64) * page_rows + place
    tl.store(rows_ptr + program * topk + slots, tl.where(is_key, found, -1).to(rows_ptr.dtype.element_ty), mask=mask)
