"""The Python front doors of what an indexer learns from; their docstrings are the documentation of record."""

from __future__ import annotations

import torch

from mla_ops.checks import check_tensor_types, shape_of
from mla_ops.errors import InvalidInputError, UnsupportedShardingError
from mla_ops.launching import filled_alike
from mla_ops.ops.attn_mass import backends as attn_mass_backends
from mla_ops.ops.attn_mass import rules as attn_mass_rules
from mla_ops.ops.attn_mass.backends import Decision as AttnMassDecision
from mla_ops.ops.attn_mass.call import AttnMassCall
from mla_ops.ops.index_loss_dense.call import IndexLossDenseCall
from mla_ops.ops.index_loss_dense.rules import check_argument_types as check_dense_argument_types
from mla_ops.ops.index_scores import backends as index_scores_backends
from mla_ops.ops.index_scores import rules as index_scores_rules
from mla_ops.ops.index_scores.backends import Decision as IndexScoresDecision
from mla_ops.ops.index_scores.call import IndexScoresCall, Wanted
from mla_ops.registration import (
    ATTN_MASS,
    INDEX_LOSS_DENSE,
    INDEX_SCORES,
    INDEX_SCORES_BWD,
    cast_by_autocast,
    cast_index_inputs_by_autocast,
)
from mla_ops.wrappers import is_dtensor


def index_scores(
    q_idx: torch.Tensor,
    k_idx: torch.Tensor,
    weights: torch.Tensor,
    indices: torch.Tensor,
    *,
    topk_length: torch.Tensor | None = None,
    relu: bool = True,
    backend: str = "auto",
) -> torch.Tensor:
    """Score the keys that a list names as the indexer scores them, with gradients: what the indexer learns through.

    The score of key `s` for query `t` is the sum over the index heads `j` of `weights[t, j] * relu(<q_idx[t, j],
    k_idx[s]>)`, as in `index_topk`. The same operator as `torch.ops.mla.index_scores`, with Python types checked.
    Differentiable once in `q_idx`, `k_idx` and `weights`, where the derivative of ReLU at 0 is 0. Under autocast
    `q_idx` and `k_idx` are cast, but for fp64; `weights` stay, or become fp32 where they had the dtype of `q_idx`
    before the cast. Every tensor may drop its leading `batch` dimension (all of them together), and may have any
    strides. All of them may be DTensors, sharded on batch or query rows.

    Args:
        q_idx: `[batch, seq_q, index_heads, index_head_dim]`; bf16, fp16 or fp32 (fp64 on the eager backend).
        k_idx: `[batch, seq_kv, kv_group, index_head_dim]`, dtype of `q_idx`. `index_heads` is a multiple of `kv_group`
            (1 in MLA); head `j` scores the keys of group `j // (index_heads // kv_group)`.
        weights: `[batch, seq_q, index_heads]`, fp32 or the dtype of `q_idx`, used in fp32.
        indices: `[batch, seq_q, kv_group, topk]`, int32 or int64, as `index_topk` returns and `sparse_attn` takes them.
            Anything outside `[0, seq_kv)` names no key; no causal bound is applied to what the list holds. A repeated
            index gets its score each time.
        topk_length: `[batch, seq_q]`, int32 or int64; only the first `topk_length` slots of a row count.
        relu: whether `<q, k>` is clipped at 0 before it is weighted.
        backend: "auto", or a name that `mla_ops.explain_index_scores` lists; a named backend never falls back.

    Returns:
        `[batch, seq_q, kv_group, topk]` in fp32 (for fp64 inputs too), contiguous: one score for every slot, `-inf`
        where the slot names no key. What arrives there as a gradient is ignored, NaN included. Keys that no slot names
        are never read and get a gradient of exactly 0. The gradient of `k_idx` is summed in fp32, rounded once, and
        reproducible under `torch.use_deterministic_algorithms`; that of `weights` has the dtype of `weights`.

    Raises:
        InvalidInputError: an argument breaks a rule above; raised before any work. While `torch.compile` traces, these
            errors reach the caller as torch's own `TorchRuntimeError` (a `RuntimeError`) with the words inside.
        QuantizedInputError: an argument is a quantised wrapper tensor; one of the above.
        UnknownBackendError: `backend` is no known name.
        UnsupportedProblemError: no backend runs it, or not the named one; the message lists each one's reasons.
        DoubleBackwardError: a gradient of a gradient was asked for.
        ForwardModeError: a forward-mode derivative was asked for.

    Reference: DeepSeek-V3.2 technical report, lightning indexer, equation 1; `mla_ops.reference` is the definition.
    """
    index_scores_rules.check_argument_types(q_idx, k_idx, weights, indices, topk_length, relu, backend)
    if is_dtensor(q_idx) and not torch.compiler.is_compiling():
        # DTensor's dispatcher would run these rules in the fake and wrap what they raise in a RuntimeError.
        index_scores_backends.check_backend_name(backend)
        q_idx, k_idx, weights = cast_index_inputs_by_autocast(q_idx, k_idx, weights)
        index_scores_rules.check_inputs(IndexScoresCall(q_idx, k_idx, weights, indices, topk_length, relu))
    scores: torch.Tensor = INDEX_SCORES(q_idx, k_idx, weights, indices, topk_length, relu, backend)
    return scores


