"""Keep compile caches honest: a graph compiled by another version of this package is never served.

torch's FX-graph and AOT-autograd caches store what our fakes, autograd formulas and lowerings produced, but their keys
do not see that code. A fingerprint of it, appended to `torch.compiler.config.cache_key_tag`, makes it part of the key.
"""

from __future__ import annotations

import hashlib
import importlib.util
import uuid
from collections.abc import Iterator
from functools import cache
from importlib.resources.abc import Traversable

import torch.compiler.config

import mla_ops


@cache
def fingerprint() -> str:
    """Return `mla_ops=<version>-<hash>`, the hash taken over every file of code of the installed package.

    The files are those of a folder or a zip, sources or, in an install without any, compiled modules. Where a loader
    shows no files (a frozen program), a random number stands for them: graphs are then cached for this process only.
    """
    # In a checkout registration/ and lowering/ lie beside mla_ops/, in a wheel inside it: the same names, found once.
    files = dict(_files("mla_ops")) | dict(_files("mla_ops.registration")) | dict(_files("mla_ops.lowering"))
    digest = hashlib.sha256()
    for name, file in sorted(files.items()):
        content = file.read_bytes()
        digest.update(f"{name} {len(content)}\n".encode())
        digest.update(content)
    if not files:
        digest.update(uuid.uuid4().bytes)
    return f"mla_ops={mla_ops.__version__}-{digest.hexdigest()[:16]}"


def tag_compile_caches(*, is_lowered: bool = True, inlined: str = "") -> None:
    """Put the fingerprint, and how kernels are inlined, into torch's cache-key tag; what others put there stays.

    `inlined` is the digest of what else decides how kernels are inlined, a file of launch configurations.

    Since torch 2.13 a setting belongs to the thread that made it, while a thread of autograd's compiles the backward.
    So the tag is set as the default of all threads too. A thread that sets a tag of its own hides that default; this
    is called again in each trace and adds ours to it.
    """
    tag = fingerprint() + ("" if is_lowered else "-extern")
    if inlined:
        tag += f"-{inlined[:16]}"
    config = torch.compiler.config
    # Private, like the absence of any public way to set a default; where the name is gone, the thread's tag remains.
    entry = getattr(config, "_config", {}).get("cache_key_tag")
    # env_value_default, of TORCH_COMPILE_CACHE_KEY_TAG, comes first if it is set.
    for source in ("default", "env_value_default"):
        if isinstance(getattr(entry, source, None), str):
            setattr(entry, source, _tagged(getattr(entry, source), tag))
    if config.cache_key_tag != _tagged(config.cache_key_tag, tag):
        config.cache_key_tag = _tagged(config.cache_key_tag, tag)


def _tagged(tags: str, tag: str) -> str:
    """Return `tags`, a list separated by semicolons, with `tag` as its only entry of this package."""
    others = [other for other in tags.split(";") if other and not other.startswith("mla_ops=")]
    return ";".join([*others, tag])


def _files(package: str) -> Iterator[tuple[str, Traversable]]:
    """Yield the files of code of a package, which need not be imported, by their names below `mla_ops`."""
    spec = importlib.util.find_spec(package)
    get_reader = getattr(spec.loader if spec else None, "get_resource_reader", None)
    files = getattr(get_reader(package) if get_reader else None, "files", None)
    if files is not None:
        yield from _walk(files(), package.removeprefix("mla_ops").replace(".", "/"))


def _walk(folder: Traversable, name: str) -> Iterator[tuple[str, Traversable]]:
    for entry in folder.iterdir():
        if entry.is_dir() and entry.name != "__pycache__":
            yield from _walk(entry, f"{name}/{entry.name}")
        elif entry.name.endswith((".py", ".pyc")):
            yield f"{name}/{entry.name}", entry
