"""The adapter seam, question 2: what the tensors mean; every wrong answer is a typed error before any work."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import mla_ops
from mla_ops.adapters.seam import (
    MLALayerMeta,
    PackedSeq,
    SparseCall,
    normalize_call,
    plan_positions,
    resolve_layer_meta,
)
from mla_ops.errors import MLALayoutError
from mla_ops.ops.sparse_attn.reference import sparse_attn_reference

HUGGING_FACE = {
    "num_attention_heads": 4,
    "kv_lora_rank": 48,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 24,
}
META = resolve_layer_meta(HUGGING_FACE, form="absorbed")
EXPANDED = replace(META, form="expanded")
NO_ROPE = replace(META, qk_rope_head_dim=0)  # d_total == d_v
ODD_WIDTHS = replace(META, kv_lora_rank=72, qk_rope_head_dim=16)  # 88/72


# Question 2: results


def positions_of(shape: tuple[int, ...], seq_kv: int, generator: torch.Generator) -> torch.Tensor:
    """int64, unsorted, with repeats."""
    return torch.randint(0, seq_kv, shape, generator=generator)


def draw(meta: MLALayerMeta, batch: int, rows: int, topk: int = 6, kv_group: int = 1) -> tuple[torch.Tensor, ...]:
    """A call in fp64, batch first: query, key, value (None if absorbed) and causal indices with -1."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    width = meta.d_total if meta.form == "absorbed" else meta.k_channels
    query, key = normal(batch, rows, meta.heads, width), normal(batch, rows, kv_group, width)
    value = None if meta.form == "absorbed" else normal(batch, rows, kv_group, meta.v_channels)
    indices = positions_of((batch, rows, topk), rows, generator)
    causal = indices <= torch.arange(rows)[None, :, None]
    return query, key, value, indices.masked_fill(~causal, -1)


def permute(tensor: torch.Tensor | None, layout: str) -> torch.Tensor | None:
    if tensor is None:
        return None
    return {"bshd": tensor, "sbhd": tensor.transpose(0, 1), "bhsd": tensor.transpose(1, 2), "thd": tensor[0]}[layout]


def run(call: SparseCall) -> torch.Tensor:
    out, _ = mla_ops.sparse_attn(call.q, call.kv, call.indices, d_v=call.d_v, softmax_scale=call.softmax_scale)
    return call.restore(out)


