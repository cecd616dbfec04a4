"""The house's import rules, read off the source, and what `import mla_ops` may and may not do."""

from __future__ import annotations

import ast
import compileall
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

# Ground knows no operator. layer -> layers it may import, bottom-up: every entry names earlier ones only.
GROUND: dict[str, set[str]] = {
    "errors": set(),
    "settings": {"errors"},
    "device": {"errors"},
    "wrappers": {"errors"},
    "scaled_tensors": {"errors"},
    "checks": {"errors", "wrappers"},
    "dispatch": {"errors", "device"},
    "launching": {"errors", "device"},
    "gathering": {"settings"},
    "row_formats": {"errors"},
    "row_tiling": {"row_formats"},
    "pages": {"errors", "checks", "row_formats"},
    "kernels": set(),
    "row_sums": {"launching", "kernels"},
    "tiling": {"device"},
}
# A room holds one operator. part of a room -> parts of the same room it may import, bottom-up. Every part stands on the
# ground too.
ROOM: dict[str, set[str]] = {
    "call": set(),
    "rules": {"call"},
    "reference": {"call"},
    "configs": {"call"},
    "kernels": set(),
    "backend": {"call"},
    "eager": {"call", "backend"},
    "triton": {"call", "configs", "kernels", "backend"},
    "backends": {"call", "rules", "backend", "eager", "triton"},
}
# (operator, operator whose room it may enter): why. An operator made of others stands here.
COMPOSITES: dict[tuple[str, str], str] = {
    (
        "index_scores",
        "index_topk",
    ): "scores on a list are those that selection ranks: one formula, one set of rules",
    ("index_loss_dense", "index_topk"): "it scores the keys that selection ranks: one formula, one set of rules",
    ("sparse_attn_paged", "sparse_attn"): "attention on rows that stand elsewhere: one merge, dense rows of one stride",
    ("sparse_attn_paged", "read_rows"): "its definition begins with rows as numbers",
    ("index_loss_dense", "attn_mass"): "its target is attention mass over all keys: one set of rules",
}
# What stands on the rooms, bottom-up.
LAYERS: dict[str, set[str]] = {
    **GROUND,
    "ops": set(GROUND),
    "reference": {"ops"},
    "registration": {*GROUND, "ops"},
    "lowering": {*GROUND, "ops", "registration"},
    "api": {*GROUND, "ops", "registration"},
    # Caches hold rows by the row formats and the operators' front doors; they know no framework.
    "serving": {"errors", "row_formats", "api"},
    "distributed": {"wrappers", "errors", "ops", "registration", "api"},
    "adapters": {"wrappers", "scaled_tensors", "errors", "row_formats", "device", "dispatch", "ops", "api"},
    "testing": {"errors", "ops", "reference", "api"},
    # `tune` and `bench` launch kernels with configurations of their own, past dispatch.
    "bench": {"errors", "settings", "device", "ops", "api"},
    # adapters: the demo's model is built from the plain PyTorch layer. bench: its commands.
    "cli": {"errors", "settings", "device", "ops", "api", "adapters", "bench"},
}
# The seam knows no framework, and of the operator only who would run a layer.
SEAM = "mla_ops/adapters/seam/"
SEAM_IMPORTS = (
    "mla_ops.adapters.seam",
    "mla_ops.errors",
    "mla_ops.device",
    "mla_ops.dispatch",
    "mla_ops.ops.sparse_attn.backends",
    "mla_ops.ops.sparse_attn.call",
)
# Users of the public names: they may import the package itself.
PACKAGE_USERS = {"adapters", "bench", "cli", "testing"}
# Who else may say a name that has one owner: (file, name) with the reason.
EXCEPTIONS = {
    ("registration/tracing.py", "mla_ops.lowering"): "a trace installs the lowerings, inside a function",
    ("registration/cache_key.py", "mla_ops"): "the version and the package's folder, both set before registration runs",
}
# name -> the files or folders that own it; nobody else imports it or reaches it as an attribute.
OWNERS = {
    "torch.library": ("registration/", "lowering/"),
    "torch._inductor": ("lowering/inductor_compat.py",),
    "torch.distributed": (
        "mla_ops/distributed.py",
        "registration/tracing.py",
        "registration/attn_mass_sharding.py",
        "registration/index_scores_sharding.py",
        "registration/index_topk_sharding.py",
        "registration/sparse_attn_sharding.py",
    ),
    "os.environ": ("mla_ops/settings.py",),
    "os.getenv": ("mla_ops/settings.py",),
    "torch.cuda.is_available": ("mla_ops/device.py",),
    "torch.cuda.current_device": ("mla_ops/device.py",),
    "torch.cuda.device_count": ("mla_ops/device.py",),
    "torch.cuda.get_device_properties": ("mla_ops/device.py",),
    "torch.cuda.get_device_capability": ("mla_ops/device.py",),
    "torch.cuda.get_device_name": ("mla_ops/device.py",),
    "megatron": ("mla_ops/adapters/megatron/",),
    "transformers": ("mla_ops/adapters/transformers.py",),
    # Their tensors are known by what they hold: see scaled_tensors.py.
    "torchao": (),
    "transformer_engine": (),
}
# Slow or optional: imported inside functions only, except by the kernels, which are themselves imported lazily.
LAZY = (
    "triton",
    "torch.utils.flop_counter",  # imports triton
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
    """`mla_ops.ops.sparse_attn.eager` -> `ops`; None for the package itself."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else None


def module_of(file: str) -> str:
    parts = Path(file).with_suffix("").parts
    parts = parts if parts[0] == "mla_ops" else ("mla_ops", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> tuple[str, str] | None:
    """`mla_ops.ops.sparse_attn.configs.sm90` -> ("sparse_attn", "configs"); None outside of the rooms."""
    parts = module.split(".")
    return (parts[2], parts[3]) if parts[1:2] == ["ops"] and len(parts) > 3 else None


def operator_of(file: str) -> str | None:
    """Return whose file this is among those of `registration/` and `lowering/` that belong to one operator."""
    folder, _, name = file.rpartition("/")
    owners = [room for room in rooms() if name.startswith((f"{room}.", f"{room}_"))]
    return max(owners, key=len, default=None) if folder in ("registration", "lowering") else None


def rooms() -> list[str]:
    return [folder.name for folder in (ROOT / "mla_ops/ops").glob("*/")]


def is_under(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def excused(use: Use, name: str) -> bool:
    return (use.file, name) in EXCEPTIONS


def broken_room_rules(use: Use) -> Iterator[str]:
    """What an import of something in a room breaks."""
    target = room_of(use.name)
    if target is None:
        return
    own = room_of(module_of(use.file)) or (operator_of(use.file), None)
    (own_operator, own_part), (operator, part) = own, target
    if own_operator is None:
        return
    if own_operator != operator:
        if (own_operator, operator) not in COMPOSITES:
            yield f"{own_operator!r} may not enter the room of {operator!r} ({use.name})"
    elif own_part is not None and part not in (own_part, *ROOM[own_part]):
        yield f"part {own_part!r} of a room may not import its {part!r} ({use.name})"


def broken_rules(path: Path) -> list[str]:
    broken = []
    for use in uses(path):
        where = f"{use.file}:{use.line}"
        own = layer_of(module_of(use.file))
        if use.is_import and is_under(use.name, "mla_ops") and own not in (None, "__main__"):
            target = layer_of(use.name)
            if target not in LAYERS:  # `from mla_ops import x`: a layer or something of the package itself
                target = None
            if target is None and own not in PACKAGE_USERS and not excused(use, "mla_ops"):
                broken.append(f"{where}: layer {own!r} imports the package itself ({use.name}); import the layer")
            elif target not in (None, own, *LAYERS[own]) and not excused(use, f"mla_ops.{target}"):
                broken.append(f"{where}: layer {own!r} may not import {target!r} ({use.name})")
            if use.file.startswith(SEAM) and not use.name.startswith(SEAM_IMPORTS):
                broken.append(f"{where}: the seam may not import {use.name}; it knows no framework and no operator")
            broken += [f"{where}: {rule}" for rule in broken_room_rules(use)]
        for name, owners in OWNERS.items():
            if is_under(use.name, name) and not use.file.startswith(owners) and not excused(use, name):
                broken.append(f"{where}: {name} belongs to {' and '.join(owners) or 'nobody'}")
        for name in LAZY:
            at_import = use.is_import and not use.in_function and "/kernels/" not in use.file
            if at_import and is_under(use.name, name):
                broken.append(f"{where}: import {name} inside the function that needs it")
    return broken


@pytest.mark.parametrize("path", sources(), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_import_rules(path: Path) -> None:
    assert broken_rules(path) == []


@pytest.mark.parametrize("table", [LAYERS, ROOM], ids=["layers", "room"])
def test_layers_only_point_down(table: dict[str, set[str]]) -> None:
    seen: set[str] = set()
    for layer, below in table.items():
        assert below <= seen, f"{layer} names a layer that is not below it"
        seen.add(layer)


def test_the_ground_knows_no_operator() -> None:
    for layer, below in GROUND.items():
        assert below <= set(GROUND), f"{layer} is ground and stands on more than ground"


@pytest.mark.parametrize(
    ("file", "code", "message"),
    [
        ("mla_ops/device.py", "from mla_ops.dispatch import decide", "layer 'device' may not import 'dispatch'"),
        ("mla_ops/dispatch.py", "from mla_ops.ops.sparse_attn.call import x", "'dispatch' may not import 'ops'"),
        (
            "mla_ops/ops/sparse_attn/call.py",
            "from mla_ops.registration import x",
            "'ops' may not import 'registration'",
        ),
        (
            "mla_ops/ops/sparse_attn/rules.py",
            "from mla_ops.ops.sparse_attn.eager import x",
            "may not import its 'eager'",
        ),
        ("mla_ops/ops/sparse_attn/eager.py", "from mla_ops.ops.sparse_attn.triton import x", "not import its 'triton'"),
        (
            "mla_ops/ops/sparse_attn/call.py",
            "from mla_ops.ops.other.call import x",
            "may not enter the room of 'other'",
        ),
        ("registration/sparse_attn.py", "from mla_ops.ops.other.call import x", "may not enter the room of 'other'"),
        ("lowering/sparse_attn_choices.py", "from mla_ops.ops.other.call import x", "may not enter the room of"),
        ("mla_ops/device.py", "import torch\ntorch.library.define('a', 'b')", "torch.library belongs to registration/"),
        ("mla_ops/dispatch.py", "import os\nos.environ['X']", "os.environ belongs to mla_ops/settings.py"),
        ("mla_ops/dispatch.py", "import triton", "import triton inside the function"),
        ("mla_ops/adapters/quantized.py", "def f():\n    import torchao", "torchao belongs to nobody"),
        ("registration/library.py", "def f():\n    import torch._inductor.ir", "torch._inductor belongs to lowering/"),
        ("mla_ops/reference.py", "import torch\ntorch.cuda.get_device_name()", "belongs to mla_ops/device.py"),
        ("mla_ops/dispatch.py", "from mla_ops import sparse_attn", "imports the package itself"),
        ("mla_ops/dispatch.py", "from mla_ops.adapters.seam import x", "layer 'dispatch' may not import 'adapters'"),
        ("mla_ops/adapters/seam/layout.py", "from mla_ops.api import x", "the seam may not import mla_ops.api"),
        ("mla_ops/adapters/seam/__init__.py", "from mla_ops.adapters.torch_layer import x", "the seam may not import"),
        ("mla_ops/adapters/seam/layout.py", "from mla_ops.ops.sparse_attn.eager import x", "the seam may not import"),
        ("mla_ops/api/attention.py", "from mla_ops.testing import Case", "layer 'api' may not import 'testing'"),
    ],
)
def test_the_rules_can_fail(
    file: str, code: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    for room in ("sparse_attn", "other"):
        (tmp_path / "mla_ops/ops" / room).mkdir(parents=True)
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(code)
    assert any(message in broken for broken in broken_rules(path))


def run_python(program: str, cwd: Path = ROOT) -> str:
    result = subprocess.run([sys.executable, "-c", program], cwd=cwd, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


# What `import mla_ops` does in a new process whose working directory is a checkout; one process for all its tests.
IN_A_CHECKOUT = """
import json, sys
import torch.compiler.config as config
config.cache_key_tag = "mine"
import mla_ops
from mla_ops import *
dir(mla_ops)
heavy = ("triton", "torch._inductor", "torch._dynamo", "torch.distributed.tensor", "mla_ops.lowering",
         "mla_ops.testing", "mla_ops.serving", "mla_ops.kernels", "mla_ops.cli", "mla_ops.bench", "mla_ops.adapters",
         "transformers", "megatron", "torchao", "matplotlib", "registration", "lowering")
outcomes = {"heavy": [m for m in sys.modules if any(m == h or m.startswith(h + ".") for h in heavy)]}

from mla_ops.registration.cache_key import fingerprint, tag_compile_caches
tag_compile_caches()
outcomes |= {"tag": config.cache_key_tag, "fingerprints": [fingerprint()]}
for file in ("mla_ops/ops/sparse_attn/eager.py", "registration/sparse_attn.py", "lowering/__init__.py"):
    with open(file, "a") as source:
        source.write("\\n# changed\\n")
    fingerprint.cache_clear()
    outcomes["fingerprints"].append(fingerprint())

for folder in ("registration", "lowering"):
    try:
        __import__(folder)
    except ImportError as error:
        outcomes[folder] = str(error)

# The package's own folder lies on its path; TORCH_LOGS="mla_ops" walks it while torch is imported.
import pkgutil
walk = pkgutil.walk_packages(mla_ops.__path__, "mla_ops.", onerror=lambda name: None)
outcomes["walked"] = [module.name for module in walk]
print(json.dumps(outcomes))
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    checkout = tmp_path_factory.mktemp("checkout")
    for folder in ("mla_ops", "registration", "lowering"):
        shutil.copytree(ROOT / folder, checkout / folder, ignore=shutil.ignore_patterns("__pycache__"))
    return json.loads(run_python(IN_A_CHECKOUT, checkout))


def test_import_is_light(outcomes: dict[str, Any]) -> None:
    assert outcomes["heavy"] == []


@pytest.mark.parametrize(
    ("package", "modules"),
    [
        ("mla_ops", ["adapters", "distributed", "lowering", "reference", "serving", "settings", "testing"]),
        (
            "mla_ops.adapters",
            ["flash_mla", "megatron", "quantized", "seam", "torch_layer", "transformers", "vllm_cache"],
        ),
    ],
)
def test_public_modules_are_attributes(package: str, modules: list[str]) -> None:
    program = f"""
import sys, mla_ops
before = [m for m in {modules} if m in dir({package})]
print(before, [getattr({package}, m).__name__ for m in {modules}], hasattr({package}, "nothing"))
"""
    assert run_python(program) == f"{modules} {[f'{package}.{module}' for module in modules]} False"


def test_a_switch_is_reached_without_another_import() -> None:
    program = """
import mla_ops
mla_ops.lowering.disable()
print(mla_ops.lowering.is_enabled())
"""
    assert run_python(program) == "False"


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
def test_outside_folders_have_one_import_name(folder: str, outcomes: dict[str, Any]) -> None:
    assert outcomes[folder].startswith(f"import mla_ops.{folder}, not {folder}: ")


def test_cache_tag_is_appended_once(outcomes: dict[str, Any]) -> None:
    fingerprint = outcomes["fingerprints"][0]
    assert fingerprint.startswith("mla_ops=")
    assert outcomes["tag"] == f"mine;{fingerprint}"


def test_fingerprint_sees_every_source(outcomes: dict[str, Any]) -> None:
    assert len(outcomes["fingerprints"]) == len(set(outcomes["fingerprints"])) == 4


def test_fingerprint_sees_where_a_source_lies(tmp_path: Path) -> None:
    for folder in ("mla_ops", "registration", "lowering"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    program = "from mla_ops.registration.cache_key import fingerprint; print(fingerprint())"
    # Two files of one name in folders of one name that change places are another package.
    for room, content in (("a", "x = 1"), ("b", "x = 2")):
        (tmp_path / "mla_ops/ops" / room / "kernels").mkdir(parents=True)
        (tmp_path / "mla_ops/ops" / room / "kernels/forward.py").write_text(content)
    prints = {run_python(program, tmp_path)}
    (tmp_path / "mla_ops/ops/a").rename(tmp_path / "mla_ops/ops/c")
    (tmp_path / "mla_ops/ops/b").rename(tmp_path / "mla_ops/ops/a")
    (tmp_path / "mla_ops/ops/c").rename(tmp_path / "mla_ops/ops/b")
    prints.add(run_python(program, tmp_path))
    assert len(prints) == 2


@pytest.mark.parametrize("kind", ["compiled", "zip", "frozen"])
def test_fingerprint_of_an_install_without_sources_in_a_folder(kind: str, tmp_path: Path) -> None:
    package = tmp_path / "wheel/mla_ops"  # as a wheel holds it
    shutil.copytree(ROOT / "mla_ops", package, ignore=shutil.ignore_patterns("__pycache__"))
    for folder in ("registration", "lowering"):
        shutil.copytree(ROOT / folder, package / folder, ignore=shutil.ignore_patterns("__pycache__"))
    program = "import mla_ops.registration.cache_key as key; print(key.fingerprint())"
    if kind == "frozen":
        program = program.replace("key; ", "key; key._files = lambda package: (); key.fingerprint.cache_clear(); ")
    prints = set()
    for text in ("# one\n", "# two\n"):
        source = package / "ops/sparse_attn/kernels/forward.py"
        source.write_text((ROOT / "mla_ops/ops/sparse_attn/kernels/forward.py").read_text() + text * (kind != "frozen"))
        install = tmp_path / text.strip("# \n")
        if kind == "zip":
            program_path = Path(shutil.make_archive(str(install), "zip", package.parent))
        else:
            program_path = install
            shutil.copytree(package.parent, install)
        if kind == "compiled":
            compileall.compile_dir(install, legacy=True, quiet=1)
            for file in install.rglob("*.py"):
                file.unlink()
        found = f"import sys; sys.path.insert(0, {str(program_path)!r}); "
        for _ in range(2):
            prints.add(run_python(found + program, tmp_path))
    assert len(prints) == (4 if kind == "frozen" else 2)


def test_a_walk_over_the_packages_modules_ends(outcomes: dict[str, Any]) -> None:
    assert max(name.count("mla_ops") for name in outcomes["walked"]) == 2
    assert "mla_ops.lowering.sparse_attn_choices" in outcomes["walked"]
