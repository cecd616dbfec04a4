"""The house's import rules, read off the source, and what `import mla_ops` may and may not do."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# layer -> layers it may import. The order is bottom-up and every entry names earlier ones only, so there is no cycle.
LAYERS: dict[str, set[str]] = {
    "errors": set(),
    "problem": {"errors"},
    "device": {"errors", "problem"},
    "settings": {"errors"},
    "wrappers": {"errors"},
    "validation": {"errors", "problem", "wrappers"},
    "reference": {"errors", "problem"},
    "kernels": set(),
    "configs": {"errors", "problem", "device"},
    "backends": {"errors", "problem", "device", "settings", "configs", "kernels"},
    "dispatch": {"errors", "problem", "device", "settings", "validation", "configs", "backends"},
    "registration": {"errors", "problem", "device", "wrappers", "validation", "backends", "dispatch"},
    "lowering": {"errors", "problem", "device", "settings", "configs", "backends", "dispatch", "registration"},
    "api": {"errors", "wrappers", "validation", "dispatch", "registration"},
    "warmup": {"errors", "validation", "registration"},
    "distributed": {"wrappers", "errors", "validation", "registration", "api"},
    "adapters": {"errors", "problem", "device", "dispatch", "api"},
    "testing": {"errors", "problem", "reference", "api"},
    # adapters: the demo's model is built from the plain PyTorch layer. backends: `tune` and `bench` launch kernels with
    # configurations of their own, past dispatch.
    "cli": {"errors", "problem", "device", "settings", "configs", "backends", "dispatch", "api", "adapters"},
}
# The seam and its parts know no framework and no operator: callers pass what they return to whichever front door.
SEAM = tuple(f"mla_ops/adapters/{name}.py" for name in ("seam", "metadata", "packing", "layout", "backend_plan"))
SEAM_IMPORTS = {"errors", "problem", "device", "dispatch"}
# Users of the public names: they may import the package itself.
PACKAGE_USERS = {"adapters", "cli", "testing"}
# Who else may say a name that has one owner: (file, name) with the reason.
EXCEPTIONS = {
    ("registration/fake.py", "mla_ops.lowering"): "its tracing hook installs the lowering, inside a function",
    ("mla_ops/backends/triton.py", "torch.library"): "torch.library.wrap_triton",
    ("registration/cache_key.py", "mla_ops"): "the version and the package's folder, both set before registration runs",
}
# name -> the files or folders that own it; nobody else imports it or reaches it as an attribute.
OWNERS = {
    "torch.library": ("registration/", "lowering/"),
    "torch._inductor": ("lowering/inductor_compat.py",),
    "torch.distributed": ("mla_ops/distributed.py", "registration/sharding.py"),
    "os.environ": ("mla_ops/settings.py",),
    "os.getenv": ("mla_ops/settings.py",),
    "torch.cuda.is_available": ("mla_ops/device.py",),
    "torch.cuda.current_device": ("mla_ops/device.py",),
    "torch.cuda.device_count": ("mla_ops/device.py",),
    "torch.cuda.get_device_properties": ("mla_ops/device.py",),
    "torch.cuda.get_device_capability": ("mla_ops/device.py",),
    "torch.cuda.get_device_name": ("mla_ops/device.py",),
    "megatron": ("mla_ops/adapters/megatron.py",),
    "transformers": ("mla_ops/adapters/transformers.py",),
    # Their tensors are known by what they hold: see adapters/quantized.py.
    "torchao": (),
    "transformer_engine": (),
}
# Slow or optional: imported inside functions only, except by the kernels, which are themselves imported lazily.
LAZY = (
    "triton",
    "torch._inductor",
    "torch._dynamo",
    "torch.distributed.tensor",
    "megatron",
    "transformers",
    "matplotlib",
    "tqdm",
)


@dataclass(frozen=True)
class Use:
    file: str
    line: int
    name: str  # dotted
    is_import: bool
    in_function: bool


def sources() -> list[Path]:
    return sorted(p for folder in ("mla_ops", "registration", "lowering") for p in (ROOT / folder).rglob("*.py"))


def uses(path: Path) -> Iterator[Use]:
    file = path.relative_to(ROOT).as_posix()

    def visit(node: ast.AST, in_function: bool) -> Iterator[Use]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Use(file, node.lineno, alias.name, True, in_function)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: relative import; write the full name"
            for alias in node.names:
                yield Use(file, node.lineno, f"{node.module}.{alias.name}", True, in_function)
        elif isinstance(node, ast.Attribute):
            name = dotted(node)
            if name is not None:
                yield Use(file, node.lineno, name, False, in_function)
                return
        inside = in_function or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside)

    yield from visit(ast.parse(path.read_text()), False)


def dotted(node: ast.expr) -> str | None:
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return None if base is None else f"{base}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else None


def layer_of(module: str) -> str | None:
    """`mla_ops.backends.eager` -> `backends`; None for the package itself."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else None


