"""Every way to get the package onto a path serves the same subpackages."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import mla_ops

ROOT = Path(__file__).parents[2]
FOLDERS = {"mla_ops": "mla_ops", "mla_ops.registration": "registration", "mla_ops.lowering": "lowering"}
# What a source distribution holds beside them; of benchmarks/ not the results.
BESIDE = ("tests", "docs", "examples", "benchmarks")
FILES = ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "Makefile")


def declared_packages() -> set[str]:
    return set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])


def packages_on_disk() -> set[str]:
    found = set()
    for name, folder in FOLDERS.items():
        for init in (ROOT / folder).rglob("__init__.py"):
            parts = init.parent.relative_to(ROOT / folder).parts
            found.add(".".join((name, *parts)))
    return found


def test_package_list_names_every_folder() -> None:
    assert declared_packages() == packages_on_disk()


def make(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    # The suite's own `make test` would make this one a sub-make, which says so on stdout.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(["make", *args], cwd=ROOT, env=inherited | env, capture_output=True, text=True, timeout=60)


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_alone_lists_every_target() -> None:
    result = make()
    assert result.returncode == 0, result.stderr
    (targets,) = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    listed = [line.split(maxsplit=2) for line in result.stdout.splitlines()]
    assert sorted(target for _, target, _ in listed) == sorted(targets.split())


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_demo_says_what_an_environment_of_ones_own_lacks(tmp_path: Path) -> None:
    (tmp_path / "tqdm.py").write_text("raise ImportError('blocked')")
    result = make("demo", "ENV=active", f"BASE_PYTHON={sys.executable}", PYTHONPATH=str(tmp_path))
    assert (result.returncode, result.stdout) == (2, "")
    assert "the demo needs matplotlib and tqdm: " in result.stderr
    assert "-m pip install matplotlib tqdm\n" in result.stderr


def pip(*args: str) -> None:
    command = [sys.executable, "-m", "pip", *args, "--no-deps", "--no-build-isolation", "--quiet"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def source_copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tracked sources in a folder of their own: building must not write into the checkout under test."""
    target = tmp_path_factory.mktemp("source")
    for name in (*FOLDERS.values(), *BESIDE):
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, target / name)
    return target