def dense(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, indices: torch.Tensor, scale: float
) -> torch.Tensor:
    """Per-head attention over the listed keys, written without the operator: [B, S, H, v], fp64, repeats counted."""
    key, value = (t.repeat_interleave(query.shape[2] // t.shape[2], dim=2) for t in (key, value))
    count = torch.zeros(*indices.shape[:2], key.shape[1] + 1, dtype=torch.float64)
    count.scatter_add_(2, indices.long().remainder(key.shape[1] + 1), torch.ones_like(indices, dtype=torch.float64))
    count = count[:, None, :, :-1]  # -1 went to the extra column
    weights = count * torch.exp(scale * torch.einsum("bshd,bthd->bhst", query, key))
    weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-300)
    return torch.einsum("bhst,bthd->bshd", weights, value)


PACKED = PackedSeq(
    cu_seqlens_q=torch.tensor([0, 4, 10], dtype=torch.int32),
    cu_seqlens_kv=torch.tensor([0, 4, 10], dtype=torch.int32),
    max_seqlen_q=6,
    max_seqlen_kv=6,
)
ONE_SEGMENT = PackedSeq(
    cu_seqlens_q=torch.tensor([0, 10]), cu_seqlens_kv=torch.tensor([0, 10]), max_seqlen_q=10, max_seqlen_kv=10
)


@pytest.mark.parametrize("layout", ["bshd", "sbhd", "bhsd", "thd"])
@pytest.mark.parametrize("meta", [META, NO_ROPE, ODD_WIDTHS], ids=["56x48", "48x48", "88x72"])
def test_absorbed_layouts_agree_with_the_fp64_oracle(meta: MLALayerMeta, layout: str) -> None:
    query, key, _, indices = draw(meta, 1 if layout == "thd" else 3, 10)
    call = normalize_call(
        permute(query, layout),
        permute(key, layout),
        None,
        indices[0] if layout == "thd" else indices,
        meta=meta,
        layout=layout,
        packed=ONE_SEGMENT if layout == "thd" else None,
        invalid="sentinel",
    )
    assert call.indices.dtype == torch.int32
    assert call.q.data_ptr() == query.data_ptr()  # a view, whatever the layout
    expected, _ = sparse_attn_reference(query, key, indices.unsqueeze(2), meta.d_v, meta.softmax_scale)
    torch.testing.assert_close(run(call), permute(expected, layout), rtol=0, atol=1e-12)


@pytest.mark.parametrize("layout", ["bshd", "sbhd", "bhsd", "thd"])
@pytest.mark.parametrize("kv_group", [1, 2, 4])
def test_expanded_heads_agree_with_dense_attention(layout: str, kv_group: int) -> None:
    query, key, value, indices = draw(EXPANDED, 1 if layout == "thd" else 3, 10, kv_group=kv_group)
    tensors = [permute(t, layout) for t in (query, key, value)]
    call = normalize_call(
        *tensors,
        indices[0] if layout == "thd" else indices,
        meta=EXPANDED,
        layout=layout,
        packed=ONE_SEGMENT if layout == "thd" else None,
        invalid="sentinel",
    )
    expected = dense(query, key, value, indices, EXPANDED.softmax_scale)
    torch.testing.assert_close(run(call), permute(expected, layout), rtol=0, atol=1e-12)


def test_a_padded_value_comes_back_as_wide_as_it_was_given() -> None:
    meta = replace(EXPANDED, qk_nope_head_dim=24)  # k_channels 32, v_channels 24
    query, key, value, indices = draw(meta, 1, 10, kv_group=4)
    padded = torch.nn.functional.pad(value, (0, 8))
    options = {"meta": meta, "layout": "thd", "packed": ONE_SEGMENT, "invalid": "sentinel"}
    out = run(normalize_call(query[0], key[0], padded[0], indices[0], **options))
    assert out.shape == (10, 4, 32)
    assert not out[..., 24:].any()
    torch.testing.assert_close(out[..., :24], dense(query, key, value, indices, meta.softmax_scale)[0])
    with pytest.raises(MLALayoutError, match="its further columns are not the zeros that pad a packed batch"):
        normalize_call(query[0], key[0], padded[0] + 1, indices[0], **options)


@pytest.mark.parametrize("widths", [(2, 128, 64, 128, 512), (4, 16, 8, 24, 48)], ids=["deepseek", "small"])
def test_absorbed_and_expanded_agree_at_the_trained_scale_and_not_at_that_of_d_total(
    widths: tuple[int, int, int, int, int],
) -> None:
    heads, nope, rope, v, rank = widths
    meta = MLALayerMeta(
        heads=heads,
        kv_lora_rank=rank,
        qk_nope_head_dim=nope,
        qk_rope_head_dim=rope,
        v_head_dim=v,
        softmax_scale=(nope + rope) ** -0.5,
        form="absorbed",
    )
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    q_nope, q_rope = normal(1, 12, heads, nope), normal(1, 12, heads, rope)
    latent, k_rope = normal(1, 12, 1, rank), normal(1, 12, 1, rope)
    w_uk, w_uv = normal(heads, nope, rank) / rank**0.5, normal(heads, v, rank) / rank**0.5
    indices = torch.arange(12).expand(1, 12, 12).tril() + torch.full((12, 12), -1).triu(1)

    key = torch.cat(
        [torch.einsum("btgr,hnr->bthn", latent, w_uk), k_rope.expand(-1, -1, heads, -1)], dim=-1
    )  # per head, what absorption avoids
    value = torch.einsum("btgr,hvr->bthv", latent, w_uv)
    expected = dense(torch.cat([q_nope, q_rope], -1), key, value, indices, (nope + rope) ** -0.5)

    def absorbed(meta: MLALayerMeta) -> torch.Tensor:
        query = torch.cat([torch.einsum("bshn,hnr->bshr", q_nope, w_uk), q_rope], -1)
        rows = torch.cat([latent, k_rope], -1)
        out = run(normalize_call(query, rows, None, indices, meta=meta, layout="bshd", invalid="sentinel"))
        return torch.einsum("bshr,hvr->bshv", out, w_uv)

    torch.testing.assert_close(absorbed(meta), expected, rtol=0, atol=1e-12)
    wrong = absorbed(replace(meta, softmax_scale=meta.d_total**-0.5))
    assert (wrong - expected).abs().max() > 0.1


# Question 2: policies


@pytest.mark.parametrize("mask_form", ["bool", "additive", "additive-bf16", "broadcast", "4-D"])
def test_a_mask_is_gathered_at_the_indices(mask_form: str) -> None:
    generator = torch.Generator().manual_seed(1)
    query, key, _, _ = draw(META, 2, 10)
    indices = positions_of((2, 10, 6), 10, generator)  # future rows among them
    visible = torch.ones(2, 10, 10, dtype=torch.bool).tril()
    mask = {
        "bool": visible,
        "additive": torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min),
        "additive-bf16": torch.zeros(visible.shape, dtype=torch.bfloat16).masked_fill(~visible, -torch.inf),
        "broadcast": visible[:1],
        "4-D": visible.unsqueeze(1),
    }[mask_form]
    call = normalize_call(query, key, None, indices, meta=META, layout="bshd", invalid="mask", mask=mask)
    expected = indices.masked_fill(~visible.gather(2, indices), -1)
    assert torch.equal(call.indices, expected.to(torch.int32).unsqueeze(2))


