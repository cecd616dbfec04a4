"""`mla-ops tune`: time launch configurations of one problem on this GPU and keep the fastest.

The file it writes is used by every process that runs with `MLA_OPS_TUNED_ROWS` set to its path. Rows of other problems
that the file already holds stay.
"""

from __future__ import annotations

import argparse
import multiprocessing
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import product
from typing import TypeVar

import torch

from mla_ops.bench.provenance import header
from mla_ops.bench.requirements import require, require_writable
from mla_ops.bench.shapes import Shape, check_sizes
from mla_ops.device import DeviceTraits, pick_device, traits_of
from mla_ops.errors import UnsupportedProblemError
from mla_ops.ops.sparse_attn.backends import select
from mla_ops.ops.sparse_attn.call import Gradients, Hints, Results, Side
from mla_ops.ops.sparse_attn.configs.launch import BwdConfig, FwdConfig, bwd_smem_bytes, fwd_smem_bytes
from mla_ops.ops.sparse_attn.configs.lookup import backward_configs, forward_config, key_of
from mla_ops.ops.sparse_attn.configs.tuned import TunedRow, read_rows, write_rows
from mla_ops.ops.sparse_attn.triton.direct import run_backward, run_forward
from mla_ops.ops.sparse_attn.triton.kernel_sets import PORTABLE, choose
from mla_ops.settings import override

ELEMENT_SIZE = 2  # bf16; fp16 takes the same rows
SIDES: tuple[Side, ...] = ("forward", "backward")
# A candidate is right when it gives the results of the table's configuration to this relative norm: bf16 has 0.4 %.
TOLERANCE = 1e-2

Config = TypeVar("Config", FwdConfig, BwdConfig)


def run_tune(arguments: argparse.Namespace) -> int:
    """Measure, print what was gained, and write the row; returns the exit status."""
    check_sizes(arguments)
    require("tqdm", "mla-ops tune")
    with override(tuned_rows=""):  # against the tables, and whether or not the file to write is the one in use
        return _tune(arguments)


def _tune(arguments: argparse.Namespace) -> int:
    device = pick_device("auto")
    if device.type != "cuda":
        raise UnsupportedProblemError(
            "mla-ops tune measures on a CUDA device, none was found; run it on the GPU to tune for"
        )
    traits, out = traits_of(device), arguments.out
    require_writable(out)
    if out.exists():
        read_rows(out)
    shape = Shape(
        B=arguments.batch, Sq=arguments.seq_q, Skv=arguments.seq_kv, H=arguments.heads,
        d_total=arguments.d_total, d_v=arguments.d_v, topk=arguments.topk,
    )  # fmt: skip
    problem, hints = shape.problem(needs_grad=True), Hints(shape.B, shape.Sq, shape.Skv)
    select(problem, traits).require_backend()
    specialised, specialised_bwd = (
        None if choice.kernels is PORTABLE else choice.config
        for choice in (choose(side, problem, hints, traits) for side in SIDES)
    )
    if specialised and specialised_bwd:
        print(f"nothing to tune: the warp-specialised kernels run with {specialised} and {specialised_bwd}")
        return 0
    forwards = [] if specialised else list(forward_candidates(shape, traits))
    backwards = [] if specialised_bwd else list(backward_candidates(shape, traits))
    compiled = _compile_all(replace(shape, B=1, Sq=2), [*forwards, *backwards], arguments.jobs)
    forwards = [config for config in forwards if config in compiled]
    backwards = [config for config in backwards if config in compiled]

    torch.manual_seed(0)
    call, dout = shape.draw_call()
    results = run_forward(call)

    def forward(config: FwdConfig) -> tuple[torch.Tensor, ...]:
        return run_forward(call, config=config, num_splits=1)

    def backward(config: BwdConfig) -> tuple[torch.Tensor, ...]:
        return run_backward(call, results, Gradients(dout, None), configs=(config,))[:2]

    if specialised:
        print(f"forward: nothing to tune, the warp-specialised kernel runs with {specialised}")
    fwd = None if specialised else _fastest("forward", forwards, forward)
    bwd: tuple[BwdConfig, ...] | None = None if specialised_bwd else (_fastest("backward", backwards, backward),)
    key = key_of(problem, traits)
    rows = read_rows(out) if out.exists() else ()
    for earlier in (other for other in rows if other.is_for(key)):  # a side that was tuned with other lengths stays
        fwd, bwd = fwd or earlier.fwd, bwd or earlier.bwd
    row = TunedRow(traits.arch, shape.d_total, shape.d_v, shape.H, ELEMENT_SIZE, fwd, bwd)
    kept = [other for other in rows if not other.is_for(key)]
    write_rows(out, header(device), [*kept, row])
    print(f"wrote {out} ({len(kept) + 1} rows); use it with MLA_OPS_TUNED_ROWS={out}")
    return 0