def layer_of_file(file: str) -> str | None:
    parts = Path(file).with_suffix("").parts
    if parts[0] in ("registration", "lowering"):
        return parts[0]
    return None if parts[1] == "__init__" else parts[1]


def is_under(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def excused(use: Use, name: str) -> bool:
    return (use.file, name) in EXCEPTIONS


def is_seam_import(name: str) -> bool:
    module = name.rpartition(".")[0]
    return layer_of(module) in SEAM_IMPORTS or f"{module.replace('.', '/')}.py" in SEAM


def broken_rules(path: Path) -> list[str]:
    broken = []
    for use in uses(path):
        where = f"{use.file}:{use.line}"
        own = layer_of_file(use.file)
        if use.is_import and is_under(use.name, "mla_ops") and own not in (None, "__main__"):
            target = layer_of(use.name)
            if target not in LAYERS:  # `from mla_ops import x`: a layer or something of the package itself
                target = None
            if target is None and own not in PACKAGE_USERS and not excused(use, "mla_ops"):
                broken.append(f"{where}: layer {own!r} imports the package itself ({use.name}); import the layer")
            elif target not in (None, own, *LAYERS[own]) and not excused(use, f"mla_ops.{target}"):
                broken.append(f"{where}: layer {own!r} may not import {target!r} ({use.name})")
            if use.file in SEAM and not is_seam_import(use.name):
                broken.append(f"{where}: the seam may not import {use.name}; it knows no framework and no operator")
            own_parts = f"mla_ops.backends.{Path(use.file).stem.partition('_')[0]}_"
            if own == target == "backends" and not use.name.startswith(("mla_ops.backends.base", own_parts)):
                broken.append(f"{where}: backends never import one another ({use.name})")
        for name, owners in OWNERS.items():
            if is_under(use.name, name) and not use.file.startswith(owners) and not excused(use, name):
                broken.append(f"{where}: {name} belongs to {' and '.join(owners) or 'nobody'}")
        for name in LAZY:
            at_import = use.is_import and not use.in_function and own != "kernels"
            if at_import and is_under(use.name, name):
                broken.append(f"{where}: import {name} inside the function that needs it")
    return broken


@pytest.mark.parametrize("path", sources(), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_import_rules(path: Path) -> None:
    assert broken_rules(path) == []


def test_layers_only_point_down() -> None:
    seen: set[str] = set()
    for layer, below in LAYERS.items():
        assert below <= seen, f"{layer} names a layer that is not below it"
        seen.add(layer)


@pytest.mark.parametrize(
    ("file", "code", "message"),
    [
        ("mla_ops/problem.py", "from mla_ops.dispatch import select", "layer 'problem' may not import 'dispatch'"),
        ("mla_ops/backends/eager.py", "from mla_ops.backends.triton import x", "backends never import one another"),
        ("mla_ops/backends/eager.py", "from mla_ops.backends.triton_hopper import x", "backends never import one"),
        ("mla_ops/api.py", "import torch\ntorch.library.define('a', 'b')", "torch.library belongs to registration/"),
        ("mla_ops/dispatch.py", "import os\nos.environ['X']", "os.environ belongs to mla_ops/settings.py"),
        ("mla_ops/dispatch.py", "import triton", "import triton inside the function"),
        ("mla_ops/adapters/quantized.py", "def f():\n    import torchao", "torchao belongs to nobody"),
        ("registration/impl.py", "def f():\n    import torch._inductor.ir", "torch._inductor belongs to lowering/"),
        ("mla_ops/reference.py", "import torch\ntorch.cuda.get_device_name()", "belongs to mla_ops/device.py"),
        ("mla_ops/dispatch.py", "from mla_ops import sparse_attn", "imports the package itself"),
        ("mla_ops/dispatch.py", "from mla_ops.adapters.seam import x", "layer 'dispatch' may not import 'adapters'"),
        ("mla_ops/adapters/layout.py", "from mla_ops.api import sparse_attn", "the seam may not import mla_ops.api"),
        ("mla_ops/adapters/seam.py", "from mla_ops.adapters.torch_layer import x", "the seam may not import"),
        ("mla_ops/api.py", "from mla_ops.testing import Case", "layer 'api' may not import 'testing'"),
    ],
)
def test_the_rules_can_fail(
    file: str, code: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(code)
    assert any(message in broken for broken in broken_rules(path))


def run_python(program: str, cwd: Path = ROOT) -> str:
    result = subprocess.run([sys.executable, "-c", program], cwd=cwd, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_import_is_light() -> None:
    program = """
import sys, mla_ops
heavy = ("torch._inductor", "torch._dynamo", "torch.distributed.tensor", "mla_ops.lowering", "mla_ops.testing",
         "mla_ops.kernels", "mla_ops.cli", "mla_ops.adapters", "transformers", "megatron", "torchao", "matplotlib",
         "registration", "lowering")
print([m for m in sys.modules if any(m == h or m.startswith(h + ".") for h in heavy)])
"""
    assert run_python(program) == "[]"


def test_import_and_use_without_triton() -> None:
    program = """
import sys
sys.modules["triton"] = None
import mla_ops
from mla_ops.testing import Case, make_inputs
inputs = make_inputs(Case(d_total=24, d_v=16)).requires_grad()
mla_ops.sparse_attn(*inputs.args[:3], **inputs.kwargs).out.sum().backward()
print(bool(inputs.kv.grad.abs().sum() > 0))
"""
    assert run_python(program) == "True"


@pytest.mark.parametrize("folder", ["registration", "lowering"])
def test_outside_folders_have_one_import_name(folder: str) -> None:
    program = f"""
import mla_ops
try:
    import {folder}
except ImportError as error:
    print(error)
"""
    assert run_python(program).startswith(f"import mla_ops.{folder}, not {folder}: ")


def test_cache_tag_is_appended_once() -> None:
    program = """
import torch.compiler.config as config
config.cache_key_tag = "mine"
import mla_ops
from mla_ops.registration.cache_key import fingerprint, tag_compile_caches
tag_compile_caches()
assert config.cache_key_tag == f"mine;{fingerprint()}", config.cache_key_tag
print(fingerprint())
"""
    assert run_python(program).startswith("mla_ops=")


def test_fingerprint_sees_every_source(tmp_path: Path) -> None:
    for folder in ("mla_ops", "registration", "lowering"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    program = "from mla_ops.registration.cache_key import fingerprint; print(fingerprint())"
    prints = {run_python(program, tmp_path)}
    for source in ("mla_ops/backends/eager.py", "registration/autograd.py", "lowering/__init__.py"):
        (tmp_path / source).write_text((tmp_path / source).read_text() + "\n# changed\n")
        prints.add(run_python(program, tmp_path))
    assert len(prints) == 4


def test_a_walk_over_the_packages_modules_ends() -> None:
    # In a checkout the package's own folder lies on its path; TORCH_LOGS="mla_ops" walks it while torch is imported.
    program = """
import pkgutil, mla_ops
names = [module.name for module in pkgutil.walk_packages(mla_ops.__path__, "mla_ops.", onerror=lambda name: None)]
print(max(name.count("mla_ops") for name in names), "mla_ops.lowering.choices" in names)
"""
    assert run_python(program) == "2 True"