def test_a_length_cuts_the_slots_behind_it_whatever_they_hold() -> None:
    query, key, _, _ = draw(META, 2, 10)
    indices = positions_of((2, 10, 6), 10, torch.Generator().manual_seed(1))
    length = torch.randint(0, 7, (2, 10), generator=torch.Generator().manual_seed(2))
    behind = torch.arange(6) >= length.unsqueeze(-1)
    garbage = indices.masked_fill(behind, 2**40)
    call = normalize_call(query, key, None, garbage, meta=META, layout="bshd", invalid="length", topk_length=length)
    assert torch.equal(call.indices.squeeze(2), indices.masked_fill(behind, -1).to(torch.int32))


@pytest.mark.parametrize("origin", ["global", "segment"])
def test_packed_segments_equal_separate_runs(origin: str) -> None:
    query, key, _, _ = draw(META, 1, 10)
    separate, packed_indices = [], []
    for start, end in ((0, 4), (4, 10)):
        _, _, _, indices = draw(META, 1, end - start, topk=5)
        options = {"meta": META, "layout": "bshd", "invalid": "sentinel"}
        separate.append(run(normalize_call(query[:, start:end], key[:, start:end], None, indices, **options))[0])
        packed_indices.append(indices[0] if origin == "segment" else torch.where(indices < 0, -1, indices + start)[0])
    call = normalize_call(
        query[0],
        key[0],
        None,
        torch.cat(packed_indices),
        meta=META,
        layout="thd",
        packed=PACKED,
        invalid="sentinel",
        origin=origin,
    )
    assert torch.equal(run(call), torch.cat(separate))


def test_gaps_between_segments_belong_to_no_sequence() -> None:
    padded = replace(
        PACKED,
        cu_seqlens_q=torch.tensor([0, 3, 7]),
        cu_seqlens_kv=torch.tensor([0, 3, 7]),
        cu_seqlens_q_padded=torch.tensor([0, 4, 10]),
        cu_seqlens_kv_padded=torch.tensor([0, 4, 10]),
    )
    query, key, _, _ = draw(META, 1, 10)
    indices = torch.full((10, 1), 2)
    options = {"meta": META, "layout": "thd", "packed": padded, "invalid": "sentinel", "origin": "segment"}
    call = normalize_call(query[0], key[0], None, indices, **options)
    assert call.indices.flatten().tolist() == [2, 2, 2, 2, 6, 6, 6, 6, 6, 6]
    with pytest.raises(MLALayoutError, match=r"is 3, outside its segment's rows \[0, 3\)"):
        normalize_call(query[0], key[0], None, indices + 1, **options)
    plan = plan_positions(META, "thd", 10, padded)
    assert plan.positions.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5]


