"""The Triton backend: launchers of the kernels, with configurations taken from tables and never tuned at run time.

The launchers allocate from shapes, never synchronise with the device and read no data, so they can be captured. They
run below the dispatcher in eager, and are traced with `wrap=torch.library.wrap_triton` when a compiler inlines them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch

from mla_ops.device import DeviceTraits, traits_of
from mla_ops.errors import UnsupportedProblemError
from mla_ops.launching import (
    aligned_like_contiguous,
    alignment,
    outer_strides,
    unfilled,
    with_unit_inner_stride,
)
from mla_ops.ops.sparse_attn.call import Hints, SparseAttnProblem
from mla_ops.ops.sparse_attn.configs.launch import (
    BwdConfig,
    FwdConfig,
    HopperBwdConfig,
    HopperConfig,
    chunk_widths,
    launch_options,
    program_count,
    wave_programs,
)
from mla_ops.ops.sparse_attn.configs.lookup import MAX_D_TOTAL, backward_configs, forward_config
from mla_ops.ops.sparse_attn.triton import hopper
from mla_ops.ops.sparse_attn.triton.deterministic import dkv_in_query_order
from mla_ops.ops.sparse_attn.triton.forward import (
    INT32_OFFSETS,
    HopperForwardPlan,
    fitting,
    plan_forward,
    split_count,
)
from mla_ops.ops.sparse_attn.triton.key_order import add_in_key_order, rows_per_launch
from mla_ops.settings import current

_SUPPORTED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# What this process has launched, as (d_total, d_v, heads, kv_group, dtype, configuration); for `describe_launch`.
_launched: set[tuple[object, ...]] = set()

# What a program of the merge kernel has in registers at a time.
MERGED_CHANNELS, MERGED_SPLITS = 128, 8

# Applied to a kernel before it is launched: nothing in eager, `torch.library.wrap_triton` in a trace.
Wrap = Callable[[Any], Any]

_Out = torch.Tensor | None


def _identity(kernel: Any) -> Any:
    return kernel


class TritonBackend:
    """CUDA devices from compute capability 8.0 on."""

    name = "triton"

    def unsupported_reasons(self, problem: SparseAttnProblem, traits: DeviceTraits) -> list[str]:
        """See `Backend.unsupported_reasons`."""
        reasons = []
        if traits.type != "cuda":
            reasons.append(f"device is {traits.type}, needs CUDA; move the tensors to a GPU")
        elif traits.arch < 80:
            have = f"{traits.arch // 10}.{traits.arch % 10}"
            reasons.append(f'compute capability is {have}, needs 8.0 or later; pass backend="eager" on this device')
        if not _has_triton():
            reasons.append("triton is not installed, needs triton>=3.6; pip install triton")
        if problem.dtype not in _SUPPORTED_DTYPES:
            reasons.append(f"dtype is {problem.dtype}, needs bf16, fp16 or fp32; cast q and kv")
        if problem.kv_format != "dense":
            reasons.append(f"kv_format is {problem.kv_format!r}, needs 'dense'; dequantise kv first")
        if problem.d_total > MAX_D_TOTAL:
            reasons.append(f'd_total is {problem.d_total}, needs at most {MAX_D_TOTAL}; pass backend="eager"')
        if not reasons:
            reasons.extend(self._shared_memory_reasons(problem, traits))
        return reasons

    def _shared_memory_reasons(self, problem: SparseAttnProblem, traits: DeviceTraits) -> list[str]:
        heads = max(1, problem.heads_per_group)  # no heads: nothing is launched
        key = (traits.arch, traits.smem_bytes, heads, *problem.widths)
        sides = [("forward", forward_config)] + ([("backward", backward_configs)] if problem.needs_grad else [])
        return [
            f"no {side} configuration fits: the device has {traits.smem_bytes} B of shared memory per block, which is "
            f"too little for 16 rows of d_total={problem.d_total} in {problem.dtype}; cast q and kv to bf16 or fp16"
            for side, configs in sides
            if configs(*key) is None
        ]

    def auto_excluded_reason(self, problem: SparseAttnProblem, traits: DeviceTraits) -> str | None:
        """See `Backend.auto_excluded_reason`."""
        return None

    def describe_launch(self, problem: SparseAttnProblem, traits: DeviceTraits, hints: Hints) -> tuple[str, ...]:
        """See `Backend.describe_launch`."""
        heads, widths = problem.heads_per_group, problem.widths
        if heads == 0:
            return ("no heads: nothing is launched",)
        key = (traits.arch, traits.smem_bytes, heads, *widths, current().tuned_rows)
        is_deterministic = torch.are_deterministic_algorithms_enabled()
        launches: list[tuple[str, object]] = []
        rows = hints.batch * hints.seq_q
        specialised = hopper.automatic_config(
            traits, rows, problem.heads, problem.kv_group, problem.topk, widths, current().tuned_rows
        )
        fwd = forward_config(*key)
        if specialised is not None:
            launches.append((f"forward: {specialised}", specialised))
        elif fwd is not None:
            programs = program_count(rows, problem.heads, problem.kv_group, fwd.block_h)
            splits = split_count(programs, problem.topk, fwd, traits, *widths)
            launches.append((f"forward: {fwd}, slots split over {splits} programs", fwd))
        specialised_bwd = hopper.automatic_backward_config(
            traits, rows, problem.heads, problem.kv_group, problem.topk, widths, current().tuned_rows
        )
        bwds = (backward_configs(*key, is_deterministic) or ()) if specialised_bwd is None else (specialised_bwd,)
        for bwd in bwds if problem.needs_grad else ():
            launch_rows = None
            if bwd is bwds[-1] and not is_deterministic:  # a dq pass before it adds nothing
                launch_rows = rows_per_launch(
                    bwd, traits, hints.seq_kv, problem.heads, problem.kv_group, problem.topk, widths
                )
            order = "" if launch_rows is None else f", in key order, {launch_rows} queries a launch"
            launches.append((f"backward: {bwd}{order}", bwd))
        sizes = (problem.d_total, problem.d_v, problem.heads, problem.kv_group, problem.dtype)
        cold = "; not warm: mla_ops.warmup(...) compiles it ahead of the first call"
        return tuple(text + ("; warm" if (*sizes, config) in _launched else cold) for text, config in launches)

    def forward(
        self,
        q: torch.Tensor,
        kv: torch.Tensor,
        indices: torch.Tensor,
        d_v: int,
        softmax_scale: float,
        topk_length: torch.Tensor | None,
        attn_sink: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Backend.forward`."""
        return launch_forward(q, kv, indices, d_v, softmax_scale, topk_length, attn_sink)

    def max_logits(
        self,
        q: torch.Tensor,
        kv: torch.Tensor,
        indices: torch.Tensor,
        d_v: int,
        softmax_scale: float,
        topk_length: torch.Tensor | None,
    ) -> torch.Tensor:
        """See `Backend.max_logits`."""
        return launch_forward(q, kv, indices, d_v, softmax_scale, topk_length, None, max_logits_only=True)[1]

    def backward(
        self,
        dout: torch.Tensor | None,
        dlse: torch.Tensor | None,
        q: torch.Tensor,
        kv: torch.Tensor,
        indices: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        d_v: int,
        softmax_scale: float,
        topk_length: torch.Tensor | None,
        attn_sink: torch.Tensor | None,
        need_dq: bool,
        need_dkv: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `Backend.backward`."""
        return launch_backward(
            dout, dlse, q, kv, indices, out, lse, d_v, softmax_scale, topk_length, attn_sink, need_dq, need_dkv
        )


def launch_forward(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    d_v: int,
    softmax_scale: float,
    topk_length: torch.Tensor | None,
    attn_sink: torch.Tensor | None,
    *,
    max_logits_only: bool = False,
    num_splits: int | None = None,
    use_int64_offsets: bool | None = None,
    config: FwdConfig | HopperConfig | None = None,
    traits: DeviceTraits | None = None,
    wrap: Wrap = _identity,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the forward kernel, and the merge kernel when a row's slots are shared out over `num_splits` programs.

    With a `HopperConfig`, or where one is automatic, it is the warp-specialised kernel instead: in eager, for `out` and
    lse, never split. A trace takes the plain kernel, because compilers inline Triton and not Gluon.

    With `max_logits_only` the second result is the largest logit of each head instead of lse, and the first is empty.
    The other keyword arguments replace what is derived otherwise (`num_splits` must be given when sizes are symbolic,
    and without `use_int64_offsets` a guard is added then); `wrap` is applied to every kernel that is launched.
    """
    traits = traits or traits_of(q.device)
    q, kv, indices = with_unit_inner_stride(q), with_unit_inner_stride(kv), with_unit_inner_stride(indices)
    is_traced = wrap is not _identity
    if q.numel() == 0:  # no queries or no heads
        out_shape = (0,) if max_logits_only else (*q.shape[:-1], d_v)
        return q.new_empty(out_shape), q.new_empty(q.shape[:-1], dtype=torch.float32)
    make_plan = plan_forward.__wrapped__ if is_traced else plan_forward  # symbols have no hash
    plan = make_plan(
        q.shape, q.stride(), kv.shape, kv.stride(), indices.shape, indices.stride(), d_v, q.dtype, traits,
        current().tuned_rows, config, num_splits, use_int64_offsets, max_logits_only, is_traced,
    )  # fmt: skip
    out = unfilled((0,) if max_logits_only else plan.out_shape, q.dtype, q, is_traced=is_traced)
    lse = unfilled(plan.lse_shape, torch.float32, q, is_traced=is_traced)
    topk_length, attn_sink = _contiguous(topk_length), _contiguous(attn_sink)
    if isinstance(plan, HopperForwardPlan):
        hopper.launch_forward(q, kv, indices, softmax_scale, topk_length, attn_sink, out, lse, plan.config, traits)
        _launched.add(plan.launched)
        return out, lse
    kernel_out, kernel_lse = (None if max_logits_only else out), lse
    num_splits = plan.grid[1]
    is_split = num_splits > 1
    if is_split:
        if not max_logits_only:
            kernel_out = unfilled((*plan.partials, d_v), torch.float32, q, is_traced=is_traced)
        kernel_lse = unfilled(plan.partials, torch.float32, q, is_traced=is_traced)

    forward_kernel, merge_kernel = _forward_kernels()
    wrap(forward_kernel)[plan.grid](
        q, *plan.q_strides, kv, *plan.kv_strides, indices, *plan.indices_strides,
        topk_length, attn_sink, kernel_out, kernel_lse, softmax_scale,
        *plan.sizes, *plan.constants, _input_precision(q), is_split, softmax_scale < 0, **plan.options,
    )  # fmt: skip
    if max_logits_only:
        return out, kernel_lse.amax(1).view(lse.shape) if is_split else lse
    if not is_traced:
        _launched.add(plan.launched)
    if is_split:
        rows, _, heads = plan.partials
        block_d = min(MERGED_CHANNELS, 1 << (d_v - 1).bit_length())
        block_h = MERGED_CHANNELS // block_d
        wrap(merge_kernel)[(program_count(rows, heads, 1, block_h) * -(-d_v // block_d),)](
            kernel_out, kernel_lse, attn_sink, out, lse, num_splits,
            heads, d_v, MERGED_SPLITS, block_h, block_d, num_warps=1,
        )  # fmt: skip
    return out, lse


@lru_cache(maxsize=1)
def _forward_kernels() -> tuple[Any, Any]:
    """Return the forward kernel and the merge kernel; importing them imports triton."""
    from mla_ops.ops.sparse_attn.kernels.forward import _sparse_attn_fwd_kernel
    from mla_ops.ops.sparse_attn.kernels.forward_split import _sparse_attn_merge_kernel

    return _sparse_attn_fwd_kernel, _sparse_attn_merge_kernel


def launch_backward(
    dout: torch.Tensor | None,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    d_v: int,
    softmax_scale: float,
    topk_length: torch.Tensor | None,
    attn_sink: torch.Tensor | None,
    need_dq: bool,
    need_dkv: bool,
    *,
    use_int64_offsets: bool | None = None,
    configs: tuple[BwdConfig | HopperBwdConfig, ...] | None = None,
    traits: DeviceTraits | None = None,
    wrap: Wrap = _identity,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run the backward kernel: once for both gradients, or once for each if the table's row says so.

    With `HopperBwdConfig`, or where one is automatic, it is the warp-specialised kernel instead, in eager: a trace
    takes the plain kernel, because compilers inline Triton and not Gluon.

    dkv is summed in fp32: by atomics, or with `torch.use_deterministic_algorithms(True)` in the order of the queries.
    Atomics go through the keys in order where dkv exceeds the cache, but not in a trace: see `triton_key_order.py`.
    """
    from mla_ops.ops.sparse_attn.kernels.backward import _sparse_attn_bwd_kernel

    traits = traits or traits_of(q.device)
    q, kv, indices = with_unit_inner_stride(q), with_unit_inner_stride(kv), with_unit_inner_stride(indices)
    seq_q, heads, d_total = q.shape[-3:]
    seq_kv, kv_group = kv.shape[-3:-1]
    rows = seq_q if q.dim() == 3 else q.shape[0] * seq_q
    if rows == 0 or heads == 0:
        dsink_shape = 0 if attn_sink is None else attn_sink.shape
        return (
            q.new_zeros(q.shape if need_dq else 0),
            kv.new_zeros(kv.shape if need_dkv else 0),
            lse.new_zeros(dsink_shape),
        )
    is_traced = wrap is not _identity
    is_deterministic = need_dkv and torch.are_deterministic_algorithms_enabled()
    widths = (d_total, d_v, q.element_size())
    if configs is None:
        tuned_rows = current().tuned_rows
        if not is_traced:
            specialised = hopper.automatic_backward_config(
                traits, rows, heads, kv_group, indices.shape[-1], widths, tuned_rows
            )
            configs = None if specialised is None else (specialised,)
        if configs is None:
            key = (traits.arch, traits.smem_bytes, heads // kv_group, *widths, tuned_rows, is_deterministic)
            configs = fitting(backward_configs(*key), "backward", d_total, q.dtype, traits)
    if any(isinstance(config, HopperBwdConfig) for config in configs):
        if is_traced:
            raise UnsupportedProblemError("a HopperBwdConfig is for an eager call, got traced=True; pass BwdConfigs")
        q, kv = hopper.with_aligned_rows(q), hopper.with_aligned_rows(kv)
    topk_length, attn_sink, dlse = _contiguous(topk_length), _contiguous(attn_sink), _contiguous(dlse)
    out, lse = out.contiguous(), lse.contiguous()
    strides = (*outer_strides(q.stride()), *outer_strides(kv.stride()))
    do_strides = (0, 0, 0)
    if dout is not None:
        dout = aligned_like_contiguous(dout)
        do_strides = outer_strides(dout.stride())
    if use_int64_offsets is None:
        use_int64_offsets = bool(seq_kv * max(strides[4], kv_group * d_total) >= INT32_OFFSETS)

    def run(
        config: BwdConfig | HopperBwdConfig, dq: _Out, dkv: _Out, dsink: _Out,
        indices: torch.Tensor = indices, places: _Out = None, first_row: int = 0, num_rows: int = rows,
    ) -> None:  # fmt: skip
        if isinstance(config, HopperBwdConfig):
            hopper.launch_backward(
                dout, dlse, q, kv, indices, out, lse, softmax_scale, topk_length, attn_sink, dq, dkv, dsink,
                config, traits, places=places, first_row=first_row, num_rows=num_rows,
            )  # fmt: skip
        else:
            has_far_places = places is not None and dkv is not None and dkv.numel() >= INT32_OFFSETS
            wrap(_sparse_attn_bwd_kernel)[(program_count(num_rows, heads, kv_group, config.block_h),)](
                q, *strides[:3], kv, *strides[3:], indices, *outer_strides(indices.stride()),
                topk_length, attn_sink, out, lse, dout, *do_strides, dlse, dq, dkv, dsink, places,
                softmax_scale, first_row, seq_q, seq_kv, indices.shape[-1],
                heads, kv_group, d_total, d_v,
                config.block_h, config.block_k, *chunk_widths(d_total, d_v, config.max_chunk),
                alignment(strides), use_int64_offsets or has_far_places, _input_precision(q),
                config.is_key_major, config.is_ahead,
                **launch_options(config),
            )  # fmt: skip
        if not is_traced:
            _launched.add((d_total, d_v, heads, kv_group, q.dtype, config))

    dq = unfilled(q.shape, q.dtype, q, is_traced=is_traced) if need_dq else None
    dkv = None
    dsink = None if attn_sink is None else unfilled(lse.shape, lse.dtype, lse, is_traced=is_traced)
    two_passes = need_dq and need_dkv and len(configs) == 2
    if two_passes or (not need_dkv and (need_dq or dsink is not None)):
        run(configs[0], dq, None, dsink)
    if need_dkv:
        config = configs[-1]
        others = (None, None) if two_passes else (dq, dsink)
        if is_deterministic:
            dkv = dkv_in_query_order(
                lambda partial, *rows: run(config, others[0], partial, others[1], indices, *rows),
                kv, indices, topk_length, program_count(1, heads // kv_group, kv_group=1, block_h=config.block_h),
                wave_programs(config, traits.num_sms), wrap, is_traced=is_traced,
            )  # fmt: skip
        else:
            dkv = q.new_zeros(kv.shape, dtype=torch.float32)
            launch_rows = None
            if not is_traced:
                launch_rows = rows_per_launch(config, traits, seq_kv, heads, kv_group, indices.shape[-1], widths)
            if launch_rows is None:
                run(config, others[0], dkv, others[1])
            else:
                add_in_key_order(
                    lambda ordered, *rows: run(config, others[0], dkv, others[1], ordered, None, *rows),
                    indices, topk_length, launch_rows,
                )  # fmt: skip
    if dkv is not None:
        dkv = dkv.to(kv.dtype)
    if dsink is not None:
        dsink = dsink.view(-1, heads).sum(0)
    return (
        q.new_empty(0) if dq is None else dq,
        kv.new_empty(0) if dkv is None else dkv,
        lse.new_empty(0) if dsink is None else dsink,
    )


def _contiguous(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _input_precision(q: torch.Tensor) -> str:
    """Return how fp32 products are made; see `torch.backends.cuda.matmul.fp32_precision`."""
    if q.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "ieee"


@lru_cache(maxsize=1)
def _has_triton() -> bool:
    return find_spec("triton") is not None
