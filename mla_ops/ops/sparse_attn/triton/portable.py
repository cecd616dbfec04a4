"""The portable kernel set: Triton kernels for every device from sm80 on, any width up to MAX_D_TOTAL, inlinable."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch

from mla_ops.device import DeviceTraits
from mla_ops.launching import INT32_OFFSETS, Wrap, alignment, as_it_is, outer_strides, unfilled
from mla_ops.ops.sparse_attn.call import Gradients, Hints, Results, Side, SparseAttnCall, SparseAttnProblem
from mla_ops.ops.sparse_attn.configs.launch import (
    BwdConfig,
    ConfigKey,
    FwdConfig,
    chunk_widths,
    fwd_smem_bytes,
    launch_options,
    program_count,
    programs_by_registers,
)
from mla_ops.ops.sparse_attn.configs.lookup import backward_configs, forward_config, key_of
from mla_ops.ops.sparse_attn.triton.launch import Into

# What a program of the merge kernel has in registers at a time.
MERGED_CHANNELS, MERGED_SPLITS = 128, 8


class PortableForward(NamedTuple):
    """What sizes and strides decide about a launch of the forward kernel."""

    grid: tuple[int, int]
    partials: tuple[int, int, int]  # rows, splits, heads: the shape of a partial lse
    q_strides: tuple[int, int, int]
    kv_strides: tuple[int, int, int]
    indices_strides: tuple[int, int, int]
    sizes: tuple[int, int, int, int]  # seq_q, seq_kv, topk, slots_per_split
    constants: tuple[int | bool, ...]  # of the kernel, from HEADS to USE_INT64_OFFSETS
    options: dict[str, Any]

    @property
    def num_splits(self) -> int:
        """Over how many programs the slots of a row are shared out."""
        return self.grid[1]


class PortableBackward(NamedTuple):
    """What sizes and strides decide about launches of the backward kernel for one pass."""

    programs_per_row: int
    q_strides: tuple[int, int, int]
    kv_strides: tuple[int, int, int]
    constants: tuple[int, ...]  # of the kernel, from HEADS to STRIDE_ALIGN
    use_int64_offsets: bool
    orders: tuple[bool, bool]  # IS_KEY_MAJOR, IS_AHEAD
    options: dict[str, Any]


class PortableKernels:
    """See the module's docstring, and `KernelSet` for the methods."""

    name = "portable"
    is_inlinable = True

    def refusal(self, side: Side, problem: SparseAttnProblem, hints: Hints | None, traits: DeviceTraits) -> str | None:
        """Return why no kernel of this set can run a side of `problem`: 16 rows must fit shared memory."""
        if traits.vendor != "nvidia" or traits.arch < 80:
            return f"the device is {traits}, they need one of nvidia with compute capability 8.0 or later"
        key = key_of(problem, traits)
        if side == "backward":
            is_fitting, name = backward_configs(key) is not None, "backward"
        else:
            is_fitting, name = forward_config(key) is not None, "forward"
        if is_fitting:
            return None
        return (
            f"no {name} configuration fits: the device has {traits.smem_bytes} B of shared memory per block, which is "
            f"too little for 16 rows of d_total={problem.d_total} in {problem.dtype}; cast q and kv to bf16 or fp16"
        )

    def config(
        self, side: Side, key: ConfigKey, tuned_rows: str, *, is_deterministic: bool = False
    ) -> FwdConfig | tuple[BwdConfig, ...] | None:
        """Return the configuration of a user's tuned row, else of the tables; of a backward, one for each pass."""
        if side == "backward":
            return backward_configs(key, tuned_rows, is_deterministic)
        return forward_config(key, tuned_rows)

    def plan_forward(
        self,
        call: SparseAttnCall,
        config: FwdConfig,
        traits: DeviceTraits,
        num_splits: int | None,
        use_int64_offsets: bool | None,
    ) -> PortableForward:
        """Plan a launch of the forward kernel; what is None is derived. Sizes and strides may be symbolic."""
        q, kv, indices, d_v, *_ = call
        seq_q, heads, d_total = q.shape[-3:]
        seq_kv, kv_group = kv.shape[-3:-1]
        topk = indices.shape[-1]
        programs = program_count(call.rows, heads, kv_group, config.block_h)
        if num_splits is None:
            num_splits = split_count(programs, topk, config, traits, key_of(SparseAttnProblem.of(call), traits))
        slots_per_split = topk if num_splits == 1 else -(-topk // (num_splits * config.block_k)) * config.block_k
        q_strides, kv_strides = outer_strides(q.stride()), outer_strides(kv.stride())
        if use_int64_offsets is None:
            use_int64_offsets = bool(seq_kv * kv_strides[1] >= INT32_OFFSETS)
        return PortableForward(
            grid=(programs, num_splits),
            partials=(call.rows, num_splits, heads),
            q_strides=q_strides,
            kv_strides=kv_strides,
            indices_strides=outer_strides(indices.stride()),
            sizes=(seq_q, seq_kv, topk, slots_per_split),
            constants=(
                *(heads, kv_group, d_total, d_v, config.block_h, config.block_k),
                *chunk_widths(d_total, d_v, config.max_chunk),
                *(alignment((*q_strides, *kv_strides)), use_int64_offsets),
            ),
            options=launch_options(config),
        )

    def run_forward(
        self,
        call: SparseAttnCall,
        out: torch.Tensor | None,
        lse: torch.Tensor,
        plan: PortableForward,
        wrap: Wrap,
    ) -> torch.Tensor:
        """Run the forward kernel, and the merge kernel when a row's slots are shared out over programs."""
        q, kv, indices, d_v, softmax_scale, topk_length, attn_sink = call
        is_traced = wrap is not as_it_is
        kernel_out, kernel_lse = out, lse
        num_splits = plan.grid[1]
        is_split = num_splits > 1
        if is_split:
            if out is not None:
                kernel_out = unfilled((*plan.partials, d_v), torch.float32, q, is_traced=is_traced)
            kernel_lse = unfilled(plan.partials, torch.float32, q, is_traced=is_traced)
        wrap(_forward_kernels()[0])[plan.grid](
            q, *plan.q_strides, kv, *plan.kv_strides, indices, *plan.indices_strides,
            topk_length, attn_sink, kernel_out, kernel_lse, softmax_scale,
            *plan.sizes, *plan.constants, _input_precision(q), is_split, softmax_scale < 0, **plan.options,
        )  # fmt: skip
        if not is_split:
            return lse
        if out is None or kernel_out is None:
            return kernel_lse.amax(1).view(lse.shape)
        run_merge(kernel_out, kernel_lse, attn_sink, out, lse, wrap)
        return lse

    def plan_backward(self, call: SparseAttnCall, config: BwdConfig, use_int64_offsets: bool) -> PortableBackward:
        """Plan launches of the backward kernel for one pass. Sizes and strides may be symbolic."""
        q, kv, d_v = call.q, call.kv, call.d_v
        heads, d_total = q.shape[-2:]
        kv_group = kv.shape[-2]
        q_strides, kv_strides = outer_strides(q.stride()), outer_strides(kv.stride())
        return PortableBackward(
            programs_per_row=program_count(1, heads, kv_group, config.block_h),
            q_strides=q_strides,
            kv_strides=kv_strides,
            constants=(
                *(heads, kv_group, d_total, d_v, config.block_h, config.block_k),
                *chunk_widths(d_total, d_v, config.max_chunk),
                alignment((*q_strides, *kv_strides)),
            ),
            use_int64_offsets=use_int64_offsets,
            orders=(config.is_key_major, config.is_ahead),
            options=launch_options(config),
        )

    def prepared(self, call: SparseAttnCall) -> SparseAttnCall:
        """Return `call` as it is: its inner strides are 1."""
        return call

    def run_backward(
        self,
        call: SparseAttnCall,
        results: Results,
        gradients: Gradients,
        into: Into,
        plan: PortableBackward,
        wrap: Wrap,
    ) -> None:
        """Run the backward kernel."""
        q, kv, indices, _, softmax_scale, topk_length, attn_sink = call
        (out, lse), (dout, dlse), (dq, dkv, dsink, places, first_row, num_rows) = results, gradients, into
        do_strides = (0, 0, 0) if dout is None else outer_strides(dout.stride())
        has_far_places = places is not None and dkv is not None and dkv.numel() >= INT32_OFFSETS
        wrap(_backward_kernel())[(num_rows * plan.programs_per_row,)](
            q, *plan.q_strides, kv, *plan.kv_strides, indices, *outer_strides(indices.stride()),
            topk_length, attn_sink, out, lse, dout, *do_strides, dlse, dq, dkv, dsink, places,
            softmax_scale, first_row, q.shape[-3], kv.shape[-3], indices.shape[-1],
            *plan.constants, plan.use_int64_offsets or has_far_places, _input_precision(q), *plan.orders,
            **plan.options,
        )  # fmt: skip


def run_merge(
    partial_out: torch.Tensor,
    partial_lse: torch.Tensor,
    attn_sink: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    wrap: Wrap,
    *,
    is_dependent: bool = False,
) -> None:
    """Merge partial results `[rows, splits, heads, d_v]` and, in fp32, `[rows, splits, heads]` into `out` and `lse`.

    The launch may be dependent where the kernel before it, on sm90 or later, says when dependents may begin.
    """
    rows, num_splits, heads, d_v = partial_out.shape
    block_d = min(MERGED_CHANNELS, 1 << (d_v - 1).bit_length())
    block_h = MERGED_CHANNELS // block_d
    options = {"launch_pdl": True} if is_dependent else {}
    wrap(_forward_kernels()[1])[(program_count(rows, heads, 1, block_h) * -(-d_v // block_d),)](
        partial_out, partial_lse, attn_sink, out, lse, num_splits,
        heads, d_v, MERGED_SPLITS, block_h, block_d, is_dependent, num_warps=1, **options,
    )  # fmt: skip


def needs_int64_offsets(call: SparseAttnCall) -> bool:
    """Return whether an element of `kv`, or of a contiguous gradient of it, lies beyond 32 bits; may add a guard."""
    kv = call.kv
    seq_kv, kv_group, d_total = kv.shape[-3:]
    return bool(seq_kv * max(outer_strides(kv.stride())[1], kv_group * d_total) >= INT32_OFFSETS)


def split_count(programs: int, topk: int, config: FwdConfig, traits: DeviceTraits, key: ConfigKey) -> int:
    """Return over how many programs the slots of one row are shared out.

    To as many programs as take three quarters of the places on the device, if each program gets four blocks or more:
    with fewer blocks, the merge takes longer than the split saves. Three programs for two SMs pay with fewer blocks
    too. More than 32 programs a row never pay. Over 200 sizes (1 to 500 queries, topk 128 to 2048, five shapes) this
    takes 3 % more than the best choice.
    """
    blocks = -(-topk // config.block_k)
    if blocks < 4 or programs == 0:
        return 1
    places = 3 * resident_programs(config, traits, key) // 4
    splits = max(1, min(places // programs, blocks // 4), min(3 * traits.num_sms // 2 // programs, blocks))
    return -(-blocks // -(-blocks // min(32, splits)))


def resident_programs(config: FwdConfig, traits: DeviceTraits, key: ConfigKey) -> int:
    """Return how many programs of the forward kernel a device holds at a time, by shared memory and registers.

    A kernel without a limit takes 168 registers a thread, more or less.
    """
    by_memory = traits.smem_bytes // fwd_smem_bytes(config, key)
    return traits.num_sms * max(1, min(by_memory, programs_by_registers(config, 168)))


def _input_precision(q: torch.Tensor) -> str:
    """Return how fp32 products are made; see `torch.backends.cuda.matmul.fp32_precision`."""
    if q.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "ieee"


@lru_cache(maxsize=1)
def _forward_kernels() -> tuple[Any, Any]:
    """Return the forward kernel and the merge kernel; importing them imports triton."""
    from mla_ops.ops.sparse_attn.kernels.forward import _sparse_attn_fwd_kernel
    from mla_ops.ops.sparse_attn.kernels.forward_split import _sparse_attn_merge_kernel

    return _sparse_attn_fwd_kernel, _sparse_attn_merge_kernel


@lru_cache(maxsize=1)
def _backward_kernel() -> Any:
    from mla_ops.ops.sparse_attn.kernels.backward import _sparse_attn_bwd_kernel

    return _sparse_attn_bwd_kernel