def test_rows_of_a_long_gap_index_inside_the_rotary_table() -> None:
    bounds = torch.tensor([0, 8, 16])
    plan = plan_positions(META, "thd", 16, replace(PACKED, cu_seqlens_q_padded=bounds, cu_seqlens_kv_padded=bounds))
    assert plan.positions.tolist() == [*range(6), 5, 5, *range(6), 5, 5]
    assert torch.zeros(plan.freqs_shape)[plan.positions].shape == (16, 1, 8)


def test_unchecked_bad_indices_name_no_key() -> None:
    query, key, _, _ = draw(META, 1, 10)
    indices = torch.tensor([-2, 10, 2**31 + 3, 2**40, -(2**63), 5]).expand(1, 10, 6)
    options = {"meta": META, "layout": "bshd", "invalid": "sentinel"}
    call = normalize_call(query, key, None, indices, check=False, **options)
    assert call.indices[0, 0, 0].tolist() == [-1, -1, -1, -1, -1, 5]
    with pytest.raises(
        MLALayoutError, match=r"indices\[0, 0, 0, 0\] is -2, outside the 10 rows of key and not -1 \(50"
    ):
        normalize_call(query, key, None, indices, **options)


def test_unchecked_totals_never_index_past_the_last_segment() -> None:
    query, key, _, _ = draw(META, 1, 10)
    short = replace(PACKED, cu_seqlens_q=torch.tensor([0, 4, 8]), cu_seqlens_kv=torch.tensor([0, 4, 8]))
    options = {"meta": META, "layout": "thd", "packed": short, "invalid": "sentinel", "check": False}
    call = normalize_call(query[0], key[0], None, torch.arange(10).unsqueeze(1), **options)
    assert call.indices.flatten().tolist() == [*range(8), -1, -1]


def test_a_group_list_differs_from_a_shared_one() -> None:
    meta = replace(META, kv_group=2)
    query, key, _, indices = draw(meta, 2, 10, kv_group=2)
    options = {"meta": meta, "layout": "bshd", "invalid": "sentinel"}
    shared = normalize_call(query, key, None, indices, **options)
    assert torch.equal(shared.indices[:, :, 0], shared.indices[:, :, 1])
    per_group = torch.stack([indices, indices.flip(1).clamp_min(-1)], dim=2)
    call = normalize_call(query, key, None, per_group, **options)
    assert torch.equal(call.indices, per_group.to(torch.int32))


def test_gradients_reach_the_callers_tensors() -> None:
    query, key, value, indices = draw(EXPANDED, 2, 10, kv_group=4)
    leaves = [t.transpose(0, 1).contiguous().requires_grad_() for t in (query, key, value)]
    run(normalize_call(*leaves, indices, meta=EXPANDED, layout="sbhd", invalid="sentinel")).square().sum().backward()
    reference = [t.clone().requires_grad_() for t in (query, key, value)]
    dense(*reference, indices, EXPANDED.softmax_scale).square().sum().backward()
    for ours, theirs in zip(leaves, reference, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad.transpose(0, 1), rtol=0, atol=1e-11)


@pytest.mark.parametrize("fake", [False, True], ids=["meta", "fake"])
def test_nothing_is_read_where_there_is_nothing_to_read(fake: bool) -> None:
    with FakeTensorMode() if fake else torch.device("meta"):
        query, key, indices = torch.empty(10, 4, 56), torch.empty(10, 1, 56), torch.empty(10, 6, dtype=torch.int64)
        cu_seqlens = torch.zeros(2, dtype=torch.int64)  # with values, a total that would be refused
        packed = PackedSeq(cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens, max_seqlen_q=5, max_seqlen_kv=5)
        options = {"meta": META, "layout": "thd", "packed": packed, "invalid": "sentinel"}
        assert normalize_call(query, key, None, indices, **options).indices.shape == (1, 10, 1, 6)
        assert plan_positions(META, "thd", 10, packed).positions.shape == (10,)