def attn_mass(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    lse: torch.Tensor,
    *,
    softmax_scale: float,
    topk_length: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Sum over the heads what attention weighs each key that a list names with: what the indexer is taught.

    The mass of a slot is the sum over the heads `h` of its KV group of `exp(softmax_scale * <q[h], kv[slot]> -
    lse[h])`. It is a sum and not normalised, so that masses of sharded heads, or of layers that share their indices,
    are added up before `index_kl` normalises them. The same operator as `torch.ops.mla.attn_mass`, with Python types
    checked. Not differentiable: `q`, `kv` and `lse` may require grad and get none, as the target of a loss should.
    Under autocast `q` and `kv` are cast, but for fp64. Every tensor may drop its leading `batch` dimension (all of them
    together), and may have any strides. All of them may be DTensors, sharded on batch, query rows or heads; the mass of
    heads sharded within one KV group is `Partial`.

    Args:
        q: `[batch, seq_q, heads, d_total]`, absorbed queries, as `sparse_attn` takes them.
        kv: `[batch, seq_kv, kv_group, d_total]`, dtype of `q`.
        indices: `[batch, seq_q, kv_group, topk]`, int32 or int64. Anything outside `[0, seq_kv)` names no key.
        lse: `[batch, seq_q, heads]`, fp32: that of `sparse_attn`, or any other normaliser. `logaddexp(lse, attn_sink)`
            where a sink takes its share (the heads' shares differ, so that this changes the target); the log-sum-exp
            over window and selection where a window is attended to besides.
        softmax_scale: multiplies the logits, as in `sparse_attn`; any finite value.
        topk_length: `[batch, seq_q]`, int32 or int64; only the first `topk_length` slots of a row count.
        backend: "auto", or a name that `mla_ops.explain_attn_mass` lists; a named backend never falls back.

    Returns:
        `[batch, seq_q, kv_group, topk]` in fp32, contiguous: one mass for every slot; 0 where the slot names no key.
        A head whose `lse` is `-inf` adds 0.

    Raises:
        InvalidInputError, QuantizedInputError, UnknownBackendError, UnsupportedProblemError, ForwardModeError: as
            `index_scores`.
    """
    attn_mass_rules.check_argument_types(q, kv, indices, lse, softmax_scale, topk_length, backend)
    if is_dtensor(q) and not torch.compiler.is_compiling():  # as in `index_scores`
        attn_mass_backends.check_backend_name(backend)
        q, kv = cast_by_autocast(q, kv)
        attn_mass_rules.check_inputs(AttnMassCall(q, kv, indices, lse, softmax_scale, topk_length))
    mass: torch.Tensor = ATTN_MASS(q, kv, indices, lse, softmax_scale, topk_length, backend)
    return mass


def index_kl(mass: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Return how far the indexer's choice is from attention: KL(target || softmax(scores)), in nats, row by row.

    The target is `mass / mass.sum(-1)`. There is no eps and no clamp, so that the gradient of `scores` is exactly
    `dloss * (softmax(scores) - target)` however far the two are apart; rounding may make a loss of 0 a little negative.
    Plain torch operators, which compiled code fuses; `mass` gets no gradient.

    Args:
        mass: `[..., topk]`, as `attn_mass` returns it, or a sum of such: over ranks, or over layers that share indices.
            0 where a slot names no key.
        scores: `[..., topk]`, as `index_scores` returns them; `-inf` where a slot names no key.

    Returns:
        `[...]` in the dtype of `scores`: one loss for each query and KV group. A row without a valid slot, or without
        mass, has a loss of 0 and gradients of 0, whatever gradient arrives. Mean, masks and coefficients are the
        caller's. Scores of `+inf` and NaN make the loss NaN; a mass on a score of `-inf` makes it `+inf`.

    Raises:
        InvalidInputError: an argument is no tensor, or the shapes differ.

    Reference: DeepSeek-V3.2 technical report, equations 3 and 4.
    """
    check_tensor_types({"mass": mass, "scores": scores}, {})
    if mass.shape != scores.shape:
        raise InvalidInputError(f"mass must have the shape of scores ({shape_of(scores)}), got {shape_of(mass)}")
    mass = mass.detach()
    total = mass.sum(dim=-1, keepdim=True)
    empty = (total == 0.0) | (scores == -torch.inf).all(dim=-1, keepdim=True)
    target = mass / total.masked_fill(empty, 1.0)
    # Filled before the log-sum-exp, not after it, which is what keeps the gradient of an empty row 0 instead of NaN.
    scores = scores.masked_fill(empty, 0.0)
    entropy: torch.Tensor = torch.special.xlogy(target, target)
    # Not a product everywhere: at invalid slots it is 0 * -inf.
    explained = torch.where(target == 0.0, 0.0, target * scores)
    loss: torch.Tensor = (entropy - explained).sum(dim=-1) + torch.logsumexp(scores, dim=-1)
    return loss.masked_fill(empty.squeeze(-1), 0.0)


def index_loss(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    lse: torch.Tensor,
    q_idx: torch.Tensor,
    k_idx: torch.Tensor,
    weights: torch.Tensor,
    *,
    softmax_scale: float,
    topk_length: torch.Tensor | None = None,
    relu: bool = True,
    backend: str = "auto",
) -> torch.Tensor:
    """Return the indexer's loss on the selected keys, one number for each query and KV group.

    `index_kl(attn_mass(q, kv, indices, lse, ...), index_scores(q_idx, k_idx, weights, indices, ...))`: how far the
    indexer's softmax over the selected keys is from the attention weights on them, summed over the heads and
    normalised. Differentiable once in `q_idx`, `k_idx` and `weights`; `q`, `kv` and `lse` get no gradient. Detach the
    input of the indexer where it should learn from this loss alone.

    Args:
        q: `[batch, seq_q, heads, d_total]`, and everything up to `lse`: as in `attn_mass`.
        kv: `[batch, seq_kv, kv_group, d_total]`.
        indices: `[batch, seq_q, kv_group, topk]`, int32 or int64.
        lse: `[batch, seq_q, heads]`, fp32.
        q_idx: `[batch, seq_q, index_heads, index_head_dim]`, and up to `weights`: as in `index_scores`.
        k_idx: `[batch, seq_kv, kv_group, index_head_dim]`.
        weights: `[batch, seq_q, index_heads]`.
        softmax_scale: multiplies the logits of attention.
        topk_length: `[batch, seq_q]`, int32 or int64.
        relu: whether `<q_idx, k_idx>` is clipped at 0 before it is weighted.
        backend: of both operators; "auto", or a name.

    Returns:
        `[batch, seq_q, kv_group]` in fp32, as `index_kl`. Mean, masks and coefficients are the caller's.

    Raises:
        InvalidInputError, QuantizedInputError, UnknownBackendError, UnsupportedProblemError, DoubleBackwardError,
            ForwardModeError: as `index_scores` and `attn_mass`.
    """
    mass = attn_mass(q, kv, indices, lse, softmax_scale=softmax_scale, topk_length=topk_length, backend=backend)
    scores = index_scores(q_idx, k_idx, weights, indices, topk_length=topk_length, relu=relu, backend=backend)
    return index_kl(mass, scores)


def index_loss_dense(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    q_idx: torch.Tensor,
    k_idx: torch.Tensor,
    weights: torch.Tensor,
    row_weight: torch.Tensor,
    *,
    softmax_scale: float,
    starts: torch.Tensor | None = None,
    ends: torch.Tensor | None = None,
    causal: bool = True,
    relu: bool = True,
) -> torch.Tensor:
    """Return the indexer's loss over all keys that its queries may see: the warm-up, where attention is dense.

    The same loss as `index_loss`, where every eligible key is in the list, summed over rows with the weights given. A
    row is a query of a KV group. The gradients are computed with the loss, in one pass over all pairs, which is why the
    weights of the rows come first: `row_weight = mask / mask.sum()` makes a mean, and a coefficient or a loss scale
    belongs there too, because gradients are rounded to the dtype of their argument before what arrives multiplies them.
    Plain matrix products in strips, on any device: at most 256 MiB of workspace, nothing of the size `[seq_q, seq_kv]`.
    One call of `torch.ops.mla.index_loss_dense` in a compiled graph. Differentiable once in `q_idx`, `k_idx` and
    `weights`; all other tensors get no gradient. Under autocast `q`, `k`, `q_idx` and `k_idx` are cast, but for fp64.
    Every tensor may drop its leading `batch` dimension (all of them together).

    Args:
        q: `[batch, seq_q, heads, d_total]`; bf16, fp16, fp32 or fp64. Absorbed queries or those of each head's own
            keys: narrower rows are cheaper.
        k: `[batch, seq_kv, kv_group, d_total]`, dtype of `q`; head `h` reads group `h // (heads // kv_group)`.
        lse: `[batch, seq_q, heads]`, fp32: log-sum-exp of attention's scaled logits, or any other normaliser.
        q_idx: `[batch, seq_q, index_heads, index_head_dim]`, and up to `weights`: as in `index_topk`, but for e4m3.
        k_idx: `[batch, seq_kv, kv_group, index_head_dim]`.
        weights: `[batch, seq_q, index_heads]`, fp32 or the dtype of `q_idx`.
        row_weight: `[batch, seq_q]` or `[batch, seq_q, kv_group]`, fp32. What a row of weight 0 holds counts nothing,
            NaN included.
        softmax_scale: multiplies the logits of attention; any finite value.
        starts: `[batch, seq_q]` or `[seq_q]`, int32 or int64: as in `index_topk`, as are `ends` and `causal`.
        ends: `[batch, seq_q]` or `[seq_q]`, int32 or int64. Keys that only some queries may see must be finite.
        causal: whether a query sees only keys up to its own position, the last query standing at the last key.
        relu: whether `<q_idx, k_idx>` is clipped at 0 before it is weighted.

    Returns:
        A scalar in fp32: the sum over the rows of `row_weight` times the divergence, in nats. A row without an eligible
        key, or without mass, adds 0 and gets gradients of 0.

    Raises:
        InvalidInputError: an argument breaks a rule above; raised before any work.
        QuantizedInputError: an argument is a quantised wrapper tensor.
        UnsupportedShardingError: an argument is a DTensor; call it with local tensors.
        DoubleBackwardError: a gradient of a gradient was asked for.
        ForwardModeError: a forward-mode derivative was asked for.

    Reference: DeepSeek-V3.2 technical report, equation 3; `mla_ops.reference` is the definition.
    """
    tensors = (q, k, lse, q_idx, k_idx, weights, row_weight)
    call = IndexLossDenseCall(*tensors, softmax_scale, starts, ends, causal, relu)
    check_dense_argument_types(call)
    if is_dtensor(q):
        raise UnsupportedShardingError(
            "q must be a plain tensor, got a DTensor: index_loss_dense has no sharding rules; use to_local()"
        )
    need_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (q_idx, k_idx, weights))
    loss: torch.Tensor
    loss, _, _, _ = INDEX_LOSS_DENSE(*call, need_grad)
    return loss


def explain_index_scores(
    q_idx: torch.Tensor,
    k_idx: torch.Tensor,
    weights: torch.Tensor,
    indices: torch.Tensor,
    *,
    topk_length: torch.Tensor | None = None,
    relu: bool = True,
    backend: str = "auto",
) -> IndexScoresDecision:
    """Say which backend would run `mla_ops.index_scores` on these tensors, and what every other one lacks.

    Takes the arguments of `index_scores`, whose values do not matter, and runs nothing; see `mla_ops.explain`.

    Raises:
        InvalidInputError: the arguments break the operator's contract.
        UnknownBackendError: `backend` is not a known name.
    """
    index_scores_rules.check_argument_types(q_idx, k_idx, weights, indices, topk_length, relu, backend)
    q_idx, k_idx, weights = cast_index_inputs_by_autocast(q_idx, k_idx, weights)
    call = IndexScoresCall(q_idx, k_idx, weights, indices, topk_length, relu)
    index_scores_rules.check_inputs(call)
    wanted = Wanted(*(torch.is_grad_enabled() and t.requires_grad for t in (q_idx, k_idx, weights)))
    return index_scores_backends.explain(call, backend, wanted if any(wanted) else None)


def explain_attn_mass(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    lse: torch.Tensor,
    *,
    softmax_scale: float = 1.0,
    topk_length: torch.Tensor | None = None,
    backend: str = "auto",
) -> AttnMassDecision:
    """Say which backend would run `mla_ops.attn_mass` on these tensors, and what every other one lacks.

    Takes the arguments of `attn_mass`, whose values do not matter, and runs nothing; see `mla_ops.explain`.

    Raises:
        InvalidInputError: the arguments break the operator's contract.
        UnknownBackendError: `backend` is not a known name.
    """
    attn_mass_rules.check_argument_types(q, kv, indices, lse, softmax_scale, topk_length, backend)
    q, kv = cast_by_autocast(q, kv)
    call = AttnMassCall(q, kv, indices, lse, softmax_scale, topk_length)
    attn_mass_rules.check_inputs(call)
    return attn_mass_backends.explain(call, backend)


def warmup_index_loss(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    lse: torch.Tensor,
    q_idx: torch.Tensor,
    k_idx: torch.Tensor,
    weights: torch.Tensor,
    *,
    softmax_scale: float,
    topk_length: torch.Tensor | None = None,
    relu: bool = True,
    backend: str = "auto",
    needs_grad: bool = True,
) -> None:
    """Compile and load every kernel of `mla_ops.index_loss` for a problem, so that a CUDA-graph capture may follow.

    Takes the arguments of `index_loss`: example tensors with the shapes, dtypes and strides to come; their values do
    not matter and are not read. Run it under the `torch.use_deterministic_algorithms` setting and the autocast to come.

    Args:
        q: as in `index_loss`, as are all arguments up to `backend`.
        kv: `[batch, seq_kv, kv_group, d_total]`.
        indices: `[batch, seq_q, kv_group, topk]`, int32 or int64; an expanded view if calls to come have one.
        lse: `[batch, seq_q, heads]`, fp32.
        q_idx: `[batch, seq_q, index_heads, index_head_dim]`.
        k_idx: `[batch, seq_kv, kv_group, index_head_dim]`.
        weights: `[batch, seq_q, index_heads]`.
        softmax_scale: a kernel is compiled for its sign.
        topk_length: `[batch, seq_q]` or None, whether calls to come have one.
        relu: as in calls to come.
        backend: as in calls to come.
        needs_grad: also warm the backward. Gradients are prepared for those of `q_idx`, `k_idx` and `weights` that
            require one, for all if none does.

    Raises:
        InvalidInputError, UnknownBackendError, UnsupportedProblemError: as `mla_ops.index_loss` would for these
            tensors; InvalidInputError during a capture too.
    """
    attn_mass_rules.check_argument_types(q, kv, indices, lse, softmax_scale, topk_length, backend)
    index_scores_rules.check_argument_types(q_idx, k_idx, weights, indices, topk_length, relu, backend)
    if q.is_cuda and torch.cuda.is_current_stream_capturing():
        raise InvalidInputError(
            "warmup_index_loss must run before a CUDA-graph capture, the current stream is capturing; move it"
        )
    q, kv = cast_by_autocast(q, kv)
    q_idx, k_idx, weights = cast_index_inputs_by_autocast(q_idx, k_idx, weights)
    with torch.no_grad():
        no_key = filled_alike(indices, -1)  # nothing is gathered
        ATTN_MASS(q, kv, no_key, lse, softmax_scale, topk_length, backend)
        scores = INDEX_SCORES(q_idx, k_idx, weights, no_key, topk_length, relu, backend)
        if needs_grad:
            needs = [t.requires_grad for t in (q_idx, k_idx, weights)]
            needs = needs if any(needs) else [True] * 3
            INDEX_SCORES_BWD(scores, q_idx, k_idx, weights, no_key, topk_length, relu, *needs, backend)
