"""Head-dim families: the (d_total, d_v) pairs that the tables have rows for, by name."""

from __future__ import annotations

FAMILIES: dict[str, tuple[int, int]] = {
    "576x512": (576, 512),  # DeepSeek: kv_lora_rank 512, rope 64
    "320x256": (320, 256),
    "256x192": (256, 192),
    "192x128": (192, 128),
    "192x64": (192, 64),
    "144x80": (144, 80),
    "128x64": (128, 64),  # NAM56R: kv_lora_rank 64, rope 64
    "1024x1024": (1024, 1024),  # the widest row that is launched
}
