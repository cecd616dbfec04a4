"""Decode many requests with a paged cache, an indexer and one CUDA graph.

    python examples/decode_loop.py [--steps 100] [--tokens 64] [--device cuda]      half a minute of one CPU core

The model of `mla-ops demo` is trained for a few steps on the source of Python's standard library. Then it continues six
prompts of different lengths, four at a time: `PagedCache` has four rows in its batch, and when a request is done the
next one takes its place. A step appends the new latent rows and index keys, selects among each request's own keys,
attends through the block table and picks the next bytes; it reads lengths and tables on the device, so a graph that was
captured once replays for every step, whatever requests there are. On the CPU, where there are no graphs, only the plain
loop runs.

For each row format a line shows the bytes of a row, the tokens per second of both loops, and how many of the bytes are
those that the model, run on a whole text at once with rows rounded as the format stores them, would have chosen. The
example fails if one is not.
"""

from __future__ import annotations

import argparse
import sys
import sysconfig
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from mla_ops import sparse_attn
from mla_ops.cli.model import LanguageModel, Layer, ModelConfig
from mla_ops.serving import PagedCache, RowCache

CONFIG = ModelConfig()
D_TOTAL, D_V = CONFIG.kv_lora_rank + CONFIG.qk_rope_head_dim, CONFIG.kv_lora_rank
PROMPTS = (90, 33, 64, 8, 50, 21)  # bytes of each
AT_ONCE, PAGE_SIZE = 4, 16
# A byte may differ where the whole-text run prefers its own by less than this: sums in another order decide there.
TIE = 1e-2


