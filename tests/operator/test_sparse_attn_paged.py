"""Attention to a pool of pages: the contract's semantics on every target, and the rest of torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import Target
from no_host_reads import NoHostReads
from paged_pools import PagedCase, PagedInputs, make_paged_inputs
from torch.utils.flop_counter import FlopCounterMode

import mla_ops
from mla_ops.ops.sparse_attn_paged.call import SparseAttnPagedCall
from mla_ops.reference import sparse_attn_paged_reference
from mla_ops.testing.closeness import assert_forward_bars

pytestmark = pytest.mark.usefixtures("poisoned_memory")

FORMATS = ["dense", "fp8", "fp8_all", "fp8_cache", "model1", "mxfp8"]
WIDTHS = [(576, 512), (512, 512), (320, 256), (128, 64), (72, 64), (100, 96)]
SMALL = PagedCase("fp8", 128, 64, topk=9)


def has_rows(name: str, d_total: int) -> bool:
    return name not in ("model1", "mxfp8") or (d_total % 16 == 0 and d_total > 64)


def run(call: SparseAttnPagedCall, target: Target, **changes: Any) -> mla_ops.SparseAttnOutput:
    arguments = {**call._asdict(), "backend": target.backend, **changes}
    tensors = [arguments.pop(name) for name in ("q", "pages", "indices")]
    return mla_ops.sparse_attn_paged(*tensors, **arguments)


def assert_same(one: mla_ops.SparseAttnOutput, other: mla_ops.SparseAttnOutput) -> None:
    assert torch.equal(one.out, other.out)
    assert torch.equal(one.lse, other.lse)


def check(inputs: PagedInputs, target: Target, lse_error: float = 1e-5) -> mla_ops.SparseAttnOutput:
    """Hold both ways to name rows to the answer and to one another."""
    by_row = run(inputs.by_row, target)
    assert by_row.out.dtype == inputs.by_row.q.dtype
    assert by_row.lse.dtype == torch.float32
    assert by_row.out.is_contiguous()
    assert_forward_bars(*by_row, inputs.out, inputs.lse, lse_error=lse_error)
    if inputs.by_row.row_format != "dense" or target.backend == "eager" or target.device == "cpu":
        assert_same(by_row, run(inputs.by_table, target))
    else:  # dense rows by number may be run by the kernels of sparse_attn
        assert_forward_bars(*run(inputs.by_table, target), inputs.out, inputs.lse)
    return by_row


@pytest.mark.parametrize(
    ("name", "d_total", "d_v"), [(name, *widths) for name in FORMATS for widths in WIDTHS if has_rows(name, widths[0])]
)
def test_matches_oracle(name: str, d_total: int, d_v: int, target: Target) -> None:
    # Every row that is no key is NaN in every byte, the pages are padded, a table is -1 in part.
    check(make_paged_inputs(PagedCase(name, d_total, d_v, padded_rows=1), target.device), target)


@pytest.mark.parametrize("rule", ["pow2", "any"])
@pytest.mark.parametrize(
    "case",
    [
        PagedCase("fp8", 576, 512, heads=28, kv_group=2, dtype=torch.float16, index_dtype=torch.int64),
        PagedCase("fp8_all", 128, 64, heads=1, topk=1, has_lengths=False, has_sink=False),
        PagedCase("fp8_cache", 128, 64, heads=6, kv_group=3, softmax_scale=-0.7),
    ],
    ids=str,
)
def test_heads_groups_dtypes_and_scales(case: PagedCase, rule: Any, target: Target) -> None:
    check(make_paged_inputs(case, target.device), target)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_dense_rows_of_any_float(dtype: torch.dtype, target: Target) -> None:
    if target == Target("cuda", "auto"):
        pytest.skip("no kernel multiplies wide floats from pages; the refusal says so")
    inputs = make_paged_inputs(PagedCase("dense", 72, 64, dtype=dtype), target.device)
    result = check(inputs, target)
    assert_forward_bars(*result, inputs.out, inputs.lse, lse_error=1e-6)


def test_the_definition_says_what_the_pool_was_made_of() -> None:
    for name in FORMATS:
        inputs = make_paged_inputs(PagedCase(name, 128, 64, topk=9))
        for call in (inputs.by_row, inputs.by_table):
            out, lse = sparse_attn_paged_reference(*call)
            torch.testing.assert_close(out, inputs.out, rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(lse, inputs.lse, rtol=1e-9, atol=1e-12)


# 2, 6. Which slots are keys; the same bits whatever the pages are


@pytest.mark.parametrize("name", ["fp8", "fp8_cache", "dense"])
def test_page_size_does_not_change_a_bit(name: str, target: Target) -> None:
    """A pool in one piece, cut into pages of several sizes: the row numbers stay, the tables change."""
    inputs = make_paged_inputs(PagedCase(name, 128, 64, num_pages=10, page_size=64, topk=31), target.device)
    call = inputs.by_row
    flat = call.pages.flatten(0, 1)
    num_rows = 53 * 12  # below every pool that is cut
    rows = torch.where(call.indices < num_rows, call.indices, -1)
    expected = run(call._replace(indices=rows, pages=flat[:num_rows].view(12, 53, 1, -1)), target)
    for page_size in (1, 2, 64, 69, 318):
        num_pages = -(-num_rows // page_size)
        pool = flat.new_zeros(num_pages, page_size + 1, 1, flat.shape[-1])  # every page padded by a row
        pages = pool[:, :page_size]
        whole = torch.nn.functional.pad(flat[:num_rows].view(torch.uint8), (0, 0, 0, 0, 0, num_pages * page_size))
        pages.copy_(whole[: num_pages * page_size].view(flat.dtype).view_as(pages))
        by_number = run(call._replace(indices=rows, pages=pages), target)
        # Position p is row p: each request has all pages, in order.
        table = torch.arange(num_pages, device=target.device).expand(call.q.shape[0], -1)
        by_table = run(call._replace(indices=rows, pages=pages, block_table=table), target)
        for result in (by_number, by_table):
            if name == "dense" and target == Target("cuda", "auto"):
                torch.testing.assert_close(result.lse, expected.lse)
            else:
                assert_same(result, expected)


def test_what_is_no_key(target: Target) -> None:
    inputs = make_paged_inputs(SMALL, target.device)
    call = inputs.by_row._replace(topk_length=None, attn_sink=None)
    num_rows = 6 * 53
    slots = [-1, -2, num_rows, num_rows + 1, 2**31 - 1, -(2**31), 0, 2, -7]
    call.indices[:] = torch.tensor(slots, device=target.device)
    alone = run(call._replace(indices=call.indices[..., 6:8].contiguous()), target)
    torch.testing.assert_close(run(call, target).lse, alone.lse)
    wide = call.indices.long()
    wide[wide == num_rows] = 2**40 + 2  # whose lower 32 bits name a row
    torch.testing.assert_close(run(call._replace(indices=wide), target).lse, alone.lse)


def empty(call: SparseAttnPagedCall) -> list[SparseAttnPagedCall]:
    """Return calls in which no slot is a key."""
    table, lens = call.block_table, call.seq_lens
    assert table is not None
    assert lens is not None
    return [
        call._replace(block_table=torch.full_like(table, -1)),
        call._replace(block_table=torch.full_like(table, 6)),
        call._replace(block_table=torch.full_like(table, 2**31 - 1)),
        call._replace(seq_lens=torch.zeros_like(lens)),
        call._replace(seq_lens=torch.full_like(lens, -3)),
        call._replace(block_table=table[:, :0]),
        call._replace(indices=call.indices[..., :0]),
        call._replace(topk_length=torch.zeros(2, 2, dtype=torch.int32, device=lens.device)),
        call._replace(pages=call.pages[:0]),
    ]


@pytest.mark.parametrize("which", range(9))
def test_a_query_without_a_key_is_the_neutral_element(which: int, target: Target) -> None:
    out, lse = run(empty(make_paged_inputs(SMALL, target.device).by_table)[which], target)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()


def test_seq_lens_beyond_the_table_and_none_at_all_are_the_same(target: Target) -> None:
    call = make_paged_inputs(SMALL, target.device).by_table
    beyond = call._replace(seq_lens=torch.full_like(call.seq_lens, 2**31 - 1))
    assert_same(run(beyond, target), run(call._replace(seq_lens=None), target))


@pytest.mark.parametrize("part", ["code", "scale", "tail"])
def test_a_selected_row_that_is_nan_gives_nan(part: str, target: Target) -> None:
    call = make_paged_inputs(SMALL, target.device).by_row._replace(topk_length=None)
    call.indices[:] = 4
    call.indices[1] = 2
    place = {"code": 3, "scale": slice(64, 68), "tail": slice(80, 82)}[part]
    call.pages[0, 4, 0, place] = 0x7F if part == "code" else 0xFF
    out, lse = run(call, target)
    assert out[0].isnan().all() if part != "code" else out[0, ..., 3].isnan().all()
    assert lse[0].isnan().all()
    assert lse[1].isfinite().all()


def test_the_host_reads_no_data(target: Target) -> None:
    inputs = make_paged_inputs(SMALL, target.device)
    with NoHostReads():
        run(inputs.by_table, target)
        run(inputs.by_row, target)


def test_strides_of_other_tensors_do_not_matter(target: Target) -> None:
    call = make_paged_inputs(SMALL, target.device).by_table
    twin = call._replace(
        q=call.q.transpose(1, 2).contiguous().transpose(1, 2),
        indices=call.indices.mT.contiguous().mT,
        block_table=torch.stack([call.block_table, call.block_table], -1)[..., 0],
        seq_lens=torch.stack([call.seq_lens, call.seq_lens], -1)[..., 0],
    )
    assert_same(run(call, target), run(twin, target))


def test_without_batch(target: Target) -> None:
    call = make_paged_inputs(SMALL, target.device).by_row
    whole = run(call, target)
    one = run(call._replace(q=call.q[0], indices=call.indices[0], topk_length=call.topk_length[0]), target)
    assert_same(one, mla_ops.SparseAttnOutput(whole.out[0], whole.lse[0]))


def test_rows_that_append_rows_wrote(target: Target) -> None:
    if target == Target("cuda", "eager"):
        pytest.skip("rows are written by the same backend as in the target cuda-triton")
    latent = torch.randn(40, 1, 128, device=target.device).to(torch.bfloat16)
    pages = torch.full((6, 8, 1, 208), 0xFF, dtype=torch.uint8, device=target.device)
    rows = torch.randperm(48, device=target.device)[:40]
    mla_ops.append_rows(latent, rows, pages, d_v=64, row_format="fp8")
    numbers = mla_ops.read_rows(
        pages, torch.arange(48, device=target.device), d_total=128, d_v=64, row_format="fp8", dtype=torch.bfloat16
    )
    q = torch.randn(3, 16, 128, device=target.device).to(torch.bfloat16)
    indices = rows[torch.randint(40, (3, 1, 20), device=target.device)]
    options = {"d_v": 64, "softmax_scale": 0.1}
    paged = mla_ops.sparse_attn_paged(q, pages, indices, row_format="fp8", **options)
    # Scales are powers of two, so that the rows are exact in bf16.
    dense = mla_ops.sparse_attn(q, numbers, indices, **options)
    torch.testing.assert_close(paged.lse, dense.lse, rtol=3.1e-5, atol=1e-5)
    torch.testing.assert_close(paged.out, dense.out, rtol=2.4e-2, atol=8e-4)


# 7. The rest of torch


@pytest.mark.parametrize("name", ["q", "attn_sink"])
def test_a_gradient_is_refused_and_never_dropped(name: str) -> None:
    call = make_paged_inputs(SMALL).by_row
    call = call._replace(**{name: getattr(call, name).clone().requires_grad_()})
    message = rf"sparse_attn_paged is not differentiable and {name} requires grad; .*no_grad\(\), or train with"
    with pytest.raises(mla_ops.NotDifferentiableError, match=message):
        run(call, Target("cpu", "auto"))
    with torch.no_grad():
        assert not run(call, Target("cpu", "auto")).out.requires_grad
    with pytest.raises(mla_ops.ForwardModeError, match="paged is not differentiable, an argument with a tangent"):
        torch.func.jvp(
            lambda q: run(call._replace(q=q, attn_sink=None), Target("cpu", "auto")).out,
            (call.q.detach(),),
            (call.q.detach(),),
        )


def test_autocast_casts_q_to_dense_rows_and_never_a_pool() -> None:
    inputs = make_paged_inputs(PagedCase("dense", 72, 64, topk=9))
    target = Target("cpu", "auto")
    expected = run(inputs.by_row, target)
    wide = inputs.by_row._replace(q=inputs.by_row.q.float())
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(run(wide, target), expected)
    # Beside bytes q says how a tail is read; beside other floats there is nothing to follow.
    bytes_call = make_paged_inputs(SMALL).by_row
    with torch.autocast("cpu", torch.float16):
        assert run(bytes_call, target).out.dtype == torch.bfloat16
        with pytest.raises(mla_ops.InvalidInputError, match="pages must be float32"):
            run(wide, target)


@pytest.mark.parametrize("has_table", [False, True])
@pytest.mark.parametrize("batched_sink", [False, True])
def test_vmap_is_a_loop(has_table: bool, batched_sink: bool) -> None:
    calls = [
        (inputs.by_table if has_table else inputs.by_row)
        for inputs in (make_paged_inputs(SMALL, seed=seed) for seed in range(3))
    ]
    first, target = calls[0], Target("cpu", "auto")
    names = ["q", "indices", "topk_length"] + (["block_table", "seq_lens"] if has_table else [])
    names += ["attn_sink"] if batched_sink else []

    def attend(*tensors: torch.Tensor) -> mla_ops.SparseAttnOutput:
        return run(first._replace(**dict(zip(names, tensors, strict=True))), target)

    stacked = [torch.stack([getattr(call, name) for call in calls]) for name in names]
    together = torch.vmap(attend)(*stacked)
    for i, call in enumerate(calls):
        one = attend(*(getattr(call, name) for name in names))
        torch.testing.assert_close(together[0][i], one.out)
        torch.testing.assert_close(together[1][i], one.lse)
    with pytest.raises(mla_ops.InvalidInputError, match="pages has a vmapped dimension, a pool is shared"):
        torch.vmap(lambda pages: run(first._replace(pages=pages), target))(torch.stack([first.pages] * 2))


def test_flops_are_those_of_the_products() -> None:
    call = make_paged_inputs(SMALL).by_row
    with FlopCounterMode(display=False) as counter:
        run(call, Target("cpu", "auto"))
    assert counter.get_total_flops() == 2 * (2 * 2 * 4) * 9 * (128 + 64)


def test_explain_and_warmup(target: Target) -> None:
    call = make_paged_inputs(SMALL, target.device).by_table
    arguments = {**call._asdict(), "backend": target.backend}
    tensors = [arguments.pop(name) for name in ("q", "pages", "indices")]
    decision = mla_ops.explain_sparse_attn_paged(*tensors, **arguments)
    assert decision.backend is not None
    assert "row_format=fp8 block_table=yes" in str(decision)
    assert decision.launch
    call.pages.fill_(0xFF)  # which a call that reads a row would show
    mla_ops.warmup_sparse_attn_paged(*tensors, **arguments)


@pytest.mark.parametrize("make", [lambda i: i.by_row, lambda i: i.by_table], ids=["rows", "table"])
def test_opcheck(make: Callable[[PagedInputs], SparseAttnPagedCall]) -> None:
    call = make(make_paged_inputs(PagedCase("fp8", 72, 64, topk=5)))
    torch.library.opcheck(torch.ops.mla.sparse_attn_paged.default, tuple(call))


def test_a_page_whose_row_numbers_wrap_around_is_no_page() -> None:
    call = make_paged_inputs(SMALL).by_table
    inverse = pow(SMALL.page_size, -1, 2**64)
    # Times the page size, modulo 2^64, it is the number of a row.
    page = next(page for k in range(1, 9) if (page := k * inverse % 2**64) < 2**63)
    out, lse = run(call._replace(block_table=torch.full_like(call.block_table.long(), page)), Target("cpu", "auto"))
    assert (out == 0).all()
    assert (lse == -torch.inf).all()
