"""Megatron's core attention on the operator, called as its layers call it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mla_ops.adapters.megatron import SparseMLACoreAttention, adapt_spec
from mla_ops.errors import (
    MLALayoutError,
    MLAMetadataError,
    UnsupportedFeatureError,
)

pytest.importorskip("megatron.core", reason="megatron-core is not installed: pip install 'mla_ops[megatron]'")
from megatron.core.transformer.enums import AttnMaskType
from tiny_megatron import (
    BATCH,
    CURRENT_DEVICE,
    HIDDEN,
    ROWS,
    VERSION,
    assert_same,
    build,
    core_attention,
    dense_spec,
    every_row_but,
    hidden_states,
    layer_spec,
    make_config,
    megatron,
    packed_params,
    run,
)

__all__ = ["megatron"]  # a fixture of every test here


# The core attention


def draw(rows: int = ROWS) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(rows, BATCH, 4, width, generator=generator, dtype=torch.float64) for width in (32, 32, 24))
    return q, k, v


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """Plain attention in fp64 with True hidden: [s, b, heads * v]."""
    logits = torch.einsum("sbhd,tbhd->bhst", q, k) * 32**-0.5
    weights = logits.masked_fill(hidden, -torch.inf).softmax(-1).nan_to_num()
    return torch.einsum("bhst,tbhd->sbhd", weights, v).flatten(-2)


def test_chosen_rows_are_attended_and_later_ones_dropped() -> None:
    q, k, v = draw()
    chosen = torch.randint(-1, ROWS, (BATCH, ROWS, 4), generator=torch.Generator().manual_seed(3))
    chosen[0, 6] = -1  # a row without keys
    seen = {}

    def index_fn(**given: Any) -> torch.Tensor:
        seen.update(given)
        return chosen

    core = core_attention(index_fn=index_fn)
    x, qr = torch.randn(ROWS, BATCH, HIDDEN), torch.randn(ROWS, BATCH, 32)
    out = core(q, k, v, None, x=x, qr=qr)
    counts = torch.zeros(BATCH, ROWS, ROWS + 1).scatter_add_(2, chosen % (ROWS + 1), torch.ones(chosen.shape))
    counts = counts[..., :-1].tril()
    logits = torch.einsum("sbhd,tbhd->bhst", q, k) * 32**-0.5
    weights = counts[:, None] * logits.exp()
    weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-300)
    expected = torch.einsum("bhst,tbhd->sbhd", weights, v).flatten(-2)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    assert not out[6, 0].any()
    assert set(seen) == {"query", "key", "x", "qr", "packed", "layer_number"}
    assert seen["x"] is x
    assert seen["qr"] is qr
    assert seen["layer_number"] == 1


def test_a_layer_hands_its_hidden_states_to_index_fn() -> None:
    seen = []

    def window(*, query: torch.Tensor, x: torch.Tensor | None, qr: torch.Tensor | None, **_: Any) -> torch.Tensor:
        seen.append((x, qr))
        rows = torch.arange(query.shape[0])
        return (rows[:, None] - torch.arange(3)).clamp_min(-1).expand(query.shape[1], -1, -1)

    # 0.16 hands them over for its own sparse attention only.
    change = {"experimental_attention_variant": "dsa"} if VERSION.startswith("0.16") else {}
    hidden = hidden_states()
    layer = build(adapt_spec(layer_spec(), index_fn=window), make_config(**change))
    sparse = run(layer, hidden)
    outside = torch.ones(ROWS, ROWS, dtype=torch.bool).tril(-3)
    mask = every_row_but(outside)[None, None]
    assert_same(sparse, run(build(dense_spec(), make_config()), hidden, attention_mask=mask))
    ((x, qr),) = seen
    assert x.shape == (ROWS, BATCH, HIDDEN)
    assert qr.shape == (ROWS, BATCH, 32)


def test_without_a_mask_every_row_is_read() -> None:
    q, k, v = draw()
    out = core_attention()(q[:1], k, v, None, attn_mask_type=AttnMaskType.no_mask)  # one step of decoding
    torch.testing.assert_close(out, dense(q[:1], k, v, torch.zeros(1, ROWS, dtype=torch.bool)), rtol=0, atol=1e-12)


def test_a_padded_value_comes_back_as_wide_as_it_was_given() -> None:
    q, k, v = (t[:, 0] for t in draw())
    core, params = core_attention(), packed_params()
    narrow = core(q, k, v, None, packed_seq_params=params)
    wide = core(q, k, nn.functional.pad(v, (0, 8)), None, packed_seq_params=params)
    assert (narrow.shape, wide.shape) == ((ROWS, 4 * 24), (ROWS, 4 * 32))
    wide = wide.view(ROWS, 4, 32)
    torch.testing.assert_close(wide[..., :24].flatten(-2), narrow)
    assert not wide[..., 24:].any()


def test_no_tensor_has_an_element_for_each_head_and_pair_of_rows() -> None:
    class Largest(TorchDispatchMode):
        bytes = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for tensor in (leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
            return out

    rows, heads = 512, 16
    config = make_config(num_attention_heads=heads)
    q, k, v = (torch.randn(rows, 1, heads, width) for width in (32, 32, 24))
    core = core_attention(config)
    with Largest() as largest:
        core(q, k, v, None)
    assert largest.bytes <= rows * rows * 8  # one int64 list for all heads
    assert largest.bytes < heads * rows * rows


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attn_mask_type": AttnMaskType.padding}, "attn_mask_type must be one of causal, no_mask, got padding"),
        ({"attn_mask_type": AttnMaskType.padding_causal}, "one of causal, no_mask, got padding_causal"),
        ({"attention_mask": torch.zeros(1, 1, ROWS, ROWS)}, "attention_mask must be bool, True where hidden"),
        ({"attention_mask": torch.zeros(1, 4, ROWS, ROWS, dtype=torch.bool)}, "mask must be .* one for all heads"),
        ({"up_v_weight": torch.zeros(4, 24, 48)}, "exactly one of value .* got both"),
        ({"value": None}, "exactly one of value .* got neither"),
        ({"packed_seq_params": packed_params()}, r"layout 'thd' needs query \[t, heads, k_channels\], got 4-D"),
    ],
)
def test_wrong_tensors_are_refused(options: dict[str, Any], message: str) -> None:
    q, k, v = draw()
    arguments = {"value": v, "attention_mask": None} | options
    with pytest.raises(MLALayoutError, match=message):
        core_attention()(q, k, **arguments)


def test_packed_rows_without_their_sequence_are_refused() -> None:
    q, k, v = (t[:, 0] for t in draw())
    with pytest.raises(MLALayoutError, match=r"layout 'sbhd' needs query \[s, b, heads, k_channels\], got 3-D"):
        core_attention()(q, k, v, None)


def test_a_mask_beside_a_packed_sequence_is_refused() -> None:
    q, k, v = (t[:, 0] for t in draw())
    mask = torch.zeros(1, 1, ROWS, ROWS, dtype=torch.bool)
    with pytest.raises(MLALayoutError, match="attention_mask came with a packed sequence"):
        core_attention()(q, k, v, mask, packed_seq_params=packed_params())
    out = core_attention(mask_type=AttnMaskType.padding_causal)(q, k, v, None, packed_seq_params=packed_params())
    torch.testing.assert_close(out, core_attention()(q, k, v, None, packed_seq_params=packed_params()))


def test_a_causal_mask_needs_as_many_queries_as_keys() -> None:
    q, k, v = draw()
    with pytest.raises(MLALayoutError, match="as many query rows as key rows, got 1 and 10"):
        core_attention()(q[:1], k, v, None)


@pytest.mark.parametrize("padded", [False, True], ids=["lengths", "starts"])
def test_a_causal_mask_needs_the_same_segments_of_queries_and_keys(padded: bool) -> None:
    q, k, v = (t[:, 0] for t in draw(6))
    bounds = {"cu_seqlens_q": torch.tensor([0, 2, 6]), "cu_seqlens_kv": torch.tensor([0, 4, 6])}
    if padded:
        same = torch.tensor([0, 2, 4])
        bounds = {"cu_seqlens_q": same, "cu_seqlens_kv": same} | {f"{n}_padded": t for n, t in bounds.items()}
    params = packed_params(**bounds)
    with pytest.raises(MLALayoutError, match=r"the same segments of query and key, got .* rows \[0, 2\] .* \[0, 4\]"):
        core_attention()(q, k, v, None, packed_seq_params=params)
    assert core_attention()(q, k, v, None, attn_mask_type=AttnMaskType.no_mask, packed_seq_params=params).any(1).all()


def test_a_causal_mask_hides_no_index_that_names_no_row() -> None:
    beyond = torch.full((BATCH, ROWS, 1), 99)
    with pytest.raises(MLALayoutError, match=r"indices\[0, 0, 0, 0\] is 99, outside the 10 rows of key"):
        core_attention(index_fn=lambda **_: beyond)(*draw(), None)
    assert not core_attention(index_fn=lambda **_: beyond, check_indices=False)(*draw(), None).any()


def test_keys_with_heads_are_not_taken_for_latent_rows() -> None:
    absorbed = {"k_channels": 56, "v_channels": 48}
    q = torch.randn(ROWS, BATCH, 4, 56)
    with pytest.raises(MLALayoutError, match="key has 4 heads but the layer's latent rows are shared"):
        core_attention(**absorbed)(q, q, None, None, up_v_weight=torch.zeros(4, 24, 48))


@pytest.mark.parametrize("shape", [(ROWS, 2), (BATCH, ROWS, 4, 2)])
def test_index_fn_returns_one_list_for_all_heads(shape: tuple[int, ...]) -> None:
    core = core_attention(index_fn=lambda **_: torch.zeros(shape, dtype=torch.int32))
    with pytest.raises(MLALayoutError, match=r"index_fn must return \[b, s, K\], one list for all heads"):
        core(*draw(), None)


def test_an_index_outside_its_segment_is_refused_in_eager() -> None:
    q, k, v = (t[:, 0] for t in draw())
    crossing = torch.full((ROWS, 2), -1)
    crossing[5, 0] = 3  # the segment before
    with pytest.raises(MLALayoutError, match="outside its segment's rows"):
        core_attention(index_fn=lambda **_: crossing)(q, k, v, None, packed_seq_params=packed_params())
    unchecked = core_attention(index_fn=lambda **_: crossing, check_indices=False)
    assert not unchecked(q, k, v, None, packed_seq_params=packed_params()).any()


def test_reading_every_row_has_a_documented_bound() -> None:
    q, k, v = draw()
    with pytest.raises(MLAMetadataError, match=r"up to max_dense_rows=9, got 10 rows; pass adapt_spec an index_fn"):
        core_attention(max_dense_rows=9)(q, k, v, None)
    packed = (q[:, 0], k[:, 0], v[:, 0], None)
    core_attention(max_dense_rows=6)(*packed, packed_seq_params=packed_params())  # its longest segment
    with pytest.raises(MLAMetadataError, match="got 6 rows"):
        core_attention(max_dense_rows=5)(*packed, packed_seq_params=packed_params())


def test_dropout_and_biases_are_refused() -> None:
    q, k, v = draw()
    core = core_attention(make_config(attention_dropout=0.1))
    with pytest.raises(UnsupportedFeatureError, match=r"attention_dropout is 0\.1"):
        core(q, k, v, None)
    core.eval()(q, k, v, None)
    with pytest.raises(UnsupportedFeatureError, match="attention_bias was passed"):
        core(q, k, v, None, attention_bias=torch.zeros(1))


def test_configuration_that_would_not_be_honoured_is_refused_all_at_once() -> None:
    config = make_config(window_size=(128, 0), softmax_type="off-by-one", qk_clip=True)
    with pytest.raises(UnsupportedFeatureError) as info:
        core_attention(config)
    for text in ("layer 1, does not support", "softmax_type='off-by-one'", "window_size=(128, 0)", "qk_clip=True"):
        assert text in str(info.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k_channels": 24}, r"\(k_channels, v_channels\) is \(24, 24\), but .* \(32, 24\) expanded and \(56, 48\)"),
        ({"v_channels": None}, r"\(k_channels, v_channels\) is \(32, None\)"),
    ],
)
def test_widths_that_contradict_the_configuration_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(MLAMetadataError, match=message):
        core_attention(**change)


def test_a_configuration_without_mla_widths_is_missed_in_one_error() -> None:
    config = SimpleNamespace(attention_dropout=0.0, num_attention_heads=4, qk_head_dim=24, qk_pos_emb_head_dim=8)
    with pytest.raises(MLAMetadataError, match=r"\(from SimpleNamespace, layer 1\)") as info:
        core_attention(config)
    assert set(info.value.missing) == {"kv_lora_rank", "v_head_dim"}
    with pytest.raises(MLAMetadataError, match="attention_type must be 'self', got 'cross'"):
        SparseMLACoreAttention(make_config(), 1, AttnMaskType.causal, "cross", k_channels=32, v_channels=24)


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True], ids=["sbhd", "thd"])
def test_on_a_gpu_nothing_waits_for_the_host(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", CURRENT_DEVICE)
    bounds = torch.tensor([0, 4, 10], dtype=torch.int32, device="cuda")
    params = packed_params(cu_seqlens_q=bounds, cu_seqlens_kv=bounds) if packed else None
    on_cpu = [t[:, 0] if packed else t for t in draw()]
    expected = core_attention()(*on_cpu, None, packed_seq_params=packed_params() if packed else None)
    q, k, v = (t.float().cuda().requires_grad_() for t in on_cpu)
    core = core_attention(check_indices=False)
    core(q, k, v, None, packed_seq_params=params).sum().backward()  # compiles the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = core(q, k, v, None, packed_seq_params=params)
        out.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(out.cpu().double(), expected, rtol=1e-5, atol=1e-5)
