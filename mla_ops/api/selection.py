"""The Python front doors of index selection; their docstrings are the documentation of record."""

from __future__ import annotations

import torch

from mla_ops.errors import InvalidInputError
from mla_ops.ops.index_topk import backends
from mla_ops.ops.index_topk.backends import Decision, check_backend_name
from mla_ops.ops.index_topk.call import IndexTopkCall
from mla_ops.ops.index_topk.rules import check_argument_types, check_inputs
from mla_ops.registration import INDEX_TOPK, cast_index_inputs_by_autocast
from mla_ops.wrappers import is_dtensor


def index_topk(
    q_idx: torch.Tensor,
    k_idx: torch.Tensor,
    weights: torch.Tensor,
    topk: int,
    *,
    starts: torch.Tensor | None = None,
    ends: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    causal: bool = True,
    relu: bool = True,
    backend: str = "auto",
) -> torch.Tensor:
    """Choose, for every query, the `topk` keys that an indexer scores highest: the `indices` of `sparse_attn`.

    The score of key `s` for query `t` is the sum over the index heads `j` of `weights[t, j] * relu(<q_idx[t, j],
    k_idx[s]>)`. The choice is exact, with a rule for ties, and reproducible; nothing of the size `[seq_q, seq_kv]` is
    kept. The same operator as `torch.ops.mla.index_topk`, with Python types checked. Inputs may require grad: the
    result is of integers, adds no node to a graph, and no gradient passes (an indexer learns from the scores of the
    keys that were chosen). Under autocast `q_idx` and `k_idx` are cast, but for fp64 and e4m3; `weights` stay, or
    become fp32 where they had the dtype of `q_idx` before the cast. Every tensor may drop its leading `batch` dimension
    (all of them together), and may have any strides. All of them may be DTensors, sharded on batch, or with
    `causal=False` on query rows.

    Which keys: key `s` is eligible for query `t` if `starts <= s < ends`, where given, and with `causal` if `s <= t +
    seq_kv - seq_q`. With at most `topk` eligible keys all of them are chosen, otherwise the `topk` with the largest
    scores; of equal scores the lower positions are chosen (`-0.0` equals `0.0`). NaN counts as larger than `+inf`, as
    in `torch.topk`; infinities are ordinary scores, and an eligible key with a score of `-inf` is still a key.

    Which numbers: products of bf16, fp16, e4m3 and fp32 are accumulated in fp32 (fp32 inputs are not rounded to TF32),
    the rest is fp32 too, fp64 inputs included. Scores are sums of rounded numbers, so two backends may differ about
    keys whose scores are closer than that rounding; each is exact about its own scores.

    Args:
        q_idx: `[batch, seq_q, index_heads, index_head_dim]`, index queries, rotated and normalised by the caller; bf16,
            fp16, fp32, e4m3 (`torch.float8_e4m3fn`), or fp64 on the eager backend.
        k_idx: `[batch, seq_kv, kv_group, index_head_dim]`, dtype of `q_idx`. `index_heads` is a multiple of `kv_group`
            (1 in MLA); head `j` scores the keys of group `j // (index_heads // kv_group)`.
        weights: `[batch, seq_q, index_heads]`, fp32 or the dtype of `q_idx` (fp32 beside e4m3), used in fp32. Every
            scale belongs into them: that of the heads, of the width, of quantised queries. They may be negative.
        topk: how many keys, `>= 0`; may be more than `seq_kv`.
        starts: `[batch, seq_q]` or `[seq_q]` for all batch elements, int32 or int64: the first key that a query may
            choose, such as the first token of its document. Any value; what lies before key 0 is not there.
        ends: `[batch, seq_q]` or `[seq_q]`, int32 or int64: one past the last key that a query may choose, such as the
            length of a cache.
        k_scale: `[batch, seq_kv, kv_group]`, fp32, with e4m3 keys and only with them: multiplies the scores of its key.
        causal: whether a query sees only keys up to its own position, the last query standing at the last key. With
            compressed keys, or query rows that are part of a sequence, pass False and `ends`.
        relu: whether `<q, k>` is clipped at 0 before it is weighted.
        backend: "auto", or a name that `mla_ops.explain_index_topk` lists; a named backend never falls back.

    Returns:
        `[batch, seq_q, kv_group, topk]`, int32, contiguous. The positions of a row ascend, then follow `-1`s, which
        `sparse_attn` takes for "no key". The number of valid slots is `min(topk, eligible keys)`. The same inputs give
        the same bits, in eager, compiled and captured calls, and a row does not depend on other rows or on the batch.
        A row is no prefix of a longer one: the first 512 of 1024 are not the best 512; call again. Workspace is at most
        256 MiB whatever the lengths; the host reads no data.

    Raises:
        InvalidInputError: an argument breaks a rule above; raised before any work. While `torch.compile` traces, these
            errors reach the caller as torch's own `TorchRuntimeError` (a `RuntimeError`) with the words inside.
        QuantizedInputError: an argument is a quantised wrapper tensor; one of the above.
        UnknownBackendError: `backend` is no known name.
        UnsupportedProblemError: no backend runs it, or not the named one; the message lists each one's reasons.
        UnsupportedShardingError: DTensors are placed as no sharding rule serves.

    Reference: DeepSeek-V3.2 technical report, lightning indexer, equation 1; `mla_ops.reference` is the definition.
    """
    check_argument_types(q_idx, k_idx, weights, topk, starts, ends, k_scale, causal, relu, backend)
    if is_dtensor(q_idx) and not torch.compiler.is_compiling():
        # DTensor's dispatcher would run these rules in the fake and wrap what they raise in a RuntimeError.
        check_backend_name(backend)
        q_idx, k_idx, weights = cast_index_inputs_by_autocast(q_idx, k_idx, weights)
        check_inputs(IndexTopkCall(q_idx, k_idx, weights, topk, starts, ends, k_scale, causal, relu))
    indices: torch.Tensor = INDEX_TOPK(q_idx, k_idx, weights, topk, starts, ends, k_scale, causal, relu, backend)
    return indices