def forward_candidates(shape: Shape, traits: DeviceTraits) -> Iterator[FwdConfig]:
    """Yield the table's configuration, then its neighbourhood as far as shared memory goes."""
    key = key_of(shape.problem(), traits)
    present = forward_config(key)
    if present is None:
        raise UnsupportedProblemError(f"no forward configuration of d_total={shape.d_total} fits {traits}")
    yield present
    for block_k, num_warps, num_stages, max_registers in product((16, 32, 64, 128), (1, 2, 4, 8), (2, 3), (None, 168)):
        if not 16 <= block_k // num_warps <= 64:  # a warp needs 16 keys for a product and spills with more than 64
            continue
        config = replace(
            present, block_k=block_k, num_warps=num_warps, num_stages=num_stages, max_registers=max_registers
        )
        if config != present and fwd_smem_bytes(config, key) <= traits.smem_bytes:
            yield config


def backward_candidates(shape: Shape, traits: DeviceTraits) -> Iterator[BwdConfig]:
    """Yield the table's configuration (of a dq pass and a dkv pass, the last), then its neighbourhood."""
    key = key_of(shape.problem(), traits)
    configs = backward_configs(key)
    if configs is None:
        raise UnsupportedProblemError(f"no backward configuration of d_total={shape.d_total} fits {traits}")
    present = configs[-1]
    yield present
    for block_k, num_warps, num_stages, is_ahead in product((16, 32, 64), (1, 2, 4), (2, 3), (True, False)):
        if not 8 <= block_k // num_warps <= 32:
            continue
        config = replace(present, block_k=block_k, num_warps=num_warps, num_stages=num_stages, is_ahead=is_ahead)
        if config != present and bwd_smem_bytes(config, key) <= traits.smem_bytes:
            yield config


def _compile_all(shape: Shape, configs: list[FwdConfig | BwdConfig], jobs: int) -> set[FwdConfig | BwdConfig]:
    """Return the configurations that the device has room for."""
    from tqdm import tqdm

    compiled = set()

    with (
        # An interrupt is the parent's to tell; the processes end with their present configuration.
        ProcessPoolExecutor(
            jobs,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=signal.signal,
            initargs=(signal.SIGINT, signal.SIG_IGN),
        ) as pool,
        tqdm(total=len(configs), desc="compile", unit="config", dynamic_ncols=True) as progress,
    ):
        for config, failure in zip(configs, pool.map(_compile, [(shape, c) for c in configs]), strict=True):
            progress.update()
            if failure is None:
                compiled.add(config)
            else:
                progress.write(f"{config} left out: {failure}")
    return compiled


def _compile(task: tuple[Shape, FwdConfig | BwdConfig]) -> str | None:
    """Launch a configuration once, in a process of its own, to fill Triton's cache on disk; return why it can't be."""
    from triton.runtime.errors import OutOfResources

    shape, config = task
    try:
        _launch_once(shape, config)
    except OutOfResources as error:
        return str(error)
    return None


def _launch_once(shape: Shape, config: FwdConfig | BwdConfig) -> None:
    call, dout = shape.draw_call()
    if isinstance(config, FwdConfig):
        run_forward(call, config=config, num_splits=1)
    else:
        lse = torch.zeros(call.q.shape[:-1], device="cuda")
        run_backward(call, Results(dout, lse), Gradients(dout, None), configs=(config,))
    torch.cuda.synchronize()


def _fastest(side: str, candidates: list[Config], run: Callable[[Config], tuple[torch.Tensor, ...]]) -> Config:
    """Return the fastest of `candidates` among those that agree with the first, the table's."""
    import triton.testing
    from tqdm import tqdm

    expected = run(candidates[0])
    best, best_ms, first_ms = candidates[0], float("inf"), float("inf")
    with tqdm(candidates, desc=side, unit="config", dynamic_ncols=True) as progress:
        for config in progress:
            if not all(_close(a, b) for a, b in zip(run(config), expected, strict=True)):
                progress.write(f"{side}: {config} gives other results than the table's configuration; left out")
                continue
            ms = float(triton.testing.do_bench(partial(run, config), warmup=10, rep=50, return_mode="median"))
            first_ms = ms if config == candidates[0] else first_ms
            if ms < best_ms:
                best, best_ms = config, ms
                progress.set_postfix_str(f"{first_ms / best_ms:.3f}x the table's speed")
    print(f"{side}: {first_ms / best_ms:.3f}x the speed of the table's configuration, with {best}")
    return best


def _close(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    difference = (actual.float() - expected.float()).norm()
    return bool(difference <= TOLERANCE * expected.float().norm())
