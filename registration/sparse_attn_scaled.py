"""`mla::sparse_attn_scaled` and its backward: sparse attention on e4m3 payloads with fp32 scales, as torch sees them.

`q`, `kv` or both are payloads, each with its scale; the results and gradients of `mla::sparse_attn` on
`payload * scale`, in `dtype`. Scales have no gradient.

NOTE [Wrappers are opened by the autograd kernel]
A payload can't carry a gradient in another dtype than its own, its wrapper can. So the forward also takes wrappers that
`as_scaled` opens, in the place of a payload and its scale: the autograd kernel, which comes before the
`__torch_dispatch__` of their class, opens them and saves their payloads; gradients go to the wrappers. Inference mode
has no autograd kernels: the front door opens what takes no gradient, and in compiled code a class needs `fuse_wrapper`.
"""

from __future__ import annotations

from typing import Any

import torch

from mla_ops import settings
from mla_ops.checks import dtype_of
from mla_ops.errors import InvalidInputError
from mla_ops.ops.sparse_attn.backends import check_backend_name, scaled_plan_of
from mla_ops.ops.sparse_attn.call import Gradients, Results, Scales, SparseAttnCall, Wanted
from mla_ops.ops.sparse_attn.rules import check_bwd_inputs, check_inputs
from mla_ops.registration import tracing
from mla_ops.registration.autograd import (
    BELOW_AUTOGRAD,
    Formula,
    last_derivative,
    next_level,
    record,
    refuse_forward_mode,
)
from mla_ops.registration.flop_formulas import register_flop_formulas
from mla_ops.registration.library import LIBRARY, define
from mla_ops.registration.sparse_attn_transforms import sparse_attn_bwd_flops, sparse_attn_flops
from mla_ops.registration.transforms import AUTOCAST_DEVICES, cast, preserving_kernel, vmap_by_loop
from mla_ops.scaled_tensors import as_scaled
from mla_ops.wrappers import holds_wrapper

SPARSE_ATTN_SCALED = define(
    "sparse_attn_scaled(Tensor q, Tensor? q_scale, Tensor kv, Tensor? kv_scale, Tensor indices, SymInt d_v, "
    "float softmax_scale, ScalarType dtype, Tensor? topk_length=None, Tensor? attn_sink=None, "
    'str backend="auto") -> (Tensor out, Tensor lse)'
)
SPARSE_ATTN_SCALED_BWD = define(
    "sparse_attn_scaled_bwd(Tensor? dout, Tensor? dlse, Tensor q, Tensor? q_scale, Tensor kv, Tensor? kv_scale, "
    "Tensor indices, Tensor out, Tensor lse, SymInt d_v, float softmax_scale, ScalarType dtype, "
    "Tensor? topk_length=None, Tensor? attn_sink=None, bool need_dq=True, bool need_dkv=True, "
    'str backend="auto") -> (Tensor dq, Tensor dkv, Tensor dsink)'
)


