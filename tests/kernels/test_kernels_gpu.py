"""The Triton kernels against the fp64 oracle, called through their launchers: every semantic the kernels own.

Runs on a GPU, or without one under TRITON_INTERPRET=1 (see test_kernels_interpret.py), where CPU tensors stand in.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from strided_tensors import padded, sliced, transposed

from mla_ops import row_sums
from mla_ops.device import DeviceTraits
from mla_ops.ops.sparse_attn.call import Gradients, Results, SparseAttnCall, Wanted
from mla_ops.ops.sparse_attn.configs.launch import BwdConfig, FwdConfig
from mla_ops.ops.sparse_attn.reference import sparse_attn_reference
from mla_ops.ops.sparse_attn.triton import backward, key_order, portable
from mla_ops.ops.sparse_attn.triton.direct import run_backward, run_forward, run_max_logits
from mla_ops.testing import CONTRACT_CASES, Case, Inputs, assert_matches_oracle, make_inputs

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
# The interpreter multiplies the bit patterns of bf16.
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])
TRAITS = DeviceTraits(type="cuda", arch=90, smem_bytes=232448, num_sms=132, l2_bytes=50 << 20) if INTERPRETED else None

pytestmark = [pytest.mark.usefixtures("poisoned_memory")] + ([] if INTERPRETED else [pytest.mark.gpu])
on_gpu_only = pytest.mark.skipif(INTERPRETED, reason="too large for the interpreter")

SMALL = Case(d_total=128, d_v=64, topk=20, heads=6, kv_group=2, seq_q=3, seq_kv=24)
# A sum in order takes a program for every key and 64 channels, in every chunk of queries: few of both, so that tests of
# many chunks take the interpreter seconds.
FEW_KEYS = replace(SMALL, d_total=40, d_v=24, seq_kv=6, seq_q=4)
Named = dict[str, torch.Tensor]
Launch = tuple[str, dict[str, Any]]  # a kernel's name and its arguments


def run(inputs: Inputs, *, use_dout: bool = True, use_dlse: bool = True, fwd: Any = None, bwd: Any = None) -> Named:
    """Forward and backward; `fwd` and `bwd` are keyword arguments of the launchers."""
    results = forward_of(inputs, **(fwd or {}))
    grads = backward_of(inputs, results, use_dout=use_dout, use_dlse=use_dlse, bwd=bwd)
    return {**results._asdict(), **grads}


def forward_of(inputs: Inputs, **fwd: Any) -> Results:
    return run_forward(SparseAttnCall(*inputs.args), traits=TRAITS, **fwd)


def max_logits_of(inputs: Inputs, **fwd: Any) -> torch.Tensor:
    return run_max_logits(SparseAttnCall(*inputs.args), traits=TRAITS, **fwd)


def backward_of(
    inputs: Inputs, results: Results, *, use_dout: bool = True, use_dlse: bool = True, bwd: Any = None
) -> Named:
    gradients = Gradients(inputs.dout if use_dout else None, inputs.dlse if use_dlse else None)
    grads = run_backward(SparseAttnCall(*inputs.args), results, gradients, traits=TRAITS, **(bwd or {}))
    count = 2 if inputs.attn_sink is None else 3
    return dict(zip(["dq", "dkv", "dsink"][:count], grads[:count], strict=True))


def check(inputs: Inputs, *, fwd: Any = None, bwd: Any = None, **uses: bool) -> Named:
    actual = {**run(inputs, fwd=fwd, bwd=bwd, **uses), "max_logits": max_logits_of(inputs, **(fwd or {}))}
    assert_matches_oracle(actual, inputs, **uses)
    return actual


def check_gradients(inputs: Inputs, results: Results, *, bwd: Any = None, **uses: bool) -> Named:
    """Hold the backward of a forward's results against the oracle, with them and without the largest logits."""
    actual = {**results._asdict(), **backward_of(inputs, results, bwd=bwd, **uses)}
    assert_matches_oracle(actual, inputs, **uses)
    return actual


def assert_same(actual: Named, expected: Named, *, atomics: bool = True) -> None:
    """Assert bitwise equality; dkv may differ by the order of its atomic additions."""
    for name, value in actual.items():
        if name == "dkv" and atomics:
            torch.testing.assert_close(value, expected[name], rtol=1e-2, atol=1e-3 * float(expected[name].abs().max()))
        else:
            assert torch.equal(value, expected[name]), name


