"""Examples that run without a GPU, shortened."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]


def test_the_indexer_learns_where_dense_attention_goes() -> None:
    command = [sys.executable, str(ROOT / "examples/train_indexer.py"), "--steps", "30", "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    stages = {line.split()[0]: line for line in result.stdout.splitlines()[1:]}
    assert list(stages) == ["dense", "warm-up", "sparse"]
    shares = {name: [float(share) for share in re.findall(r"([\d.]+)%", line)] for name, line in stages.items()}
    for recall, best, _ in shares.values():
        assert recall <= best
    untrained, warm = shares["dense"], shares["warm-up"]
    # Of what the best choice gains over a random one, the warm-up has most and an untrained indexer little.
    assert untrained[0] - untrained[2] < 0.2 * (untrained[1] - untrained[2])
    assert warm[0] - warm[2] > 0.5 * (warm[1] - warm[2])


def test_decoding_with_a_cache_chooses_the_bytes_of_the_whole_text_at_once() -> None:
    command = [
        sys.executable,
        str(ROOT / "examples/decode_loop.py"),
        *["--steps", "5", "--tokens", "8", "--device", "cpu"],
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]
    lines = {line.split()[0]: line for line in result.stdout.splitlines()[2:]}
    assert list(lines) == ["dense", "fp8", "fp8_all"]
    assert all(line.endswith("33 of 33") for line in lines.values()), result.stdout


@torch.no_grad()
def test_logits_of_prompts_and_of_steps_are_those_of_the_whole_text_at_once() -> None:
    spec = importlib.util.spec_from_file_location("decode_loop", ROOT / "examples/decode_loop.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    torch.manual_seed(0)
    model = example.LanguageModel(example.CONFIG)
    cache = example.PagedCache(
        layers=2,
        num_pages=20,
        page_size=16,
        d_total=128,
        d_v=64,
        row_format="fp8",
        max_requests=4,
        max_len=64,
        index_head_dim=32,
        index_dtype=torch.float32,
    )
    decoder = example.Decoder(model, cache)
    texts = torch.randint(0, 256, (4, 60))
    requests = [cache.add() for _ in range(4)]
    logits = []
    for start, end in ((0, 50), (50, 57), *((i, i + 1) for i in range(57, 60))):
        cache.extend(dict.fromkeys(requests, end - start))
        logits.append(decoder(texts[:, start:end]))
    whole = torch.stack([example.full_forward(model, text, "fp8") for text in texts])
    torch.testing.assert_close(torch.cat(logits, dim=1), whole, rtol=0, atol=1e-3)