def explain_index_topk(
    q_idx: torch.Tensor,
    k_idx: torch.Tensor,
    weights: torch.Tensor,
    topk: int,
    *,
    starts: torch.Tensor | None = None,
    ends: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    causal: bool = True,
    relu: bool = True,
    backend: str = "auto",
) -> Decision:
    """Say which backend would run `mla_ops.index_topk` on these tensors, and what every other one lacks.

    Takes the arguments of `index_topk`, whose values do not matter, and runs nothing. Under autocast it speaks of the
    dtype that autocast would cast to. Print the result, or read its `backend` and `verdicts`; a refusal is
    `backend=None`, not an error.

    Raises:
        InvalidInputError: the arguments break the operator's contract.
        UnknownBackendError: `backend` is not a known name.
    """
    check_argument_types(q_idx, k_idx, weights, topk, starts, ends, k_scale, causal, relu, backend)
    q_idx, k_idx, weights = cast_index_inputs_by_autocast(q_idx, k_idx, weights)
    call = IndexTopkCall(q_idx, k_idx, weights, topk, starts, ends, k_scale, causal, relu)
    check_inputs(call)
    return backends.explain(call, backend)


def warmup_index_topk(
    q_idx: torch.Tensor,
    k_idx: torch.Tensor,
    weights: torch.Tensor,
    topk: int,
    *,
    starts: torch.Tensor | None = None,
    ends: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    causal: bool = True,
    relu: bool = True,
    backend: str = "auto",
) -> None:
    """Compile and load every kernel of `mla_ops.index_topk` for a problem, so that a CUDA-graph capture may follow.

    Takes the arguments of `index_topk`: example tensors with the shapes, dtypes and strides to come; their values do
    not matter. Run it under the autocast to come. It costs one call.

    Raises:
        InvalidInputError, UnknownBackendError, UnsupportedProblemError: as `mla_ops.index_topk` would for these
            tensors; InvalidInputError during a capture too.
    """
    check_argument_types(q_idx, k_idx, weights, topk, starts, ends, k_scale, causal, relu, backend)
    if q_idx.is_cuda and torch.cuda.is_current_stream_capturing():
        raise InvalidInputError(
            "warmup_index_topk must run before a CUDA-graph capture, the current stream is capturing; move it"
        )
    INDEX_TOPK(q_idx, k_idx, weights, topk, starts, ends, k_scale, causal, relu, backend)
