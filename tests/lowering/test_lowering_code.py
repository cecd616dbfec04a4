"""The code that Inductor writes for an H100, on a machine without a GPU: kernels in, operators out."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mla_ops.testing import Case

triton = pytest.importorskip("triton", reason="triton is not installed")
from fake_gpu import H100_TRAITS, fake_h100, fake_mode, generate_code, symbol  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.skipif(
        triton.knobs.runtime.interpret, reason="Inductor can't re-emit kernels defined under TRITON_INTERPRET=1"
    ),
]


def fake_call(
    case: Case, *, is_symbolic: bool, dtype: torch.dtype = torch.bfloat16, training: bool = False
) -> tuple[tuple[torch.Tensor, ...], Any]:
    """Fake CUDA tensors of a call, lengths and topk symbolic if asked: q, kv, indices; dout, out, lse."""
    mode = fake_mode()
    sizes = {"b": case.batch, "s": case.seq_q, "k": case.seq_kv, "t": case.topk}
    with mode:
        b, s, k, t = (symbol(mode, name, size) if is_symbolic else size for name, size in sizes.items())
        q = torch.empty(b, s, case.heads, case.d_total, dtype=dtype, device="cuda")
        kv = torch.empty(b, k, case.kv_group, case.d_total, dtype=dtype, device="cuda")
        indices = torch.empty(b, s, case.kv_group, t, dtype=torch.int32, device="cuda")
        lse = torch.empty(b, s, case.heads, dtype=torch.float32, device="cuda")
        out, dout = (torch.empty(b, s, case.heads, case.d_v, dtype=dtype, device="cuda") for _ in range(2))
    return ((q, kv, indices, out, dout, lse) if training else (q, kv, indices)), mode


def forward_code(case: Case, *, is_symbolic: bool = False, **options: Any) -> str:
    args, mode = fake_call(case, is_symbolic=is_symbolic, **options)
    return generate_code(lambda q, kv, indices: torch.ops.mla.sparse_attn(q, kv, indices, case.d_v, 0.1), args, mode)


def backward_code(case: Case, *, is_symbolic: bool = False, dlse: bool = False) -> str:
    args, mode = fake_call(case, is_symbolic=is_symbolic, training=True)

    def function(q: Any, kv: Any, indices: Any, out: Any, dout: Any, lse: Any) -> Any:
        gradient = lse if dlse else None
        return torch.ops.mla.sparse_attn_bwd(dout, gradient, q, kv, indices, out, lse, case.d_v, 0.1)

    return generate_code(function, args, mode)


def launches(code: str) -> list[str]:
    """Names of the kernels that the module launches, in order."""
    return re.findall(r"^ +(\w+?)(?:_\d+)?\.run\(", code, re.M)


def asserted_inputs(code: str) -> set[str]:
    """Names of the inputs whose size and strides the module asserts; newer torch asserts them in one line."""
    single = re.findall(r"assert_size_stride\((\w+), \(", code)
    grouped = [
        names for group in re.findall(r"assert_size_stride_grouped\(\((.*?)\)", code) for names in group.split(",")
    ]
    return {name.strip() for name in single + grouped if name.strip()}


def launch_arguments(code: str, kernel: str) -> list[str]:
    (arguments,) = re.findall(rf"{kernel}_\d+\.run\((.*), stream=", code)
    return arguments.split(", ")


TRAINING = Case(d_total=128, d_v=64, heads=28, batch=2, seq_q=128, seq_kv=256, topk=64)


@pytest.mark.parametrize("is_symbolic", [False, True], ids=["static", "symbolic"])
def test_forward_code_is_one_kernel_and_no_operator(is_symbolic: bool, caplog: pytest.LogCaptureFixture) -> None:
    code = forward_code(TRAINING, is_symbolic=is_symbolic)
    assert launches(code) == ["_sparse_attn_fwd_kernel"]  # no copy of an input, no other kernel
    assert "torch.ops.mla" not in code
    assert asserted_inputs(code) == {"q_1", "kv_1", "indices_1"}
    if not is_symbolic:
        assert "(2, 128, 28, 128), (458752, 3584, 128, 1)" in code
    assert "every input is mutated" not in caplog.text


def test_lengths_and_topk_are_runtime_arguments() -> None:
    arguments = launch_arguments(forward_code(TRAINING, is_symbolic=True), "_sparse_attn_fwd_kernel")
    scale = arguments.index("0.1")
    seq_q, seq_kv, topk, slots_per_split = arguments[scale + 1 : scale + 5]
    *_, programs, _, _ = arguments
    assert all(re.fullmatch(r"s\d+", size) for size in (seq_q, seq_kv, topk))
    assert len({seq_q, seq_kv, topk}) == 3
    assert slots_per_split == topk
    assert re.fullmatch(r"s\d+\*s\d+", programs)


@pytest.mark.parametrize("is_symbolic", [False, True], ids=["static", "symbolic"])
@pytest.mark.parametrize("dlse", [False, True], ids=["out", "out and lse"])
def test_backward_code_is_zeros_kernel_and_cast(is_symbolic: bool, dlse: bool) -> None:
    code = backward_code(TRAINING, is_symbolic=is_symbolic, dlse=dlse)
    assert launches(code) == ["triton_poi_fused", "_sparse_attn_bwd_kernel", "triton_poi_fused"]
    assert "torch.ops.mla" not in code
    tensors = {"q_1", "kv_1", "indices_1", "out_1", "dout_1", "lse_1"}
    assert asserted_inputs(code) == tensors


@pytest.mark.parametrize("is_symbolic", [False, True], ids=["static", "symbolic"])
def test_decode_is_split_and_merged(is_symbolic: bool) -> None:
    code = forward_code(replace(TRAINING, seq_q=2, topk=2048, seq_kv=4096), is_symbolic=is_symbolic)
    assert launches(code) == ["_sparse_attn_fwd_kernel", "_sparse_attn_merge_kernel"]


def test_deterministic_backward_sums_in_order_where_lengths_are_known(
    deterministic: None, said: Callable[[str], bool]
) -> None:
    # Between them Inductor makes the zeros and the sums of counters, by kernels of its own or torch's.
    ours = [name for name in launches(backward_code(TRAINING)) if name.startswith("_")]
    placing = ["_rank_slots_kernel", "_place_slots_kernel"]
    assert ours == [*placing, "_sparse_attn_bwd_kernel", "_sum_placed_rows_kernel"]
    assert "torch.ops.mla.sparse_attn_bwd" in backward_code(TRAINING, is_symbolic=True)
    assert said("batch is symbolic and decides how often a deterministic backward launches")


def test_strided_inputs_are_not_copied() -> None:
    mode = fake_mode()
    with mode:
        wide = torch.empty(2, 128, 32, 192, dtype=torch.bfloat16, device="cuda")
        kv = torch.empty(2, 256, 1, 128, dtype=torch.bfloat16, device="cuda")
        indices = torch.empty(2, 128, 1, 64, dtype=torch.int32, device="cuda")

    def function(wide: torch.Tensor, kv: torch.Tensor, indices: torch.Tensor) -> Any:
        return torch.ops.mla.sparse_attn(wide.narrow(2, 0, 28).narrow(3, 0, 128), kv, indices, 64, 0.1)

    code = generate_code(function, (wide, kv, indices), mode)
    assert launches(code) == ["_sparse_attn_fwd_kernel"]
    assert "reinterpret_tensor(wide_1, (2, 128, 28, 128), (786432, 6144, 192, 1), 0), 786432, 6144, 192" in code


def test_emitted_kernels_compile_for_the_h100(tmp_path: Path) -> None:
    """Inductor re-emits a kernel's source with a signature of its own: fp64 for a Python float, for one."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    sources = [
        source
        for code in (forward_code(replace(TRAINING, seq_q=2, topk=2048, seq_kv=4096)), backward_code(TRAINING))
        for source in re.findall(r"async_compile\.triton\('_\w+', '''(.*?)'''", code, re.S)
    ]
    assert len(sources) == 3
    for i, source in enumerate(sources):
        path = tmp_path / f"emitted_{i}.py"
        # Torch 2.11 writes a source into a string without escapes: a line break in a global would end a literal there.
        assert "\\" not in source
        path.write_text(source)
        namespace: dict[str, Any] = {"__name__": path.stem, "__file__": str(path)}
        with fake_h100():
            exec(compile(source, str(path), "exec"), namespace)
        (tuned,) = (value for value in namespace.values() if hasattr(value, "triton_meta"))
        names = tuned.fn.arg_names
        signature, constants = tuned.triton_meta["signature"], tuned.triton_meta["constants"]
        assert signature.get("softmax_scale", "fp64") == "fp64"
        ast = ASTSource(
            fn=tuned.fn,
            signature=signature,
            constexprs={(names.index(name),): value for name, value in constants.items()},
            attrs=tuned.triton_meta["configs"][0],
        )
        (config,) = tuned.configs
        compiled = triton.compile(
            ast,
            target=GPUTarget("cuda", 90, 32),
            options={"num_warps": config.num_warps, "num_stages": config.num_stages},
        )
        assert compiled.metadata.shared <= H100_TRAITS.smem_bytes
