"""Bad calls on pools of pages: each raises the typed error that names the argument, the rule, what came and the fix.

The same words in eager, through the front door and the raw operator, and at trace time; before anything is written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from paged_pools import PagedCase, make_paged_inputs
from test_errors import Fp8Wrapper, bad, unescaped

import mla_ops
from mla_ops.errors import InvalidInputError, QuantizedInputError, UnknownBackendError, UnsupportedShardingError

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

E4M3 = torch.float8_e4m3fn


def good_call(name: str = "fp8") -> dict[str, Any]:
    """Return a call by table: 2 requests of 2 queries with 4 heads, 6 pages of 8 rows of 208 bytes (128/64)."""
    case = PagedCase(name, 128, 128 if name == "model1" else 64, page_size=8, topk=5)
    return {**make_paged_inputs(case).by_table._asdict(), "backend": "auto"}


def shifted(pages: torch.Tensor, offset: int = 0, page: int = 0, row: int = 0) -> torch.Tensor:
    """Return pages of the same shape that start `offset` bytes later, and whose strides are longer."""
    sizes, strides = pages.shape, list(pages.stride())
    strides = [strides[0] + page + row * sizes[1], strides[1] + row, *strides[2:]]
    pool = torch.zeros(offset + sizes[0] * strides[0], dtype=pages.dtype)
    return pool.as_strided(sizes, strides, offset)


TENSOR_RULES = [
    bad({"q": lambda a: a["q"][0, 0]}, r"q must be \[batch, seq_q, heads, d_total\] or .*got shape \[4, 128\]"),
    bad({"q": lambda a: a["q"].float()}, r"q must be bfloat16 or float16 for row_format 'fp8', got float32; use q.to"),
    bad({"row_format": lambda a: "fp4"}, r"row_format must be one of 'dense', 'fp8', .*got 'fp4'"),
    bad({"d_v": lambda a: 0}, r"d_v must be at least 1, got 0"),
    bad({"d_v": lambda a: 129}, r"d_v must be at most d_total \(128, the width of a row\), got 129"),
    bad(
        {"pages": lambda a: a["pages"].view(torch.bfloat16)},
        r"pages must be uint8, int8 or float8_e4m3fn .*'fp8', got bfloat16; rows of plain channels have row_format",
    ),
    bad({"pages": lambda a: a["pages"].view(torch.float8_e5m2)}, r"got float8_e5m2; it stores other numbers: requanti"),
    bad({"pages": lambda a: a["pages"].view(torch.float8_e4m3fnuz)}, r"got float8_e4m3fnuz; its codes mean other numb"),
    bad({"pages": lambda a: a["pages"].view(torch.int32)}, r"got int32; use pages.view\(torch.uint8\)"),
    bad({"pages": lambda a: a["pages"][:, :, 0]}, r"pages must have 4 dimensions, \[num_pages, page_size, kv_group, r"),
    bad(
        {"pages": lambda a: torch.zeros(6, 8, 1, 656, dtype=torch.uint8)},
        r"a row of pages must have 208 bytes for row_format 'fp8' at d_total=128, d_v=64 \(64 channels in e4m3, 1 scale"
        r"s, 64 channels in 16 bits, each part rounded up\), got 656: pages shape \[6, 8, 1, 656\]",
    ),
    bad({"pages": lambda a: a["pages"][:, :0]}, r"page_size must be at least 1, got pages shape \[6, 0, 1, 208\]"),
    bad(
        {"pages": lambda a: a["pages"].transpose(1, 3).contiguous().transpose(1, 3)},
        r"the last stride of pages must be 1, got 8; use pages.contiguous\(\), once",
    ),
    bad({"pages": lambda a: shifted(a["pages"], offset=8)}, r"the storage offset of pages must be a multiple of 16 by"),
    bad({"pages": lambda a: shifted(a["pages"], page=8)}, r"the page stride of pages must be a multiple of 16 bytes, "),
    bad({"pages": lambda a: shifted(a["pages"], row=8)}, r"the (page|row) stride of pages must be a multiple of 16 by"),
    bad({"pages": lambda a: a["pages"].to("meta")}, r"pages must be on the device of q \(cpu\), got meta"),
    bad(
        {"q": lambda a: a["q"][:, :, :3], "attn_sink": lambda a: None,
         "pages": lambda a: a["pages"].expand(-1, -1, 2, -1).contiguous()},
        r"heads must be a multiple of kv_group, got heads=3 \(q\) and kv_group=2 \(pages\)",
    ),
    bad({"cache_scale": lambda a: torch.ones(1)}, r"cache_scale belongs to row_format 'fp8_cache', got one with 'fp8'"),
    bad({"indices": lambda a: a["indices"].float()}, r"indices must be int32 or int64, got float32"),
    bad({"indices": lambda a: a["indices"][:, :, 0]}, r"indices must have 4 dimensions, \[batch, seq_q, kv_group, top"),
    bad({"indices": lambda a: a["indices"][:1]}, r"size 0 of indices must equal the batch of q \(2\)"),
    bad({"topk_length": lambda a: a["topk_length"][0]}, r"topk_length must have 2 dimensions, \[batch, seq_q\]"),
    bad({"attn_sink": lambda a: a["attn_sink"].half()}, r"attn_sink must be float32, got float16"),
    bad({"attn_sink": lambda a: a["attn_sink"][:3]}, r"size 0 of attn_sink must equal heads of q \(4\)"),
    bad({"block_table": lambda a: a["block_table"].float()}, r"block_table must be int32 or int64, got float32"),
    bad({"block_table": lambda a: a["block_table"][0]}, r"block_table must have 2 dimensions, \[batch, pages_per_requ"),
    bad({"block_table": lambda a: a["block_table"][:1]}, r"size 0 of block_table must equal the batch of q \(2\)"),
    bad({"block_table": lambda a: None}, r"seq_lens bounds positions in a request, which block_table finds; without"),
    bad({"seq_lens": lambda a: a["seq_lens"] > 1}, r"seq_lens must be int32 or int64, got bool"),
    bad({"seq_lens": lambda a: a["seq_lens"][:, None]}, r"seq_lens must have 1 dimensions, \[batch\], got"),
    bad({"seq_lens": lambda a: a["seq_lens"][:1]}, r"size 0 of seq_lens must equal the batch of q \(2\)"),
    bad(
        {name: lambda a, n=name: a[n][0] for name in ("q", "indices", "topk_length")},
        r"block_table has a row for each batch element, q must be \[batch, .*got shape \[2, 4, 128\]; use unsqueeze",
    ),
    bad({"softmax_scale": lambda a: float("nan")}, r"softmax_scale must be finite, got nan"),
    bad({"backend": lambda a: "tritn"}, r"backend must be one of 'auto', .*'eager'.*got 'tritn'"),
]  # fmt: skip
# Of other formats.
FORMAT_RULES = [
    (
        "dense",
        {"pages": lambda a: a["pages"].half()},
        r"pages must be bfloat16 for row_format \"dense\", got float16; u",
    ),
    (
        "dense",
        {"pages": lambda a: a["pages"].view(torch.uint8)},
        r"got uint8; name the format of quantised rows in row_",
    ),
    (
        "dense",
        {"q": lambda a: a["q"].int()},
        r"q must be bfloat16 or float16 or float32 or float64 for row_format 'den",
    ),
    ("fp8_cache", {"cache_scale": lambda a: None}, r"cache_scale must be a tensor \[1\] or \[kv_group\] .*, got None"),
    ("fp8_cache", {"cache_scale": lambda a: a["cache_scale"].double()}, r"cache_scale must be float32, got float64"),
    ("fp8_cache", {"cache_scale": lambda a: torch.ones(3)}, r"size 0 of cache_scale must equal 1 or kv_group of pages"),
    (
        "fp8_cache",
        {"cache_scale": lambda a: torch.tensor(1.0)},
        r"cache_scale must have 1 dimensions, \[1\] or \[group",
    ),
    ("model1", {"d_v": lambda a: 64, "q": lambda a: a["q"][..., :64]}, r"d_total must be more than 64 for row_format"),
    (
        "model1",
        {"q": lambda a: a["q"][..., :120], "d_v": lambda a: 64},
        r"d_total=120 makes rows of 184 bytes for row_f",
    ),
    (
        "model1",
        {"pages": lambda a: a["pages"].contiguous()},
        r"a page of 8 rows takes 1728 bytes .*page stride .* 1600",
    ),
    (
        "model1",
        {"pages": lambda a: shifted(a["pages"], row=16)},
        r"the rows of a page must follow each other .* got 216",
    ),
    (
        "model1",
        {"pages": lambda a: torch.zeros(6, 1792, dtype=torch.uint8).as_strided((6, 8, 2, 200), (1792, 200, 0, 1))},
        r"kv_group must be 1 for row_format 'model1'",
    ),
]
TYPE_RULES = [
    bad({"q": lambda a: a["q"].tolist()}, r"q must be a torch.Tensor, got list"),
    bad({"block_table": lambda a: [0, 1]}, r"block_table must be a torch.Tensor or None, got list"),
    bad({"cache_scale": lambda a: 1.0}, r"cache_scale must be a torch.Tensor or None, got float"),
    bad({"d_v": lambda a: 64.0}, r"d_v must be an int, got float; use int\(d_v\)"),
    bad({"softmax_scale": lambda a: None}, r"softmax_scale must be a float, got NoneType"),
    bad({"row_format": lambda a: E4M3}, r"row_format must be a string, got dtype"),
    bad({"backend": lambda a: None}, r"backend must be a string, got NoneType"),
]


def spoil(change: dict[str, Callable], arguments: dict[str, Any]) -> dict[str, Any]:
    return {**arguments, **{name: make(arguments) for name, make in change.items()}}


def front_door(arguments: dict[str, Any]) -> Any:
    arguments = dict(arguments)
    tensors = [arguments.pop(name) for name in ("q", "pages", "indices")]
    return mla_ops.sparse_attn_paged(*tensors, **arguments)


def explain(arguments: dict[str, Any]) -> Any:
    arguments = dict(arguments)
    tensors = [arguments.pop(name) for name in ("q", "pages", "indices")]
    return mla_ops.explain_sparse_attn_paged(*tensors, **arguments)


def raw_operator(arguments: dict[str, Any]) -> Any:
    return torch.ops.mla.sparse_attn_paged(**arguments)


def eager_error(call: Callable, arguments: dict[str, Any], message: str) -> str:
    is_name = arguments.get("backend") == "tritn"
    with pytest.raises(UnknownBackendError if is_name else InvalidInputError, match=message) as info:
        call(arguments)
    return str(info.value)


def traced_error(call: Callable, arguments: dict[str, Any]) -> str:
    with pytest.raises(RuntimeError) as info:
        torch.compile(call, fullgraph=True, backend="eager", dynamic=False)(arguments)
    return unescaped(str(info.value))


def test_the_good_calls_are_good() -> None:
    for name in ("fp8", "dense", "fp8_cache", "model1"):
        out, _ = front_door(good_call(name))
        assert out.shape == (2, 2, 4, 128 if name == "model1" else 64)


@pytest.mark.parametrize(("change", "message"), TENSOR_RULES)
def test_tensor_rules(change: dict, message: str) -> None:
    arguments = spoil(change, good_call())
    words = {eager_error(call, arguments, message) for call in (front_door, raw_operator, explain)}
    assert len(words) == 1


@pytest.mark.parametrize(("name", "change", "message"), FORMAT_RULES)
def test_rules_of_other_formats(name: str, change: dict, message: str) -> None:
    arguments = spoil(change, good_call(name))
    assert eager_error(front_door, arguments, message) == eager_error(raw_operator, arguments, message)


@pytest.mark.parametrize("which", [1, 10, 15])
def test_at_trace_time_the_words_are_the_same(which: int) -> None:
    change, message = TENSOR_RULES[which].values
    words = eager_error(front_door, spoil(change, good_call()), message)
    assert words in traced_error(front_door, spoil(change, good_call()))


@pytest.mark.parametrize(("change", "message"), TYPE_RULES)
def test_type_rules(change: dict, message: str) -> None:
    assert eager_error(front_door, spoil(change, good_call()), message)


def good_append() -> dict[str, Any]:
    return {
        "latent": torch.ones(3, 1, 64).half(), "rows": torch.arange(3), "tail": torch.ones(3, 1, 64).half(),
        "pages": torch.zeros(6, 8, 1, 208, dtype=torch.uint8), "d_v": 64, "row_format": "fp8", "scale_rule": "pow2",
        "cache_scale": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        bad({"scale_rule": lambda a: "pow"}, r"scale_rule must be one of 'pow2', 'amax', got 'pow'"),
        bad({"scale_rule": lambda a: 2}, r"scale_rule must be a string, got int"),
        bad(
            {"row_format": lambda a: "mxfp8", "scale_rule": lambda a: "amax"},
            r"scale_rule must be 'pow2' for row_format 'mxfp8', whose scales are powers of two, got 'amax'",
        ),
        bad(
            {"latent": lambda a: a["latent"].float()}, r"latent must be bfloat16 or float16 for row_format 'fp8', got f"
        ),
        bad({"latent": lambda a: a["latent"][:, 0]}, r"latent must have 3 dimensions, \[n, kv_group, d_v\], got shape"),
        bad({"latent": lambda a: a["latent"][..., :60]}, r"size -1 of latent must equal d_v, beside a tail \(64\)"),
        bad({"latent": lambda a: a["latent"][:2]}, r"size 0 of rows must equal n of latent \(2\)"),
        bad({"tail": lambda a: a["tail"].bfloat16()}, r"tail must have the dtype of latent \(float16\), got bfloat16"),
        bad({"tail": lambda a: a["tail"][:2]}, r"size 0 of tail must equal n of latent \(3\)"),
        bad({"tail": lambda a: None}, r"a row of pages must have 80 bytes .* at d_total=64, d_v=64 .*got 208"),
        bad({"rows": lambda a: a["rows"].float()}, r"rows must be int32 or int64, got float32"),
        bad({"rows": lambda a: a["rows"][None]}, r"rows must have 1 dimensions, \[n\], got"),
        bad(
            {"pages": lambda a: a["pages"].expand(-1, -1, 2, -1).contiguous()}, r"size 1 of latent must equal kv_group"
        ),
        bad({"pages": lambda a: a["pages"].to("meta")}, r"pages must be on the device of latent \(cpu\), got meta"),
        bad({"rows": lambda a: [0]}, r"rows must be a torch.Tensor, got list"),
    ],
)
def test_append_rows_refuses_before_it_writes(change: dict, message: str) -> None:
    def append(arguments: dict[str, Any]) -> None:
        mla_ops.append_rows(**arguments)

    append(good_append())
    arguments = spoil(change, good_append())
    eager_error(append, arguments, message)
    assert arguments["pages"].is_meta or (arguments["pages"] == 0).all()


def good_read() -> dict[str, Any]:
    return {
        "pages": torch.zeros(6, 8, 1, 208, dtype=torch.uint8), "rows": torch.arange(3), "d_total": 128, "d_v": 64,
        "row_format": "fp8", "dtype": torch.bfloat16, "cache_scale": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        bad(
            {"dtype": lambda a: torch.float64}, r"dtype must be bfloat16, float16 or float32 for row_format 'fp8', got"
        ),
        bad({"dtype": lambda a: torch.float32}, r"dtype must be that in which the 64 channels of the tail are stored"),
        bad({"dtype": lambda a: "bf16"}, r"dtype must be a torch.dtype, got str"),
        bad({"d_total": lambda a: 576}, r"a row of pages must have 1104 bytes .* at d_total=576, d_v=64 .*got 208"),
        bad({"d_total": lambda a: 128.0}, r"d_total must be an int, got float"),
        bad({"rows": lambda a: a["rows"].to(torch.int16)}, r"rows must be int32 or int64, got int16"),
        bad({"rows": lambda a: a["rows"][None]}, r"rows must have 1 dimensions, \[n\]"),
        bad(
            {"pages": lambda a: torch.zeros(6, 8, 1, 128), "row_format": lambda a: "dense"},
            r"pages must be bfloat16 for row_format \"dense\", got float32; use pages.to\(torch.bfloat16\), once",
        ),
    ],
)
def test_read_rows_refuses(change: dict, message: str) -> None:
    def read(arguments: dict[str, Any]) -> Any:
        return mla_ops.read_rows(**arguments)

    assert read(good_read()).shape == (3, 1, 128)
    eager_error(read, spoil(change, good_read()), message)


def test_wrapper_tensors_are_refused_and_never_dequantised() -> None:
    Fp8Wrapper.dequantised.clear()
    wrapper = Fp8Wrapper(torch.zeros(6, 8, 1, 208, dtype=torch.uint8))
    with pytest.raises(InvalidInputError, match="pages must be a plain tensor, got the wrapper subclass Fp8Wrapper"):
        front_door({**good_call(), "pages": wrapper})
    mla_ops.refuse_wrapper(Fp8Wrapper)
    for operator, arguments in (
        (torch.ops.mla.sparse_attn_paged, {**good_call(), "pages": wrapper}),
        (torch.ops.mla.append_rows, {**good_append(), "pages": wrapper}),
        (torch.ops.mla.read_rows, {**good_read(), "pages": wrapper}),
    ):
        with pytest.raises((InvalidInputError, QuantizedInputError), match="pages must be a plain tensor"):
            operator(**arguments)
    assert Fp8Wrapper.dequantised == []


def test_distributed_tensors_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from mla_ops.api import serving

    monkeypatch.setattr(serving, "is_dtensor", lambda tensor: True)
    for call in (
        lambda: front_door(good_call()),
        lambda: mla_ops.append_rows(**good_append()),
        lambda: mla_ops.read_rows(**good_read()),
    ):
        with pytest.raises(
            UnsupportedShardingError, match="takes plain tensors, got DTensors: a pool belongs to its r"
        ):
            call()


def test_no_backend_on_this_device_says_why() -> None:
    arguments = {name: a.to("meta") if isinstance(a, torch.Tensor) else a for name, a in good_call().items()}
    decision = explain(arguments)
    assert decision.backend is None
    assert 'pass backend="eager"' in str(decision)
