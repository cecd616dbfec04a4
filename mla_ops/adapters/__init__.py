"""Where a model framework's MLA peculiarities are translated: one seam, and one module per framework on top of it.

Importing this package imports nothing else: its modules are imported when first named. Nothing here patches anything
at import.
"""

import importlib as _importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mla_ops.adapters import flash_mla as flash_mla
    from mla_ops.adapters import megatron as megatron
    from mla_ops.adapters import quantized as quantized
    from mla_ops.adapters import seam as seam
    from mla_ops.adapters import torch_layer as torch_layer
    from mla_ops.adapters import transformers as transformers
    from mla_ops.adapters import vllm_cache as vllm_cache
else:  # hidden from type checkers, to which a module with __getattr__ has every name
    _LAZY_MODULES = ("flash_mla", "megatron", "quantized", "seam", "torch_layer", "transformers", "vllm_cache")

    def __getattr__(name: str) -> object:
        if name in _LAZY_MODULES:
            return _importlib.import_module(f"mla_ops.adapters.{name}")
        raise AttributeError(f"module 'mla_ops.adapters' has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *_LAZY_MODULES})
