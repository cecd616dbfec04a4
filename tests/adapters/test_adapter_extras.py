"""Optional frameworks that are absent, broken or of an untested version."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from mla_ops.adapters.extras import import_extra, warn_if_untested
from mla_ops.errors import MissingExtraError

ASK = {"feature": "mla_ops.adapters.imaginary", "package": "imaginary-core", "extra": "imaginary"}


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        (None, "which is not installed"),
        ("raise RuntimeError('empty meta package')", r"cannot be imported \(RuntimeError: empty meta package\)"),
        ("raise OSError('libcudart.so: no such file')", r"cannot be imported \(OSError: libcudart.so: no such file\)"),
        (
            "import absent_dependency",
            r"cannot be imported \(ModuleNotFoundError: No module named 'absent_dependency'\)",
        ),
        ("from math import absent_name", r"cannot be imported \(ImportError: cannot import name 'absent_name'"),
    ],
    ids=["absent", "empty-package", "shared-library", "its-dependency", "its-own-import"],
)
def test_a_framework_that_cannot_be_imported_names_the_reason_and_the_pip_line(
    source: str | None, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if source is not None:
        (tmp_path / "imaginary.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingExtraError, match=rf"adapters.imaginary needs imaginary-core, .*{problem}") as info:
        import_extra("imaginary", **ASK)
    assert str(info.value).endswith("pip install 'mla_ops[imaginary]'")


def test_a_bug_in_a_framework_is_not_called_a_missing_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "imaginary.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ZeroDivisionError):
        import_extra("imaginary", **ASK)


def test_an_importable_framework_is_returned() -> None:
    assert import_extra("torch", **ASK) is torch


def test_an_untested_version_is_named_in_one_warning() -> None:
    with pytest.warns(RuntimeWarning, match=r"tested with pytest 0\.1, 0\.2\.3; .* is installed") as caught:
        assert warn_if_untested("pytest", ("0.1", "0.2.3")) == pytest.__version__
    assert len(caught) == 1
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_untested("pytest", ("0.1", "0.2.3"))


def test_a_tested_version_is_taken_by_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda package: "0.16.10")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert warn_if_untested("imaginary-core", ("0.16",)) == "0.16.10"
    with pytest.warns(RuntimeWarning, match=r"0\.16\.10 is installed"):
        warn_if_untested("imaginary-core", ("0.16.1",))