def open_wrapper(
    name: str, tensor: torch.Tensor, scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the payload and the scale of a wrapper, which is `[]` for one of the tensor; what is plain as it is.

    Raises:
        QuantizedInputError: the wrapper holds nothing that `as_scaled` can read.
    """
    if not holds_wrapper(tensor):
        return tensor, scale
    opened = as_scaled(tensor, name=name)
    return opened.data, opened.scale if opened.is_per_row else opened.scale.reshape(())


def sparse_attn_scaled_fake(
    q: torch.Tensor,
    q_scale: torch.Tensor | None,
    kv: torch.Tensor,
    kv_scale: torch.Tensor | None,
    indices: torch.Tensor,
    d_v: int,
    softmax_scale: float,
    dtype: torch.dtype,
    topk_length: torch.Tensor | None = None,
    attn_sink: torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fake of `mla::sparse_attn_scaled`."""
    tracing.prepare()
    check_backend_name(backend)
    call = SparseAttnCall(q, kv, indices, d_v, softmax_scale, topk_length, attn_sink)
    check_inputs(call, scales=Scales(q_scale, kv_scale, dtype))
    return q.new_empty((*q.shape[:-1], d_v), dtype=dtype), q.new_empty(q.shape[:-1], dtype=torch.float32)


def sparse_attn_scaled_bwd_fake(
    dout: torch.Tensor | None,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    q_scale: torch.Tensor | None,
    kv: torch.Tensor,
    kv_scale: torch.Tensor | None,
    indices: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    d_v: int,
    softmax_scale: float,
    dtype: torch.dtype,
    topk_length: torch.Tensor | None = None,
    attn_sink: torch.Tensor | None = None,
    need_dq: bool = True,
    need_dkv: bool = True,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Fake of `mla::sparse_attn_scaled_bwd`; a gradient that is not needed is an empty `[0]` tensor."""
    tracing.prepare()
    check_backend_name(backend)
    call, scales = (
        SparseAttnCall(q, kv, indices, d_v, softmax_scale, topk_length, attn_sink),
        Scales(q_scale, kv_scale, dtype),
    )
    check_inputs(call, scales=scales)
    check_bwd_inputs(call, Results(out, lse), Gradients(dout, dlse), scales=scales)
    dq = q.new_empty(q.shape if need_dq else 0, dtype=dtype)
    dkv = kv.new_empty(kv.shape if need_dkv else 0, dtype=dtype)
    return dq, dkv, q.new_empty(0 if attn_sink is None else attn_sink.shape, dtype=torch.float32)


def sparse_attn_scaled_impl(
    q: torch.Tensor,
    q_scale: torch.Tensor | None,
    kv: torch.Tensor,
    kv_scale: torch.Tensor | None,
    indices: torch.Tensor,
    d_v: int,
    softmax_scale: float,
    dtype: torch.dtype,
    topk_length: torch.Tensor | None = None,
    attn_sink: torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Kernel of `mla::sparse_attn_scaled` for every device."""
    call = SparseAttnCall(q, kv, indices, d_v, softmax_scale, topk_length, attn_sink)
    scales = Scales(q_scale, kv_scale, dtype)
    plan = scaled_plan_of("forward", call, scales, backend, needs_grad=BELOW_AUTOGRAD.needs_grad)
    return plan.backend.forward(call, plan.launch, scales)


def sparse_attn_scaled_bwd_impl(
    dout: torch.Tensor | None,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    q_scale: torch.Tensor | None,
    kv: torch.Tensor,
    kv_scale: torch.Tensor | None,
    indices: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    d_v: int,
    softmax_scale: float,
    dtype: torch.dtype,
    topk_length: torch.Tensor | None = None,
    attn_sink: torch.Tensor | None = None,
    need_dq: bool = True,
    need_dkv: bool = True,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Kernel of `mla::sparse_attn_scaled_bwd` for every device."""
    call = SparseAttnCall(q, kv, indices, d_v, softmax_scale, topk_length, attn_sink)
    scales, results = Scales(q_scale, kv_scale, dtype), Results(out, lse)
    gradients, wanted = Gradients(dout, dlse), Wanted(need_dq, need_dkv)
    plan = scaled_plan_of("backward", call, scales, backend, results=results, gradients=gradients, wanted=wanted)
    return plan.backend.backward(call, results, gradients, wanted, plan.launch, scales)


def _forward(keys: torch._C.DispatchKeySet, arguments: tuple[Any, ...]) -> tuple[tuple[Any, ...], Any]:
    """Run the operator below autograd; return its arguments, wrappers opened, and its results."""
    q, q_scale, kv, kv_scale, *others = arguments
    if not holds_wrapper(q) and not holds_wrapper(kv):
        return arguments, next_level(SPARSE_ATTN_SCALED, keys, *arguments)
    opened = (*open_wrapper("q", q, q_scale), *open_wrapper("kv", kv, kv_scale), *others)
    # A new call: the dispatch keys of this one say that a wrapper is among the arguments.
    with torch._C._AutoDispatchBelowAutograd():
        return opened, SPARSE_ATTN_SCALED(*opened)


class _SparseAttnScaled(Formula):
    """The forward and its formula; see NOTE [Wrappers are opened by the autograd kernel]."""

    @staticmethod
    def forward(ctx: Any, keys: torch._C.DispatchKeySet, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        BELOW_AUTOGRAD.needs_grad = True
        try:
            opened, (out, lse) = _forward(keys, arguments)
        finally:
            BELOW_AUTOGRAD.needs_grad = False
        *tensors, d_v, softmax_scale, dtype, topk_length, attn_sink, backend = opened
        ctx.save_for_backward(*tensors, out, lse, topk_length, attn_sink)
        ctx.constants, ctx.backend = (d_v, softmax_scale, dtype), backend  # d_v is a SymInt while tracing
        ctx.settings = settings.current()
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        _, need_dq, _, need_dkv, *_, need_dsink, _ = ctx.needs_input_grad
        if dout is None and dlse is None:
            return (None,) * len(ctx.needs_input_grad)
        q, q_scale, kv, kv_scale, indices, out, lse, topk_length, attn_sink = ctx.saved_tensors
        # On CUDA a thread of autograd's runs this, which knows nothing of an override in the thread of the forward.
        with settings.use(ctx.settings):
            dq, dkv, dsink = SPARSE_ATTN_SCALED_BWD(
                *(dout, dlse, q, q_scale, kv, kv_scale, indices, out, lse, *ctx.constants),
                *(topk_length, attn_sink, need_dq, need_dkv, ctx.backend),
            )
        dq, dkv, dsink = (dq if need_dq else None), (dkv if need_dkv else None), (dsink if need_dsink else None)
        return None, dq, None, dkv, *(None,) * 6, dsink, None


def _sparse_attn_scaled(
    keys: torch._C.DispatchKeySet,
    q: torch.Tensor,
    q_scale: torch.Tensor | None,
    kv: torch.Tensor,
    kv_scale: torch.Tensor | None,
    indices: torch.Tensor,
    d_v: int,
    softmax_scale: float,
    dtype: torch.dtype,
    topk_length: torch.Tensor | None = None,
    attn_sink: torch.Tensor | None = None,
    backend: str = "auto",
) -> Any:
    refuse_forward_mode(SPARSE_ATTN_SCALED, q, kv, attn_sink)
    arguments = (q, q_scale, kv, kv_scale, indices, d_v, softmax_scale, dtype, topk_length, attn_sink, backend)
    for name, tensor, scale in (("q", q, q_scale), ("kv", kv, kv_scale)):
        if scale is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise InvalidInputError(
                f"{name} must not require grad where it has a scale, got {dtype_of(tensor)}, in which no gradient "
                'fits; pass the wrapper and quantized="fused" to mla_ops.sparse_attn'
            )
    differentiable = (q, kv, attn_sink)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in differentiable):
        return record(_SparseAttnScaled, keys, arguments)
    return _forward(keys, arguments)[1]


def _vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
    return vmap_by_loop(SPARSE_ATTN_SCALED, sparse_attn_scaled_fake, info, in_dims, args)


def _vmap_bwd(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
    return vmap_by_loop(SPARSE_ATTN_SCALED_BWD, sparse_attn_scaled_bwd_fake, info, in_dims, args)


def _casting_kernel(device_type: str) -> Any:
    """Return the autocast kernel: what is plain is cast, and payloads stand for numbers of that dtype."""

    def cast_and_call(q: Any, q_scale: Any, kv: Any, kv_scale: Any, indices: Any, d_v: Any, softmax_scale: float,
                      dtype: torch.dtype, *args: Any) -> Any:  # fmt: skip
        autocast_dtype = torch.get_autocast_dtype(device_type)
        q, kv = cast(q, autocast_dtype), cast(kv, autocast_dtype)
        with torch.autocast(device_type, enabled=False):
            dtype = torch.float64 if dtype == torch.float64 else autocast_dtype
            return SPARSE_ATTN_SCALED(q, q_scale, kv, kv_scale, indices, d_v, softmax_scale, dtype, *args)

    return cast_and_call


def _flops(q: Any, q_scale: Any, kv: Any, kv_scale: Any, indices: Any, d_v: int, *args: Any, **kwargs: Any) -> int:
    return sparse_attn_flops(q, kv, indices, d_v)


def _bwd_flops(dout: Any, dlse: Any, q: Any, q_scale: Any, kv: Any, kv_scale: Any, *args: Any, **kwargs: Any) -> int:
    indices, forward_out, lse, d_v, softmax_scale, _, *others = args
    return sparse_attn_bwd_flops(dout, dlse, q, kv, indices, forward_out, lse, d_v, softmax_scale, *others, **kwargs)


def register() -> None:
    """Attach fakes, kernels, the formula and what transforms need to the operators."""
    torch.library.register_fake("mla::sparse_attn_scaled", sparse_attn_scaled_fake, lib=LIBRARY)
    torch.library.register_fake("mla::sparse_attn_scaled_bwd", sparse_attn_scaled_bwd_fake, lib=LIBRARY)
    LIBRARY.impl("sparse_attn_scaled", sparse_attn_scaled_impl, "CompositeExplicitAutograd")
    LIBRARY.impl("sparse_attn_scaled_bwd", sparse_attn_scaled_bwd_impl, "CompositeExplicitAutograd")
    LIBRARY.impl("sparse_attn_scaled", _sparse_attn_scaled, "Autograd", with_keyset=True)
    last = last_derivative(SPARSE_ATTN_SCALED_BWD, SPARSE_ATTN_SCALED)
    LIBRARY.impl("sparse_attn_scaled_bwd", last, "Autograd", with_keyset=True)
    for device_type in AUTOCAST_DEVICES:
        key = f"Autocast{device_type.upper()}"
        LIBRARY.impl("sparse_attn_scaled", _casting_kernel(device_type), key)
        LIBRARY.impl("sparse_attn_scaled_bwd", preserving_kernel(SPARSE_ATTN_SCALED_BWD, device_type), key)
    torch.library.register_vmap("mla::sparse_attn_scaled", _vmap, lib=LIBRARY)
    torch.library.register_vmap("mla::sparse_attn_scaled_bwd", _vmap_bwd, lib=LIBRARY)
    register_flop_formulas({torch.ops.mla.sparse_attn_scaled: _flops, torch.ops.mla.sparse_attn_scaled_bwd: _bwd_flops})