def some_policy(policy: str, rows: int) -> dict[str, Any]:
    """A call with bad indices under one policy, on the CPU."""
    generator = torch.Generator().manual_seed(rows)
    query, key = torch.randn(2, rows, 4, 56), torch.randn(2, rows, 1, 56)
    indices = torch.randint(-3, rows + 3, (2, rows, 6), generator=generator)
    call = {"query": query, "key": key, "indices": indices, "layout": "bshd", "invalid": policy}
    if policy == "mask":
        call["mask"] = torch.rand(2, rows, rows, generator=generator) < 0.5
    elif policy == "length":
        call["topk_length"] = torch.randint(0, 7, (2, rows), generator=generator)
    elif policy in ("global", "segment"):
        cu_seqlens = torch.tensor([0, 4, rows])
        packed = PackedSeq(cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens, max_seqlen_q=rows, max_seqlen_kv=rows)
        call = {"query": query[0], "key": key[0], "indices": indices[0], "layout": "thd"}
        call |= {"packed": packed, "invalid": "sentinel", "origin": policy}
    return call


POLICIES = ["sentinel", "mask", "length", "global", "segment"]


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("policy", POLICIES)
def test_one_graph_per_policy_reads_nothing_and_drops_bad_indices(policy: str) -> None:
    def canonical(**arguments: Any) -> torch.Tensor:
        return normalize_call(**arguments, value=None, meta=META).indices

    compiled = torch.compile(canonical, fullgraph=True, dynamic=True, backend="eager")
    for rows in (10, 13, 18):
        call = some_policy(policy, rows)
        with pytest.raises(MLALayoutError, match="outside"):
            canonical(**call)
        assert torch.equal(compiled(**call), canonical(**call, check=False))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.gpu
@pytest.mark.parametrize("policy", POLICIES)
def test_a_captured_call_reads_nothing_and_replays_other_indices(policy: str) -> None:
    calls = []
    for rows in (10, 10):
        call = some_policy(policy, rows)
        if calls:
            call["indices"] = call["indices"].flip(-2)
        packed = call.get("packed")
        if packed is not None:
            cu_seqlens = packed.cu_seqlens_q.cuda()
            call["packed"] = replace(packed, cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens)
        calls.append({name: t.cuda() if isinstance(t, torch.Tensor) else t for name, t in call.items()})

    def result(call: dict[str, Any], **options: Any) -> torch.Tensor:
        return run(normalize_call(**call, **options, value=None, meta=META))

    result(calls[0], check=False)  # compiles the kernel
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = result(calls[0])  # with its bad indices: a check would read them, and break the capture
    for call in calls:
        calls[0]["indices"].copy_(call["indices"])
        graph.replay()
        torch.testing.assert_close(out, result(calls[0], check=False))


# Question 2: the broken forms of a packed batch, each refused before a rotary call or a kernel