@pytest.fixture(scope="module")
def unpacked_sdist(source_copy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    command = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", str(folder), str(source_copy)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    (path,) = folder.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        archive.extractall(folder, filter="data")
    return folder / path.name.removesuffix(".tar.gz")


def test_sdist_holds_the_sources_and_what_their_tests_need(unpacked_sdist: Path) -> None:
    expected = set(FILES)
    for folder in (*FOLDERS.values(), *BESIDE):
        expected |= {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob("*") if path.is_file()}
    expected = {name for name in expected if "__pycache__" not in name and "benchmarks/results/" not in name}
    names = {path.relative_to(unpacked_sdist).as_posix() for path in unpacked_sdist.rglob("*") if path.is_file()}
    assert expected <= names
    made = {name for name in names - expected if name.startswith(("mla_ops.egg-info/", "."))}
    assert names - expected - made == {"PKG-INFO", "setup.cfg"}


@pytest.mark.slow
def test_the_tests_of_an_sdist_collect(unpacked_sdist: Path) -> None:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    result = subprocess.run(command, cwd=unpacked_sdist, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout[-2000:]
    for name in ("operator/test_contract.py", "adapters/test_megatron.py", "package/test_packaging.py"):
        assert f"tests/{name}::" in result.stdout


@pytest.fixture(scope="module")
def wheel(source_copy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", str(source_copy), "--wheel-dir", str(folder))
    (path,) = folder.glob("*.whl")
    return path


def test_wheel_holds_every_source_file_and_nothing_else(wheel: Path) -> None:
    expected = {"mla_ops/py.typed"}
    for name, folder in FOLDERS.items():
        inside = name.replace(".", "/")
        for source in (ROOT / folder).rglob("*.py"):
            expected.add(f"{inside}/{source.relative_to(ROOT / folder).as_posix()}")
    with zipfile.ZipFile(wheel) as archive:
        names = {n for n in archive.namelist() if ".dist-info/" not in n}
        (metadata,) = [n for n in archive.namelist() if n.endswith("METADATA")]
        text = archive.read(metadata).decode()
        entry_points = archive.read(metadata.replace("METADATA", "entry_points.txt")).decode()
    assert names == expected
    assert f"Version: {mla_ops.__version__}" in text
    assert "mla-ops = mla_ops.cli.main:main" in entry_points


# Imports this package once for each way to find it, in forks that share the seconds that importing torch takes. The
# environment's own (editable) install of this package is left out by -S; torch comes back by hand.
PROBES = """
import importlib, json, os, site, sys
sys.path += [path for path in json.loads(sys.argv[1]) if path.endswith("site-packages")]
import torch
for cwd, first, is_site in json.loads(sys.argv[2]):
    if os.fork() == 0:
        os.chdir(cwd)
        if first:
            sys.path.insert(0, first)  # in front, because the environment's install has a finder module of that name
        if is_site:
            site.addsitedir(first)
        importlib.invalidate_caches()
        import mla_ops.registration, mla_ops.lowering
        print(mla_ops.registration.__file__, flush=True)
        os._exit(0)
    _, status = os.wait()
    assert status == 0, (cwd, first)
"""


@pytest.fixture(scope="module")
def served(wheel: Path, source_copy: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """Which file is `mla_ops.registration`, by how the package was installed and where Python was started."""
    elsewhere, site = tmp_path_factory.mktemp("elsewhere"), tmp_path_factory.mktemp("site")
    pip("install", str(wheel), "--target", str(site))
    ways = {("wheel", "elsewhere"): (elsewhere, site, False), ("checkout", "from-root"): (source_copy, "", False)}
    sites = {("wheel", "site"): site}
    for mode in ("lenient", "strict"):
        prefix = tmp_path_factory.mktemp(mode)
        pip(
            "install",
            "--ignore-installed",  # else pip uninstalls the environment's own mla_ops first
            "--editable",
            str(source_copy),
            "--config-settings",
            f"editable_mode={mode}",
            "--prefix",
            str(prefix),
        )
        (packages,) = prefix.rglob("site-packages")
        sites[mode, "site"] = packages
        ways |= {(mode, "elsewhere"): (elsewhere, packages, True), (mode, "from-root"): (source_copy, packages, True)}
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    arguments = [json.dumps(sys.path), json.dumps([[str(cwd), str(first), last] for cwd, first, last in ways.values()])]
    command = [sys.executable, "-S", "-c", PROBES, *arguments]
    result = subprocess.run(command, cwd=elsewhere, env=env, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    found = {way: Path(line) for way, line in zip(ways, result.stdout.splitlines(), strict=True)}
    return found | sites


def test_wheel_serves_the_subpackages(served: dict[tuple[str, str], Path]) -> None:
    assert served["wheel", "elsewhere"] == served["wheel", "site"] / "mla_ops/registration/__init__.py"


def test_plain_checkout_serves_the_subpackages(served: dict[tuple[str, str], Path], source_copy: Path) -> None:
    assert served["checkout", "from-root"].resolve() == (source_copy / "registration/__init__.py").resolve()


@pytest.mark.parametrize("mode", ["lenient", "strict"])
@pytest.mark.parametrize("start", ["elsewhere", "from-root"])
def test_editable_install_serves_the_subpackages(
    mode: str, start: str, served: dict[tuple[str, str], Path], source_copy: Path
) -> None:
    # A strict install serves a tree of links: only the link's target is the source file.
    assert served[mode, start].resolve() == (source_copy / "registration/__init__.py").resolve()
    if mode == "strict":
        # Type checkers run nothing: they find what lies as files below a path that a .pth file names.
        (pth,) = served["strict", "site"].glob("__editable__*.pth")
        tree = Path(pth.read_text().strip()) / "mla_ops"
        for name in ("py.typed", "registration/__init__.py", "lowering/__init__.py"):
            assert (tree / name).is_file(), name
