"""The operator behind Megatron's absorbed sparse attention."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import mla_ops
from mla_ops.adapters import megatron as adapter
from mla_ops.adapters.megatron import adapt_spec, capabilities, enable_dsa_backend
from mla_ops.errors import (
    MLALayoutError,
    MLAMetadataError,
    UnsupportedBackendError,
)
from mla_ops.ops.sparse_attn.reference import sparse_attn_reference

pytest.importorskip("megatron.core", reason="megatron-core is not installed: pip install 'mla_ops[megatron]'")
from megatron.core.transformer.enums import AttnBackend
from tiny_megatron import (
    BATCH,
    NEEDS_ABSORBED,
    ROWS,
    VERSION,
    assert_same,
    build,
    dsa_config,
    dsa_spec,
    hidden_states,
    layer_spec,
    make_config,
    megatron,
    packed_params,
    run,
)

__all__ = ["megatron"]  # a fixture of every test here


# Behind Megatron's absorbed sparse attention


def draw_absorbed(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    query = torch.randn(ROWS, BATCH, 3, 88, generator=generator, dtype=dtype)
    key = torch.randn(ROWS, BATCH, 1, 88, generator=generator, dtype=dtype)
    indices = torch.randint(-1, ROWS, (BATCH, ROWS, 5), generator=generator)
    indices[1, 4] = -1
    return query, key, indices


@pytest.mark.parametrize("with_length", [False, True])
def test_the_hook_takes_any_widths_heads_and_topk(with_length: bool) -> None:
    query, key, indices = draw_absorbed()
    length = torch.arange(BATCH * ROWS).view(BATCH, ROWS) % 6 if with_length else None
    out = adapter.run_fused_absorbed_sparse_attention(query, key, indices, 0.1, 72, length)
    q, kv = query.transpose(0, 1), key.transpose(0, 1)
    expected, _ = sparse_attn_reference(q, kv, indices.unsqueeze(2), 72, 0.1, topk_length=length)
    torch.testing.assert_close(out, expected.transpose(0, 1), rtol=0, atol=1e-12)
    assert not out[4, 1].any()


def test_the_hook_raises_where_megatrons_own_decline() -> None:
    query, key, indices = draw_absorbed()
    hook = adapter.run_fused_absorbed_sparse_attention
    with pytest.raises(MLALayoutError, match="key has 3 heads"):
        hook(query, key.expand(-1, -1, 3, -1), indices, 0.1, 72)
    with pytest.raises(MLALayoutError, match=r"d_total >= v_channels \(100\)"):
        hook(query, key, indices, 0.1, 100)
    with pytest.raises(mla_ops.InvalidInputError, match="kv must have the dtype of q"):
        hook(query, key.float(), indices, 0.1, 72)


def test_a_version_without_the_hook_is_refused() -> None:
    if capabilities().dsa_hook:
        pytest.skip(f"megatron-core {VERSION} has the hook, so there is nothing to refuse")
    with pytest.raises(UnsupportedBackendError, match=f"megatron-core {VERSION} has no place for a sparse attention"):
        enable_dsa_backend(make_config())


@NEEDS_ABSORBED
@pytest.mark.parametrize("packed", [False, True], ids=["sbhd", "thd"])
def test_the_hook_equals_megatrons_dense_fallback(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    config = dsa_config()
    layer = build(dsa_spec(config), config)
    hidden = hidden_states(ROWS, 1 if packed else BATCH)
    options = {"packed_seq_params": packed_params()} if packed else {}
    fallback = run(layer, hidden, **options)

    seen = []
    hook = adapter.run_fused_absorbed_sparse_attention

    def recorded(*args: Any) -> torch.Tensor:
        seen.append(args[2])
        return hook(*args)

    monkeypatch.setattr(adapter, "run_fused_absorbed_sparse_attention", recorded)
    with enable_dsa_backend(config):
        fused = run(layer, hidden, **options)
    assert_same(fused, fallback, tolerance=1e-6)
    (indices,) = seen
    assert indices.dtype == torch.int64
    assert (indices == -1).any()
    assert (indices.diff() < 0).any()  # unsorted, before the -1 as well
    assert indices.shape == (1 if packed else BATCH, ROWS, 4)


@NEEDS_ABSORBED
def test_undoing_the_hook_restores_the_configuration_and_megatrons_table() -> None:
    from megatron.core.transformer.experimental_attention_variant import dsa_kernels

    before = dict(dsa_kernels._BACKEND_MODULE_NAME_BY_BACKEND)
    first, second = dsa_config(), dsa_config()
    undo_first = enable_dsa_backend(first)
    with enable_dsa_backend(second):
        undo_first()
        undo_first()
        assert first.dsa_kernel_backend == "none"
        assert dsa_kernels.use_fused_dsa_kernels(second)  # the table still serves it
    assert second.dsa_kernel_backend == "none"
    assert before == dsa_kernels._BACKEND_MODULE_NAME_BY_BACKEND


def stand_in_for_the_hook(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Make the place that only a newer Megatron has."""
    kernels = SimpleNamespace(_BACKEND_MODULE_NAME_BY_BACKEND={"tilelang": "a.module"})
    monkeypatch.setattr(adapter, "capabilities", lambda: SimpleNamespace(dsa_hook=True))
    monkeypatch.setattr(adapter, "_import", lambda module: kernels)
    return kernels


def test_what_is_no_configuration_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = stand_in_for_the_hook(monkeypatch)
    with pytest.raises(MLAMetadataError, match="config must be the MLATransformerConfig of the layers, got ModuleSpec"):
        enable_dsa_backend(layer_spec())
    assert set(kernels._BACKEND_MODULE_NAME_BY_BACKEND) == {"tilelang"}


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_handles_on_one_configuration_are_undone_in_any_order(
    order: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = stand_in_for_the_hook(monkeypatch)
    config = SimpleNamespace(attention_backend="auto", dsa_kernel_backend="tilelang")
    handles = [enable_dsa_backend(config) for _ in range(3)]
    for done, handle in enumerate(order):
        assert config.dsa_kernel_backend == "mla_ops", done
        handles[handle]()
    assert config.dsa_kernel_backend == "tilelang"
    assert set(kernels._BACKEND_MODULE_NAME_BY_BACKEND) == {"tilelang"}


@NEEDS_ABSORBED
def test_a_configuration_that_would_never_ask_for_a_kernel_is_refused() -> None:
    config = dsa_config()
    config.attention_backend = AttnBackend.unfused
    with pytest.raises(UnsupportedBackendError, match="attention_backend is 'unfused'"):
        enable_dsa_backend(config)


@NEEDS_ABSORBED
@pytest.mark.parametrize("packed", [False, True], ids=["sbhd", "thd"])
def test_absorbed_layers_take_the_same_core_attention(packed: bool) -> None:
    config = dsa_config()
    hidden = hidden_states(ROWS, 1 if packed else BATCH)
    options = {"packed_seq_params": packed_params()} if packed else {}
    absorbed = build(adapt_spec(dsa_spec(config)), config)
    expanded = build(adapt_spec(layer_spec().submodules.self_attention), make_config())
    expanded.load_state_dict(absorbed.state_dict())
    assert_same(run(absorbed, hidden, **options), run(expanded, hidden, **options))
