"""Keep compile caches honest: a graph compiled by another version of this package is never served.

torch's FX-graph and AOT-autograd caches store what our fakes, autograd formulas and lowerings produced, but their keys
do not see that code. A fingerprint of it, appended to `torch.compiler.config.cache_key_tag`, makes it part of the key.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

import torch.compiler.config

import mla_ops


@cache
def fingerprint() -> str:
    """Return `mla_ops=<version>-<hash>`, the hash taken over every source file of the installed package."""
    digest = hashlib.sha256()
    for source in sorted(_sources(), key=lambda path: (path.parent.name, path.name)):
        digest.update(source.name.encode())
        digest.update(source.read_bytes())
    return f"mla_ops={mla_ops.__version__}-{digest.hexdigest()[:16]}"


def tag_compile_caches() -> None:
    """Append the fingerprint to torch's cache-key tag, once, leaving what others put there."""
    tag = torch.compiler.config.cache_key_tag
    if fingerprint() not in tag:
        torch.compiler.config.cache_key_tag = f"{tag};{fingerprint()}" if tag else fingerprint()


def _sources() -> list[Path]:
    package = Path(mla_ops.__file__).parent
    registration = Path(__file__).parent
    # In a checkout registration/ and lowering/ lie beside mla_ops/, in a wheel inside it.
    folders = {package, registration, registration.parent / "lowering"}
    return list({source for folder in folders for source in folder.rglob("*.py")})