class Decoder(nn.Module):
    """The model over a cache: runs the new tokens of all requests, any number of them or one each."""

    def __init__(self, model: LanguageModel, cache: PagedCache) -> None:
        super().__init__()
        self.model, self.cache = model, cache
        device = cache.lens.device
        self.tokens = torch.zeros(AT_ONCE, 1, dtype=torch.long, device=device)  # what each request has last
        self.graph: torch.cuda.CUDAGraph | None = None

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits `[AT_ONCE, width, vocab]` of new tokens `[AT_ONCE, width]`, for which the cache has room."""
        cache, width = self.cache, tokens.shape[1]
        positions, rows = cache.new_positions(width), cache.new_rows(width)  # -1 where there is no token
        x = self.model.embedding(tokens)
        for number, layer in enumerate(layers_of(self.model)):
            hidden, pool = layer.attn_norm(x), cache.pool(number)
            q, kv = layer.attn.mla.project(hidden, positions=positions)
            pool.append(kv.bfloat16(), rows)
            if layer.attn.indexer is not None:
                q_idx, k_idx, weights = layer.attn.indexer.project(hidden, positions=positions)
                keys = cache.index_keys(number)
                keys.append(k_idx, positions)
                # A token sees its request up to itself. A row of the batch without a token sees nothing.
                indices = layer.attn.indexer.select(q_idx, keys.keys, weights, ends=positions + 1, causal=False)
            out, _ = pool.attend(
                q.bfloat16(),
                indices,
                softmax_scale=layer.attn.mla.meta.softmax_scale,
                block_table=cache.block_table,
                seq_lens=cache.seq_lens,
            )
            x = layer.feed_forward(x + layer.attn.mla.project_out(out.float()))
        return self.model.head(self.model.norm(x))

    def prefill(self, prompts: dict[int, Tensor]) -> None:
        """Run the prompts of new requests at once, padded behind; the other requests pause."""
        self.cache.extend({request: len(prompt) for request, prompt in prompts.items()})
        tokens = self.tokens.new_zeros(AT_ONCE, max(map(len, prompts.values())))
        for request, prompt in prompts.items():
            tokens[request, : len(prompt)] = prompt
        logits = self(tokens)
        for request, prompt in prompts.items():
            self.tokens[request] = logits[request, len(prompt) - 1].argmax()

    def step(self) -> None:
        """Run the last token of each request and replace it by the next one."""
        self.tokens.copy_(self(self.tokens).argmax(-1))

    def decode(self, count: int, *, use_graph: bool) -> Tensor:
        """Return `count` further tokens of every row of the batch, `[AT_ONCE, count]`; the host reads none of them."""
        history = []
        for _ in range(count):
            self.cache.extend(dict.fromkeys(self.cache.requests, 1))
            if self.graph is not None:
                self.graph.replay()
            else:
                self.step()  # the first one compiles what the graph will hold
                if use_graph:
                    self.graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(self.graph):
                        self.step()
            history.append(self.tokens.clone())
        return torch.cat(history, dim=1)


def serve(decoder: Decoder, prompts: list[Tensor], count: int, *, use_graph: bool) -> tuple[list[Tensor], float]:
    """Continue every prompt; returns prompts with what follows them, and tokens per second of the decoding steps."""
    cache = decoder.cache
    # The i-th request ends i steps early, so that they come and go at different steps.
    left = [max(count - i, 3) for i in range(len(prompts))]
    texts = list(prompts)
    waiting, running = list(range(len(prompts))), dict[int, int]()  # row of the batch -> number of the prompt
    tokens, seconds, is_warm = 0, 0.0, False
    while waiting or running:
        new = {cache.add(): waiting.pop(0) for _ in range(min(len(waiting), AT_ONCE - len(running)))}
        if new:
            decoder.prefill({request: prompts[number] for request, number in new.items()})
            running |= new
            for request, number in new.items():
                texts[number] = torch.cat([texts[number], decoder.tokens[request]])
                left[number] -= 1
        # Until one is done; the first step stands alone and is not timed: it compiles kernels and captures the graph.
        steps = min(left[number] for number in running.values()) if is_warm else 1
        started = now(cache.lens.device)
        following = decoder.decode(steps, use_graph=use_graph)
        if is_warm:
            seconds += now(cache.lens.device) - started
            tokens += steps * len(running)
        is_warm = True
        for request, number in list(running.items()):
            texts[number] = torch.cat([texts[number], following[request]])
            left[number] -= steps
            if not left[number]:
                cache.free(request)
                del running[request]
    return texts, tokens / seconds


def full_forward(model: LanguageModel, text: Tensor, row_format: str) -> Tensor:
    """Return the logits `[length, vocab]` of a whole text at once: no cache, rows rounded as the format stores them."""
    scratch = RowCache(1, len(text), D_TOTAL, D_V, row_format, device=text.device)
    every_row = torch.arange(len(text), device=text.device)
    x = model.embedding(text.unsqueeze(0))
    for layer in layers_of(model):
        hidden = layer.attn_norm(x)
        q, kv = layer.attn.mla.project(hidden)
        scratch.append(kv[0].bfloat16(), every_row)
        stored = scratch.read(every_row).unsqueeze(0)
        if layer.attn.indexer is not None:
            indices = layer.attn.indexer(hidden)
        softmax_scale = layer.attn.mla.meta.softmax_scale
        out, _ = sparse_attn(q.bfloat16(), stored, indices, d_v=D_V, softmax_scale=softmax_scale)
        x = layer.feed_forward(x + layer.attn.mla.project_out(out.float()))
    return model.head(model.norm(x))[0]


def count_equal(model: LanguageModel, texts: list[Tensor], row_format: str) -> tuple[int, int]:
    """Return how many bytes were decoded, and how many of them `full_forward` would have chosen."""
    decoded = equal = 0
    for text, prompt in zip(texts, PROMPTS, strict=True):
        logits = full_forward(model, text[:-1], row_format)[prompt - 1 :]
        chosen = logits.gather(1, text[prompt:, None]).squeeze(1)
        decoded += len(chosen)
        equal += int((chosen >= logits.amax(dim=1) - TIE).sum())
    return decoded, equal


def layers_of(model: LanguageModel) -> list[Layer]:
    """Return the layers with their type."""
    return [layer for layer in model.layers if isinstance(layer, Layer)]


def now(device: torch.device) -> float:
    """Return the time, after all work of the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def train(model: LanguageModel, text: Tensor, steps: int, device: torch.device) -> None:
    """Teach the model a little: its choices are then clear ones."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        starts = torch.randint(0, len(text) - 129, (8,), generator=generator).tolist()
        windows = torch.stack([text[start : start + 129] for start in starts]).long().to(device)
        sum(model.losses(windows)).backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def main() -> int:
    """Decode in every row format and print a line for each; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="of training")
    parser.add_argument("--tokens", type=int, default=64, help="to decode for the first request")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--row-formats", nargs="+", default=["dense", "fp8", "fp8_all"])
    options = parser.parse_args()
    device = torch.device(options.device)
    has_graphs = device.type == "cuda"
    torch.manual_seed(0)
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in sources)), dtype=torch.uint8)
    model = LanguageModel(CONFIG).to(device)
    with torch.enable_grad():
        train(model, text, options.steps, device)
    prompts = [text[1000 * i : 1000 * i + length].long().to(device) for i, length in enumerate(PROMPTS)]

    name = torch.cuda.get_device_name(device) if has_graphs else "CPU: no CUDA graphs here"
    print(f"{name}; {CONFIG.num_layers} layers, widths {D_TOTAL}/{D_V}; {len(PROMPTS)} requests, {AT_ONCE} at a time")
    print(f"{'rows':10}{'bytes':>6}{'CUDA graph':>18}{'plain loop':>18}   as the whole text at once")
    max_len = max(PROMPTS) + max(options.tokens, 3)
    status = 0
    for row_format in options.row_formats:
        rates, lines = {}, []
        for use_graph in (True, False) if has_graphs else (False,):
            cache = PagedCache(
                layers=CONFIG.num_layers,
                num_pages=AT_ONCE * (max_len // PAGE_SIZE + 1),
                page_size=PAGE_SIZE,
                d_total=D_TOTAL,
                d_v=D_V,
                row_format=row_format,
                max_requests=AT_ONCE,
                max_len=max_len,
                index_head_dim=CONFIG.index_head_dim,
                index_dtype=torch.float32,
                device=device,
            )
            texts, rate = serve(Decoder(model, cache), prompts, options.tokens, use_graph=use_graph)
            rates[use_graph] = f"{rate:,.0f} tokens/s"
            decoded, equal = count_equal(model, texts, row_format)
            lines.append(f"{equal} of {decoded}")
            status |= equal != decoded
        size = cache.pool(0).bytes_per_token
        print(f"{row_format:10}{size:6}{rates.get(True, '-'):>18}{rates[False]:>18}   {', '.join(lines)}", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