def thd_call(**change: Any) -> SparseCall:
    query, key, _, indices = draw(META, 1, 10)
    indices = torch.where(indices // 4 == torch.arange(10)[None, :, None] // 4, indices, -1)
    arguments = {"query": query[0], "key": key[0], "indices": indices[0], "layout": "thd", "packed": PACKED} | change
    return normalize_call(**arguments, value=None, meta=META, invalid="sentinel", check=True)


def test_packed_hidden_states_with_a_batch_dimension_are_refused() -> None:
    query = draw(META, 2, 10)[0].transpose(0, 1)
    with pytest.raises(
        MLALayoutError, match=r"'thd' needs query \[t, heads, d_total\], got 4-D \[10, 2, 4, 56\]; a packed"
    ):
        thd_call(query=query)
    with pytest.raises(MLALayoutError, match="a packed batch has no batch dimension, got batch=2"):
        plan_positions(META, "thd", 10, PACKED, batch=2)


def test_a_packed_batch_without_a_stated_layout_is_refused() -> None:
    for refuse in (lambda: thd_call(layout=None), lambda: plan_positions(META, None, 10, PACKED)):
        with pytest.raises(MLALayoutError, match="layout must be one of 'bshd', 'sbhd', 'bhsd', 'thd', got None"):
            refuse()


def test_a_packed_sequence_in_a_batched_layout_is_refused() -> None:
    query, key, _, indices = draw(META, 1, 10)
    batched = {"query": query.transpose(0, 1), "key": key.transpose(0, 1), "indices": indices, "layout": "sbhd"}
    for refuse in (lambda: thd_call(**batched), lambda: plan_positions(META, "sbhd", 10, PACKED)):
        with pytest.raises(MLALayoutError, match="a packed sequence came with layout 'sbhd'"):
            refuse()
    with pytest.raises(MLALayoutError, match="layout 'thd' needs its PackedSeq, got none"):
        thd_call(packed=None)


@pytest.mark.parametrize("name", ["max_seqlen_q", "max_seqlen_kv"])
def test_a_packed_sequence_without_its_longest_length_is_refused(name: str) -> None:
    with pytest.raises(MLALayoutError, match=f"{name}=None, needs an int: without it the length of the rotary table"):
        replace(PACKED, **{name: None})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cu_seqlens_q": torch.tensor([0, 4, 12])}, "cu_seqlens_q ends at 12 but query has 10 rows"),
        ({"cu_seqlens_q": torch.tensor([1, 4, 10])}, r"cu_seqlens_q must start at 0 and never fall, got \[1, 4, 10\]"),
        ({"cu_seqlens_q": torch.tensor([0, 11, 10])}, "must start at 0 and never fall"),
        ({"max_seqlen_q": 5}, "max_seqlen_q is 5 but the longest segment has 6 rows"),
        (
            {"cu_seqlens_q_padded": torch.tensor([0, 3, 10])},
            r"cu_seqlens_q_padded leaves too little room: lengths \[4, 6\], starts \[0, 3\]",
        ),
    ],
)
def test_totals_that_do_not_describe_the_rows_are_refused(change: dict[str, Any], message: str) -> None:
    packed = replace(PACKED, **change)
    for refuse in (lambda: thd_call(packed=packed), lambda: plan_positions(META, "thd", 10, packed)):
        with pytest.raises(MLALayoutError, match=message):
            refuse()


def test_totals_on_another_device_than_the_indices_are_refused() -> None:
    elsewhere = torch.zeros(3, dtype=torch.int32, device="meta")
    with pytest.raises(MLALayoutError, match=r"cu_seqlens must be on the device of indices \(cpu\), got meta"):
        thd_call(packed=replace(PACKED, cu_seqlens_q=elsewhere, cu_seqlens_kv=elsewhere))


def test_key_totals_are_held_against_the_key() -> None:
    with pytest.raises(MLALayoutError, match="cu_seqlens_kv ends at 9 but key has 10 rows"):
        thd_call(packed=replace(PACKED, cu_seqlens_kv=torch.tensor([0, 4, 9])))


def test_a_rotary_embedding_from_the_generic_builder_is_refused() -> None:
    with pytest.raises(MLALayoutError, match="rotary_pos_emb was passed to an MLA layer"):
        plan_positions(META, "thd", 10, PACKED, rotary_pos_emb=torch.zeros(10, 1, 1, 8))


def test_a_rotary_table_that_spans_the_wrong_rows_is_refused() -> None:
    plan = plan_positions(META, "thd", 10, PACKED)
    assert (plan.rotary_len, plan.freqs_shape) == (6, (6, 1, 8))
    plan.check_freqs(torch.zeros(6, 1, 8))
    with pytest.raises(MLALayoutError, match=r"rotary table has shape \(10, 1, 8\), planned is \(6, 1, 8\)"):
        plan.check_freqs(torch.zeros(10, 1, 8))
    half = plan_positions(META, "thd", 5, PACKED, cp_size=2)  # this rank's share of the rows, the whole table
    assert (half.rotary_len, half.positions) == (6, None)
    with pytest.raises(MLALayoutError, match="nor one rank's share of them"):
        half.check_freqs(torch.zeros(3, 1, 8))