def recorder(launches: list[Launch]) -> Callable[[Any], Any]:
    """Return what `launch_*` takes as `wrap`, to append every launch to `launches` and run it."""

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: Any) -> Callable[..., None]:
            def launch(*args: Any, **options: Any) -> None:
                launches.append((self.kernel.fn.__name__, dict(zip(self.kernel.arg_names, args, strict=False))))
                self.kernel[grid](*args, **options)

            return launch

    return Recorder


@contextmanager
def deterministic_algorithms() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CONTRACT_CASES, ids=str)
def test_matches_oracle(case: Case, dtype: torch.dtype) -> None:
    if INTERPRETED and dtype == torch.float16 and case.d_total > 200:
        pytest.skip("wide rows are interpreted in fp32 only, to save time")
    check(make_inputs(case, dtype, DEVICE, topk_length=True, attn_sink=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("d_total", "d_v"),
    [(1024, 1024), (1024, 64), (700, 511), (33, 1), (448, 320), (96, 8)],
    ids=lambda width: str(width),
)
def test_unusual_widths(d_total: int, d_v: int, dtype: torch.dtype) -> None:
    case = Case(d_total=d_total, d_v=d_v, topk=9, heads=2, batch=1, seq_q=2, seq_kv=12)
    check(make_inputs(case, dtype, DEVICE))


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("use", ["plain", "length", "sink"])
def test_optional_arguments(index_dtype: torch.dtype, use: str) -> None:
    inputs = make_inputs(
        SMALL, torch.float32, DEVICE, index_dtype=index_dtype, topk_length=use == "length", attn_sink=use == "sink"
    )
    check(inputs)


def test_lengths_of_64_bits_are_clamped_before_they_are_narrowed() -> None:
    inputs = make_inputs(replace(SMALL, seq_q=4), torch.float32, DEVICE, invalid=False)
    lengths = torch.tensor([-(2**40) + 5, 2**40 + 5, 5, -(2**31)], device=DEVICE).expand(inputs.q.shape[:2])
    check(replace(inputs, topk_length=lengths))
    with deterministic_algorithms():
        check_gradients(cut := replace(inputs, topk_length=lengths), forward_of(cut))


@pytest.mark.parametrize("scale", [0.0, -0.7])
def test_zero_and_negative_scale(scale: float) -> None:
    inputs = replace(make_inputs(SMALL, torch.float32, DEVICE), softmax_scale=scale)
    check(inputs)


def test_infinite_sinks() -> None:
    inputs = make_inputs(SMALL, torch.float32, DEVICE, attn_sink=True)
    inputs.attn_sink[0], inputs.attn_sink[1] = torch.inf, -torch.inf
    results = check(inputs)
    assert (results["out"][..., 0, :] == 0).all()
    assert (results["dsink"][:2] == 0).all()


@pytest.mark.parametrize(("dout", "dlse"), [(True, False), (False, True)])
def test_one_gradient_missing(dout: bool, dlse: bool) -> None:
    inputs = make_inputs(SMALL, torch.float32, DEVICE, attn_sink=True)
    check_gradients(inputs, forward_of(inputs), use_dout=dout, use_dlse=dlse)


def test_needs_flags_skip_one_gradient_and_leave_the_other_unchanged() -> None:
    inputs = make_inputs(SMALL, torch.float32, DEVICE, attn_sink=True)
    results = run(inputs)
    call, of_forward = SparseAttnCall(*inputs.args), Results(results["out"], results["lse"])
    for need_dq, need_dkv in ((True, False), (False, True), (False, False)):
        gradients, wanted = Gradients(inputs.dout, inputs.dlse), Wanted(need_dq, need_dkv)
        dq, dkv, dsink = run_backward(call, of_forward, gradients, wanted, traits=TRAITS)
        assert_same({"dsink": dsink}, results)
        assert dq.shape == (results["dq"].shape if need_dq else (0,))
        assert dkv.shape == (results["dkv"].shape if need_dkv else (0,))
        if need_dq:
            torch.testing.assert_close(dq, results["dq"])
        if need_dkv:
            torch.testing.assert_close(dkv, results["dkv"])


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("need", ["q", "kv"])
def test_a_gradient_that_is_not_needed_is_not_computed(need: str, deterministic: bool) -> None:
    inputs = make_inputs(SMALL, torch.float32, DEVICE)
    results, launches = forward_of(inputs), list[Launch]()
    with deterministic_algorithms() if deterministic else nullcontext():
        run_backward(
            SparseAttnCall(*inputs.args), results, Gradients(inputs.dout, inputs.dlse),
            Wanted(dq=need == "q", dkv=need == "kv"), traits=TRAITS, wrap=recorder(launches),
        )  # fmt: skip
    (arguments,) = (arguments for name, arguments in launches if name == "_sparse_attn_bwd_kernel")
    assert (arguments["dq_ptr"] is None, arguments["dkv_ptr"] is None) == (need == "kv", need == "q")
    sums = ["_rank_slots_kernel", "_place_slots_kernel", "_sum_placed_rows_kernel"]
    expected = sums if deterministic and need == "kv" else []
    assert [name for name, _ in launches if name != "_sparse_attn_bwd_kernel"] == expected


def test_nan_in_unselected_and_empty_rows_stays_there() -> None:
    inputs = make_inputs(SMALL, torch.float32, DEVICE, attn_sink=True)
    inputs.indices[inputs.indices == 0] = -1  # row 0 is where a careless kernel points invalid slots
    expected = run(inputs)
    kv, dout, dlse = inputs.kv.clone(), inputs.dout.clone(), inputs.dlse.clone()
    kv[:, 0] = torch.nan
    dout[:, 0], dlse[:, 0] = torch.nan, torch.nan  # make_inputs leaves the first query without a valid slot
    actual = run(replace(inputs, kv=kv, dout=dout, dlse=dlse))
    assert_same(actual, expected)
    assert (actual["dkv"][:, 0] == 0).all()
    assert torch.isneginf(actual["lse"][:, 0]).all()
    max_logits = max_logits_of(replace(inputs, kv=kv))
    assert torch.equal(max_logits, max_logits_of(inputs))
    assert torch.isneginf(max_logits[:, 0]).all()
    for name in ("out", "dq"):
        assert (actual[name][:, 0] == 0).all()


def test_nan_in_a_selected_row_reaches_the_output() -> None:
    inputs = make_inputs(SMALL, torch.float32, DEVICE, invalid=False)
    inputs.kv[0, inputs.indices[0, 0, 0, 0].item(), 0] = torch.nan
    out, lse = forward_of(inputs)
    assert out[0, 0, 0].isnan().all()
    assert lse[0, 0, 0].isnan()
    for num_splits in (1, 2):
        config = FwdConfig(block_h=16, block_k=16, max_chunk=64, num_warps=4, num_stages=2)
        max_logits = max_logits_of(inputs, num_splits=num_splits, config=config)
        assert max_logits[0, 0, 0].isnan()
        assert max_logits[1].isfinite().all()


def test_a_very_negative_logit_outweighs_padding() -> None:
    inputs = make_inputs(SMALL, torch.float32, DEVICE, invalid=False)
    inputs.indices[..., 1:] = -1
    inputs = replace(inputs, q=torch.full_like(inputs.q, -1.0), kv=inputs.kv.abs() + 1.0, softmax_scale=100.0)
    out, lse = forward_of(inputs)
    assert (lse < -1e4).all()
    two = torch.arange(2, device=DEVICE)
    rows = inputs.kv[two[:, None, None], inputs.indices[..., 0].long(), two]
    torch.testing.assert_close(out, rows[..., : inputs.d_v].repeat_interleave(3, dim=2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_inputs_give_the_contiguous_result(dtype: torch.dtype) -> None:
    inputs = make_inputs(SMALL, dtype, DEVICE, topk_length=True)
    expected = run(inputs)
    strided = replace(
        inputs, q=sliced(inputs.q, -2), kv=sliced(inputs.kv, -1), indices=sliced(inputs.indices, -1),
        dout=sliced(inputs.dout, 1), dlse=sliced(inputs.dlse, -1), topk_length=sliced(inputs.topk_length, 1),
    )  # fmt: skip
    assert_same(run(strided), expected)
    assert torch.equal(max_logits_of(strided), max_logits_of(inputs))
    assert_same(run(replace(inputs, q=transposed(inputs.q), kv=transposed(inputs.kv))), expected)
    odd_rows = replace(inputs, **{name: padded(getattr(inputs, name)) for name in ("q", "kv", "dout")})
    assert_same(run(odd_rows), expected)
    summed = replace(inputs, dout=torch.ones_like(inputs.dout), dlse=torch.ones_like(inputs.dlse))
    one = torch.ones((), device=DEVICE)
    expanded = replace(inputs, dout=one.to(dtype).expand_as(inputs.dout), dlse=one.expand_as(inputs.dlse))
    assert_same(run(expanded), run(summed))


@pytest.mark.parametrize(
    "sizes",
    [{"topk": 0}, {"seq_kv": 0}, {"seq_q": 0}, {"batch": 0}, {"topk": 1}, {"seq_q": 1, "batch": None, "heads": 2}],
    ids=str,
)
@pytest.mark.parametrize("deterministic", [False, True])
def test_empty_and_single_sizes(sizes: dict[str, Any], deterministic: bool) -> None:
    inputs = make_inputs(replace(SMALL, **sizes), torch.float32, DEVICE, attn_sink=True)
    with deterministic_algorithms() if deterministic else nullcontext():
        results = run(inputs)
    if 0 in sizes.values():
        assert all((results[name] == 0).all() for name in ("out", "dq", "dkv", "dsink"))
        assert torch.isneginf(results["lse"]).all()
        assert torch.isneginf(max_logits_of(make_inputs(replace(SMALL, **sizes), torch.float32, DEVICE))).all()
    else:
        assert_matches_oracle(results, inputs)


@pytest.mark.parametrize("d_v", [64, 33, 144, 288])  # the merge takes 128 channels at a time: of several heads, or less
@pytest.mark.parametrize("num_splits", [2, 3, 10])  # and 8 splits
def test_split_slots_merge_to_the_same_result(num_splits: int, d_v: int) -> None:
    case = replace(SMALL, topk=150, d_total=d_v + 16, d_v=d_v, batch=None)
    inputs = make_inputs(case, torch.float32, DEVICE, attn_sink=True)
    lengths = torch.tensor([50, case.topk, case.topk - 11], device=DEVICE)  # the last splits are not empty
    inputs = replace(inputs, topk_length=lengths)
    config = FwdConfig(block_h=16, block_k=16, max_chunk=64, num_warps=4, num_stages=2)
    fwd = {"num_splits": num_splits, "config": config}
    out, lse = forward_of(inputs, **fwd)
    assert_matches_oracle({"out": out, "lse": lse, "max_logits": max_logits_of(inputs, **fwd)}, inputs)


@pytest.mark.parametrize("batch", [None, 3])
@pytest.mark.parametrize("launch_rows", [1, 5, 100])
def test_dkv_in_key_order(launch_rows: int, batch: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hostile indices and lengths, launches that cross batch elements, and sorts that hold two launches each."""
    monkeypatch.setattr(backward, "rows_per_launch", lambda *_: launch_rows)
    monkeypatch.setattr(key_order, "SORTED_SLOTS", 2 * launch_rows * SMALL.kv_group * SMALL.topk)
    case = replace(SMALL, batch=batch, seq_q=7)
    inputs = make_inputs(case, torch.float32, DEVICE, topk_length=True, attn_sink=True, index_dtype=torch.int64)
    launched = []
    add_in_key_order = key_order.add_in_key_order

    def add_and_note(call: SparseAttnCall, run_rows: Callable[..., None], *args: Any) -> None:
        def run_and_note(ordered: SparseAttnCall, first_row: int, num_rows: int) -> None:
            launched.append(range(first_row, first_row + num_rows))
            run_rows(ordered, first_row, num_rows)

        add_in_key_order(call, run_and_note, *args)

    monkeypatch.setattr(backward, "add_in_key_order", add_and_note)
    check_gradients(inputs, forward_of(inputs))
    rows = inputs.q.shape[:-2].numel()
    assert [row for some in launched for row in some] == list(range(rows))
    assert len(launched) == -(-rows // launch_rows)


@pytest.mark.parametrize("is_strided", [False, True])
def test_key_order_is_descending_with_invalid_slots_last(is_strided: bool) -> None:
    indices = torch.tensor([[3, -1, 9, 2**31 - 1], [-5, 0, 7, 1]], dtype=torch.int32, device=DEVICE)[:, None]
    if is_strided:
        indices = padded(indices)
    seen: list[list[int]] = []
    lengths = torch.tensor([3, 4], device=DEVICE)
    tensor = torch.empty(0, device=DEVICE)
    call = SparseAttnCall(tensor, tensor, indices, 1, 1.0, lengths)
    key_order.add_in_key_order(call, lambda ordered, row, _: seen.append(ordered.indices[row, 0].tolist()), 1)
    assert seen == [[9, 3, -1, -1], [7, 1, 0, -5]]


MANY_HEADS = Case(d_total=80, d_v=48, topk=37, heads=40, batch=1, seq_q=3, seq_kv=24)
BWD_CONFIGS = {
    "one-pass": (BwdConfig(16, 32, 64, 4, 2, is_key_major=False),),
    "one-pass-key-major": (BwdConfig(16, 32, 32, 4, 1),),
    "two-pass": (BwdConfig(32, 32, 64, 4, 1), BwdConfig(16, 16, 16, 4, 2, is_key_major=False)),
}


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("configs", BWD_CONFIGS.values(), ids=BWD_CONFIGS)
def test_backward_configurations_sum_head_blocks(configs: tuple[BwdConfig, ...], deterministic: bool) -> None:
    inputs = make_inputs(MANY_HEADS, torch.float32, DEVICE, attn_sink=True)
    with deterministic_algorithms() if deterministic else nullcontext():
        check_gradients(inputs, forward_of(inputs), bwd={"configs": configs})


# A query of FEW_KEYS stores 6400 bytes: chunks of one query, of two, of one batch element and of all of them.
@pytest.mark.parametrize("workspace_bytes", [1, 1 << 14, 1 << 15, 1 << 30])
def test_deterministic_dkv_in_chunks(workspace_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_sums, "WORKSPACE_BYTES", workspace_bytes)
    inputs = make_inputs(FEW_KEYS, torch.float32, DEVICE, topk_length=True, attn_sink=True, index_dtype=torch.int64)
    results = forward_of(inputs)
    with deterministic_algorithms():
        assert_same(backward_of(inputs, results), check_gradients(inputs, results), atomics=False)


@pytest.mark.parametrize(
    ("batch", "seq_q", "fitting", "expected"),
    [(4, 500, 3000, (4, 500)), (4, 500, 1100, (2, 500)), (2, 500, 440, (1, 396)), (2, 500, 60, (1, 60)),
     (2, 500, 0, (1, 1))],
)  # fmt: skip
def test_chunks_are_whole_batch_elements_or_waves_of_one(
    batch: int, seq_q: int, fitting: int, expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_sums, "WORKSPACE_BYTES", 1000 * fitting)
    assert row_sums.cut(batch, seq_q, 1000, wave_programs=264, programs_per_row=4) == expected


@pytest.mark.parametrize(
    ("counters", "expected"),
    [
        (1000, [((0, 4), (0, 500))]),  # 20 chunks of 50 keys
        (300, [((b, b + 1), (i, min(i + 600, 500))) for b in range(4) for i in (0,)]),
        (120, [((b, b + 1), (i, min(i + 200, 500))) for b in range(4) for i in (0, 200, 400)]),
        (1, [((b, b + 1), (i, i + 100)) for b in range(4) for i in range(0, 500, 100)]),
    ],
)
def test_slabs_have_whole_chunks_and_a_bounded_number_of_keys(
    counters: int, expected: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_sums, "COUNTERS", counters)
    found = row_sums.slabs(batch=4, seq_q=500, chunk_batch=1, chunk_queries=100, chunk_keys=50)
    assert [((b.start, b.stop), (i.start, i.stop)) for b, i in found] == expected
    whole = row_sums.slabs(batch=5, seq_q=500, chunk_batch=2, chunk_queries=500, chunk_keys=50)
    assert [(b.start, b.stop) for b, _ in whole] == (
        [(0, 5)] if counters >= 150 else [(0, 4), (4, 5)] if counters == 120 else [(0, 2), (2, 4), (4, 5)]
    )


@pytest.mark.parametrize("batch", [None, 2])
def test_deterministic_dkv_sorted_slab_by_slab(batch: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    case = replace(FEW_KEYS, batch=batch, seq_q=5)
    inputs = make_inputs(case, torch.float32, DEVICE, topk_length=True, attn_sink=True)
    row_bytes = 4 * case.topk * case.kv_group * case.d_total
    results = forward_of(inputs)
    with deterministic_algorithms():
        whole = check_gradients(inputs, results)
        for workspace_rows, counters in ((2, 1), (2, 25), (5, 13), (1, 1)):
            monkeypatch.setattr(row_sums, "WORKSPACE_BYTES", workspace_rows * row_bytes)
            monkeypatch.setattr(row_sums, "COUNTERS", counters)
            cut = check_gradients(inputs, results)
            assert_same({name: cut[name] for name in ("dq", "dsink")}, whole, atomics=False)


@pytest.mark.parametrize("counters", [1, 50, 1 << 22])
@pytest.mark.parametrize("workspace_bytes", [1, 1 << 30])
def test_deterministic_dkv_of_repeated_keys_in_blocks_of_any_size(
    workspace_bytes: int, counters: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_sums, "WORKSPACE_BYTES", workspace_bytes)
    monkeypatch.setattr(row_sums, "COUNTERS", counters)
    inputs = make_inputs(replace(FEW_KEYS, topk=40), torch.float32, DEVICE, topk_length=True)
    inputs.indices[..., ::3] = 5  # many slots of each query name one key
    results = forward_of(inputs)
    with deterministic_algorithms():
        assert_same(backward_of(inputs, results), check_gradients(inputs, results), atomics=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_places_are_a_sort_by_key_then_query(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_sums, "COUNTERS", 200)
    inputs = make_inputs(SMALL, dtype, DEVICE, topk_length=True)
    launches: list[Launch] = []
    with deterministic_algorithms():
        run(inputs, bwd={"wrap": recorder(launches)})
    (places,) = (arguments["places_ptr"] for name, arguments in launches if name == "_place_slots_kernel")
    batch, seq_q, group, topk = inputs.indices.shape
    keys = inputs.indices.long() * group + torch.arange(group, device=DEVICE).view(-1, 1)
    keys += inputs.kv.shape[1] * group * torch.arange(batch, device=DEVICE).view(-1, 1, 1, 1)
    is_valid = (inputs.indices >= 0) & (inputs.indices < inputs.kv.shape[1])
    is_valid &= torch.arange(topk, device=DEVICE) < inputs.topk_length[..., None, None]
    queries = torch.arange(batch * seq_q, device=DEVICE).view(batch, seq_q, 1, 1).expand_as(keys)
    by_place = places[: keys.numel()].view_as(keys)[is_valid].argsort()
    pairs = list(zip(keys[is_valid][by_place].tolist(), queries[is_valid][by_place].tolist(), strict=True))
    assert sorted(places.view_as(keys)[is_valid].tolist()) == list(range(len(pairs)))
    assert pairs == sorted(pairs)


@pytest.fixture
def wide_offsets_from_now_on(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def use_them() -> None:
        monkeypatch.setattr(portable, "INT32_OFFSETS", 1)

    return use_them


def test_wide_offsets_give_the_same_result(wide_offsets_from_now_on: Callable[[], None]) -> None:
    inputs = make_inputs(SMALL, torch.float32, DEVICE)
    expected, max_logits = run(inputs), max_logits_of(inputs)
    wide_offsets_from_now_on()
    assert_same(run(inputs), expected)
    assert torch.equal(max_logits_of(inputs), max_logits)


def test_512_unit_contributions_sum_to_exactly_512() -> None:
    dtype = torch.float16 if INTERPRETED else torch.bfloat16
    rows = 32
    q = torch.zeros(rows, 16, 32, dtype=dtype, device=DEVICE)
    kv = torch.zeros(4, 1, 32, dtype=dtype, device=DEVICE)
    indices = torch.zeros(rows, 1, 1, dtype=torch.int32, device=DEVICE)
    dout = torch.ones(rows, 16, 16, dtype=dtype, device=DEVICE)
    call = SparseAttnCall(q, kv, indices, 16, 1.0)
    results = run_forward(call, traits=TRAITS)
    _, dkv, _ = run_backward(call, results, Gradients(dout, None), Wanted(dq=False), traits=TRAITS)
    assert (dkv[0, 0, :16] == rows * 16).all()
    assert (dkv[1:] == 0).all()


@on_gpu_only
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("d_total", "d_v", "heads"), [(128, 64, 28), (576, 512, 128), (320, 256, 32)])
def test_training_sizes(d_total: int, d_v: int, heads: int, dtype: torch.dtype) -> None:
    case = Case(d_total=d_total, d_v=d_v, topk=300, heads=heads, batch=1, seq_q=40, seq_kv=500)
    inputs = make_inputs(case, dtype, DEVICE, attn_sink=True)
    check(inputs)
    with deterministic_algorithms():
        results = check(inputs)
        assert_same(run(inputs), results, atomics=False)


@on_gpu_only
def test_sequence_beyond_the_grid_limit_of_65535() -> None:
    case = Case(d_total=32, d_v=16, topk=4, heads=1, batch=None, seq_q=70000, seq_kv=64)
    check(make_inputs(case, torch.float32, DEVICE))


@on_gpu_only
def test_kv_rows_beyond_2_to_31_elements() -> None:
    d_total, seq_kv = 576, 2**31 // 576 + 64
    kv = torch.zeros(seq_kv, 1, d_total, dtype=torch.bfloat16, device=DEVICE)
    last = torch.arange(seq_kv - 8, seq_kv, device=DEVICE)
    kv[last] = torch.randn(8, 1, d_total, device=DEVICE).bfloat16()
    q = torch.randn(2, 16, d_total, device=DEVICE).bfloat16()
    dout = torch.randn(2, 16, 512, device=DEVICE).bfloat16()
    grads = []
    for rows, indices in ((kv, last), (kv[last], torch.arange(8, device=DEVICE))):
        ids = indices.expand(2, 1, 8).contiguous()
        call = SparseAttnCall(q, rows, ids, 512, 0.05)
        results = run_forward(call)
        dq, dkv, _ = run_backward(call, results, Gradients(dout, None))
        grads.append((*results, run_max_logits(call), dq, dkv[indices]))
    for wide, narrow in zip(*grads, strict=True):
        torch.testing.assert_close(wide, narrow, rtol=2e-2, atol=1e-3)


@on_gpu_only
def test_tf32_only_where_torch_asks_for_it() -> None:
    inputs = make_inputs(Case(d_total=128, d_v=64, topk=64, heads=16), torch.float32, DEVICE)
    exact = forward_of(inputs).out
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        rounded = forward_of(inputs).out
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    oracle = sparse_attn_reference(*inputs.to(torch.float64).args)[0]
    assert (exact - oracle).abs().max() < (rounded - oracle).abs().max()


@on_gpu_only
@pytest.mark.parametrize(("d_total", "d_v", "heads", "topk"), [(128, 64, 28, 256), (576, 512, 64, 512)])
def test_memory_is_what_the_results_need(d_total: int, d_v: int, heads: int, topk: int) -> None:
    case = Case(d_total=d_total, d_v=d_v, heads=heads, topk=topk, batch=1, seq_q=2048, seq_kv=4096)
    inputs = make_inputs(case, torch.bfloat16, DEVICE)
    leaves = [inputs.q.requires_grad_(), inputs.kv.requires_grad_()]
    gc.collect()  # what an earlier test left must not be freed while this one counts
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out, lse = torch.ops.mla.sparse_attn(*inputs.args)
    grads = torch.autograd.grad(out, leaves, inputs.dout)
    peak = torch.cuda.max_memory_allocated() - before
    results = sum(t.numel() * t.element_size() for t in (out, lse, *grads))
    delta_and_dkv = 4 * (lse.numel() + inputs.kv.numel())
    assert results <= peak <= 1.1 * (results + delta_and_dkv)
