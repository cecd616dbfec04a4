"""How close is close enough: budgets derived from the arithmetic, not chosen.

A result is compared with an fp64 oracle fed the same values. It may err as much as the plain formula computed in the
same low precision errs, plus a rounding band: one rounding to its own dtype, and one rounding of the accumulator per
summed term.
"""

from __future__ import annotations

import torch


def assert_within_budget(
    actual: torch.Tensor, oracle: torch.Tensor, low_precision: torch.Tensor, *, terms: int, name: str = "result"
) -> None:
    """Assert that `actual` is as close to the fp64 `oracle` as the `low_precision` computation, within rounding.

    Non-finite values must stand in the same places with the same sign. `terms` is the number of products summed into
    one element; the accumulator is fp64 for fp64 results and fp32 for all others.
    """
    actual64, low64 = actual.double(), low_precision.double()
    finite = _assert_same_non_finite(actual64, oracle, name)
    if not finite.any():
        return
    accumulator = torch.float64 if actual.dtype == torch.float64 else torch.float32
    size = oracle[finite].abs()
    both = finite & low64.isfinite()
    low_error = (low64 - oracle)[both].abs().max() if both.any() else oracle.new_zeros(())
    band = torch.finfo(actual.dtype).eps * size + torch.finfo(accumulator).eps * terms * size.max()
    error = (actual64 - oracle)[finite].abs()
    excess = error - (low_error + band)
    if excess.max() > 0:
        worst = excess.argmax()
        raise AssertionError(
            f"{name}: error {error[worst]:.3e} at value {oracle[finite][worst]:.3e} exceeds the budget "
            f"{(low_error + band[worst]):.3e} (low-precision error {low_error:.3e} + rounding {band[worst]:.3e})"
        )


def assert_bf16_bars(
    actual: dict[str, torch.Tensor], oracle: dict[str, torch.Tensor], eager: dict[str, torch.Tensor]
) -> None:
    """Assert the contract's absolute bars for bf16 with N(0, 1) / 10 inputs on `out`, `lse`, `dq` and `dkv`.

    out, lse: see `assert_forward_bars`; dq, dkv: cosine distance 1e-5 and RMSE at most 1.5 times that of the eager bf16
    formula.
    """
    assert_forward_bars(actual["out"], actual["lse"], oracle["out"], oracle["lse"])
    for name in ("dq", "dkv"):
        finite = _assert_same_non_finite(actual[name].double(), oracle[name], name)
        got, want = actual[name].double()[finite], oracle[name][finite]
        distance = _cosine_distance(got, want)
        assert distance <= 1e-5, f"{name}: cosine distance {distance:.3e} exceeds 1e-5"
        rmse = (got - want).square().mean().sqrt()
        eager_rmse = (eager[name].double()[finite] - want).square().mean().sqrt()
        assert rmse <= 1.5 * eager_rmse, f"{name}: RMSE {rmse:.3e} exceeds 1.5x that of eager bf16 ({eager_rmse:.3e})"


def assert_forward_bars(
    out: torch.Tensor,
    lse: torch.Tensor,
    oracle_out: torch.Tensor,
    oracle_lse: torch.Tensor,
    *,
    lse_error: float = 1e-5,
) -> None:
    """Assert the bars of a forward: out abs 8e-4 or rel 2.4e-2 an element and cosine distance 7e-6; lse rel 3.1e-5.

    `lse_error` is the absolute error that lse may have instead of the relative one.
    """
    pairs = (("out", out, oracle_out, 8e-4, 2.4e-2), ("lse", lse, oracle_lse, lse_error, 3.1e-5))
    for name, actual, oracle, absolute, relative in pairs:
        finite = _assert_same_non_finite(actual.double(), oracle, name)
        got, want = actual.double()[finite], oracle[finite]
        error, allowed = (got - want).abs(), torch.clamp(want.abs() * relative, min=absolute)
        worst = error.max() if error.numel() else 0.0
        assert (error <= allowed).all(), f"{name}: error {worst:.3e} beyond abs {absolute}, rel {relative}"
        if name == "out":
            distance = _cosine_distance(got, want)
            assert distance <= 7e-6, f"{name}: cosine distance {distance:.3e} exceeds 7e-6"


def _assert_same_non_finite(actual: torch.Tensor, oracle: torch.Tensor, name: str) -> torch.Tensor:
    assert actual.shape == oracle.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(oracle.shape)}"
    for kind, test in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        wrong = test(actual) != test(oracle)
        assert not wrong.any(), f"{name}: {int(wrong.sum())} of {wrong.numel()} elements differ in being {kind}"
    return oracle.isfinite()


def _cosine_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    scale = (a.square().sum() + b.square().sum()) / 2
    return 0.0 if scale == 0 else float(1 - (a * b).sum() / scale)