def test_a_batch_of_gaps_alone_still_reads_its_table() -> None:
    nothing, gaps = torch.zeros(3, dtype=torch.int32), torch.tensor([0, 4, 10], dtype=torch.int32)
    packed = PackedSeq(
        cu_seqlens_q=nothing,
        cu_seqlens_kv=nothing,
        max_seqlen_q=0,
        max_seqlen_kv=0,
        cu_seqlens_q_padded=gaps,
        cu_seqlens_kv_padded=gaps,
    )
    plan = plan_positions(META, "thd", 10, packed)
    assert (plan.rotary_len, plan.freqs_shape) == (1, (1, 1, 8))
    assert plan.positions.tolist() == [0] * 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cu_seqlens_q": [0, 4, 10]}, "cu_seqlens_q must be an int32 or int64 tensor, got list"),
        (
            {"cu_seqlens_kv": torch.tensor([0.0, 10.0])},
            "cu_seqlens_kv must be an int32 or int64 tensor, got torch.float",
        ),
        ({"cu_seqlens_kv": torch.tensor([0, 10])}, r"as long as cu_seqlens_q, got \[2\] and \[3\]"),
        ({"cu_seqlens_kv": torch.zeros(3, dtype=torch.int32, device="meta")}, "on the device of cu_seqlens_q"),
        ({"max_seqlen_q": True}, "max_seqlen_q=True, needs an int"),
    ],
)
def test_impossible_packed_sequences_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(MLALayoutError, match=message):
        replace(PACKED, **change)


@pytest.mark.parametrize(
    ("layout", "shape"), [("bshd", (1, 10, 1, 8)), ("sbhd", (10, 1, 1, 8)), ("bhsd", (1, 1, 10, 8))]
)
def test_a_rotary_table_broadcasts_against_a_query_of_its_layout(layout: str, shape: tuple[int, ...]) -> None:
    plan = plan_positions(META, layout, 10, batch=3)
    assert plan.freqs_shape == shape
    assert plan.positions.tolist() == list(range(10))
    query = permute(draw(META, 3, 10)[0], layout)[..., -8:]
    assert (query * torch.zeros(plan.freqs_shape)).shape == query.shape
    assert plan_positions(META, layout, 10, cp_size=4).rotary_len == 40


# Question 2: other refusals


def bshd_call(**change: Any) -> SparseCall:
    meta = change.pop("meta", META)
    query, key, value, indices = draw(meta, 2, 10)
    arguments = {"query": query, "key": key, "value": value, "indices": indices, "layout": "bshd"}
    return normalize_call(**(arguments | {"invalid": "sentinel"} | change), meta=meta)


