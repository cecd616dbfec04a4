"""Question 3: who will run this layer? An answer with its reasons, or a typed refusal; never None."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch

from mla_ops.adapters.seam.metadata import MLALayerMeta
from mla_ops.device import traits_of
from mla_ops.dispatch import AUTO
from mla_ops.errors import MLAMetadataError, UnsupportedBackendError
from mla_ops.ops.sparse_attn.backends import backend_names, check_backend_name, select
from mla_ops.ops.sparse_attn.call import SparseAttnProblem


@dataclass(frozen=True, slots=True)
class BackendPlan:
    """The backend that will run a layer, and for each of the others why it will not."""

    name: str  # pass it on as `backend=`
    requested: str
    reasons: Mapping[str, tuple[str, ...]]

    def __str__(self) -> str:
        others = [f"  {name}: {'; '.join(reasons)}" for name, reasons in self.reasons.items()]
        return "\n".join([f"backend {self.name!r} (requested {self.requested!r})", *others])


def resolve_backend(
    requested: str,
    meta: MLALayerMeta,
    *,
    device: torch.device,
    dtype: torch.dtype,
    needs_grad: bool,
    topk: int | None = None,
    kv_group: int | None = None,
    kv_format: str = "dense",
) -> BackendPlan:
    """Name the backend for a layer before its first tensor exists. Runs nothing and falls back to nothing.

    Layouts are not asked for: every one is brought to the same call, so none can change the answer.

    Args:
        requested: "auto", which takes the first backend that fits, or a name, which runs or raises.
        meta: the layer. In the expanded form `kv_group` is the key's heads, by default those of the query.
        device: where it will run.
        dtype: of query and key.
        needs_grad: whether a backward pass will follow.
        topk: slots per query; default: the layer's own.
        kv_group: KV heads, where `meta` does not fix them (see above).
        kv_format: how a KV row is stored.

    Raises:
        UnknownBackendError: `requested` is no known name.
        UnsupportedBackendError: nothing fits, or not what was named; lists every backend's reasons.
        MLAMetadataError: neither `topk` nor the layer says how many slots a query has, or `topk` or `kv_group` cannot
            be.
    """
    check_backend_name(requested)
    topk = meta.topk if topk is None else topk
    if topk is None:
        raise MLAMetadataError(
            f"topk is needed to choose a backend, and the layer's metadata ({meta.source or 'built by hand'}) has "
            "none; pass topk=...",
            missing=("topk",),
            source=meta.source,
        )
    if kv_group is None:
        kv_group = meta.kv_group if meta.form == "absorbed" else meta.heads
    meta = replace(meta, topk=topk, kv_group=kv_group)  # checks them
    problem = SparseAttnProblem(
        d_total=meta.d_total,
        d_v=meta.d_v,
        topk=topk,
        heads=meta.heads,
        kv_group=kv_group,
        dtype=dtype,
        needs_grad=needs_grad,
        kv_format=kv_format,
    )
    traits = traits_of(device)
    by_auto = {verdict.backend: verdict.reasons for verdict in select(problem, traits).verdicts}
    by_name = {name: select(problem, traits, name).verdicts[0].reasons for name in backend_names()}
    chosen = select(problem, traits, requested).backend
    if chosen is None:
        raise UnsupportedBackendError(_refusal(requested, problem, str(traits), meta, by_auto, by_name))
    reasons = by_auto if requested == AUTO else by_name
    unchosen = "fits, comes later in the order" if requested == AUTO else "fits, was not requested"
    others = {name: reasons[name] or (unchosen,) for name in backend_names() if name != chosen.name}
    return BackendPlan(chosen.name, requested, MappingProxyType(others))


def _refusal(
    requested: str,
    problem: SparseAttnProblem,
    device: str,
    meta: MLALayerMeta,
    by_auto: Mapping[str, tuple[str, ...]],
    by_name: Mapping[str, tuple[str, ...]],
) -> str:
    where = "" if meta.layer is None else f" in layer {meta.layer}"
    lines = [f"no backend can run mla::sparse_attn{where} on {device} for {problem} (requested {requested!r})"]
    reasons = by_auto if requested == AUTO else by_name
    lines += [f"  {name}: {'; '.join(reasons[name]) or 'fits (not requested)'}" for name in backend_names()]
    choices = [name for name, why in by_name.items() if not why and name != requested]
    choices += [AUTO] if requested != AUTO and not all(by_auto.values()) else []
    if choices:
        lines.append(f"  Choose {' or '.join(f'backend={name!r}' for name in choices)}.")
    return "\n".join(lines)