BSHD_MASK = torch.ones(2, 10, 10, dtype=torch.bool)
REFUSALS = [
    ({"layout": "bhsd"}, r"query has 10 heads, the layer's heads are 4; layout 'bhsd' is \[b, heads, s, width\]"),
    ({"query": torch.zeros(10, 4, 56)}, r"'bshd' needs query \[b, s, heads, d_total\], got 3-D \[10, 4, 56\]"),
    (
        {"key": torch.zeros(2, 10, 4, 56)},
        r"key has 4 heads but the layer's latent rows are shared .* kv_group=1 groups",
    ),
    ({"key": torch.zeros(2, 10, 1, 48)}, r"key must be 56 wide \(d_total = kv_lora_rank \+ qk_rope_head_dim\)"),
    ({"key": torch.zeros(1, 10, 1, 56)}, "query and key have batch 2 and 1"),
    ({"value": torch.zeros(2, 10, 1, 48)}, "value must be None in the absorbed form"),
    ({"meta": EXPANDED, "value": None}, "the expanded form needs a value"),
    ({"meta": EXPANDED, "value": torch.zeros(2, 10, 4, 24)}, "value must be key but for its width"),
    ({"meta": EXPANDED, "value": torch.zeros(2, 10, 1, 20)}, r"value must be v_channels \(24\) wide"),
    (
        {"meta": replace(EXPANDED, v_head_dim=32), "value": torch.zeros(2, 10, 1, 24)},
        r"value must be v_channels \(32\) wide, got 24; pass the value as wide as the layer's v_head_dim",
    ),
    ({"meta": EXPANDED, "key": torch.zeros(2, 10, 3, 24)}, "must be a multiple of the key's heads, got 3"),
    ({"indices": torch.zeros(2, 10, 6)}, "indices must be int32 or int64, got torch.float32"),
    ({"indices": torch.zeros(10, 2, 6, dtype=torch.int32)}, r"batch first, whatever the layout of query"),
    ({"indices": torch.zeros(2, 10, 4, 6, dtype=torch.int32)}, r"indices must be \[b, s, K\] or \[b, s, 1, K\]"),
    ({"invalid": "none"}, "invalid must be one of 'sentinel', 'mask', 'length', got 'none'"),
    ({"invalid": "mask"}, "invalid='mask' but mask was not"),
    ({"mask": BSHD_MASK}, "invalid='sentinel' but mask was passed"),
    ({"topk_length": torch.zeros(2, 10)}, "invalid='sentinel' but topk_length was passed"),
    ({"invalid": "length", "topk_length": torch.zeros(2, 10)}, r"topk_length must be integer \[2, 10\]"),
    ({"invalid": "mask", "mask": BSHD_MASK.int()}, "mask must be bool"),
    ({"invalid": "mask", "mask": BSHD_MASK[:, None].expand(2, 4, 10, 10)}, "cannot express a mask per head"),
    ({"invalid": "mask", "mask": torch.full((2, 10, 10), -1.5)}, "mask adds finite biases"),
    ({"origin": "row"}, "origin must be one of 'global', 'segment', got 'row'"),
    ({"origin": "segment"}, "origin='segment' counts rows from a segment's start and needs a packed sequence"),
]


@pytest.mark.parametrize(("change", "message"), REFUSALS, ids=[message[:40] for _, message in REFUSALS])
def test_disagreements_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(MLALayoutError, match=message):
        bshd_call(**change)


@pytest.mark.parametrize(
    ("row", "index", "origin", "message"),
    [
        (5, 3, "global", r"indices\[0, 5, 0, 0\] is 3, outside its segment's rows \[4, 10\) \(origin='global'\)"),
        (2, 4, "global", r"indices\[0, 2, 0, 0\] is 4, outside its segment's rows \[0, 4\)"),
        (2, 4, "segment", r"indices\[0, 2, 0, 0\] is 4, outside its segment's rows \[0, 4\) \(origin='segment'\)"),
        (5, -2, "segment", r"indices\[0, 5, 0, 0\] is -2, outside"),
    ],
)
def test_an_index_of_another_segment_is_refused(row: int, index: int, origin: str, message: str) -> None:
    query, key, _, _ = draw(META, 1, 10)
    indices = torch.full((10, 2), -1)
    indices[row, 0] = index
    options = {"meta": META, "layout": "thd", "packed": PACKED, "invalid": "sentinel", "origin": origin}
    with pytest.raises(MLALayoutError, match=message):
        normalize_call(query[0], key[0], None, indices, **options)
    call = normalize_call(query[0], key[0], None, indices, check=False, **options)
    assert (call.indices == -1).all()  # unread, it is never used either


def test_more_rows_than_int32_counts_are_refused() -> None:
    key = torch.empty(1, device="meta").expand(2, 2**31, 1, 56)
    query, indices = torch.empty(2, 10, 4, 56, device="meta"), torch.empty(2, 10, 6, dtype=torch.int64, device="meta")
    with pytest.raises(MLALayoutError, match=r"key must have fewer than 2\*\*31 rows"):
        bshd_call(query=query, key=key, indices=indices)
