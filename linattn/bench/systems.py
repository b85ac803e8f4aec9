"""Whole models: training beside a Llama of the same size, decoding, MiniMax's layer patched and not."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MiniMaxConfig
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

from linattn.bench.gpu_measure import captured
from linattn.integrations.transformers import patch_minimax
from linattn.models.transnormer import TransNormerCache, TransNormerForCausalLM, preset

TOKENS = 32768  # of a training step
OURS, LLAMA = "TransNormerLLM-385M", "Llama-374M, SDPA"
CONTEXTS = 1024, 131072
CHUNK = 8192  # of a prompt, and of a loss


@dataclass(frozen=True)
class Row:
    """seconds: of a training step, a decoded token (of all rows of a batch), or a layer's forward pass.

    n: tokens of a text, or in front of a decoded token. peak: bytes held at most, on CUDA. weights: bytes of
    the model's.
    """

    what: str
    who: str
    batch: int
    n: int
    seconds: float
    peak: int | None = None
    weights: int = 0

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.batch * (self.n if self.what == "training" else 1) / self.seconds


@dataclass(frozen=True)
class Verdict:
    """A requirement, and what was measured: both as words."""

    required: str
    found: str
    met: bool


def sized(device: torch.device, quick: bool) -> tuple[dict[str, Any], dict[str, Any], int]:
    """Fields of the two models, and what lengths are divided by."""
    small = {"decoder_layers": 2, "decoder_embed_dim": 64, "hidden_dim": 64, "decoder_attention_heads": 2,
             "glu_dim": 96, "linear_use_lrpe_list": [1, 0], "vocab_size": 1000}  # fmt: skip
    ours = {**(small if quick else {}), "tie_word_embeddings": True, "eos_token_id": None}
    full = preset("385m", **ours)
    llama = {
        "vocab_size": full.vocab_size,
        "hidden_size": full.decoder_embed_dim,
        "intermediate_size": full.glu_dim,
        "num_hidden_layers": full.decoder_layers,
        "num_attention_heads": full.decoder_attention_heads,
        "tie_word_embeddings": True,
        "attn_implementation": "sdpa",
    }
    return ours, llama, 256 if quick else 1


def measure(device: torch.device, *, quick: bool = False) -> Iterator[Row]:
    """Yield rows as they are measured, bfloat16 on CUDA, float32 on the CPU."""
    ours, llama, divide = sized(device, quick)
    tokens = TOKENS // divide
    for n in (8192 // divide, 32768 // divide, 131072 // divide):
        model = placed(TransNormerForCausalLM(preset("385m", **ours)), device)
        model.loss_chunk = CHUNK
        if n > tokens:  # a text longer than a step: its activations are formed twice
            model.gradient_checkpointing_enable()
        yield training(model, OURS, max(1, tokens // n), n)
        del model
    for n in (8192 // divide, 32768 // divide):
        yield training(placed(LlamaForCausalLM(LlamaConfig(**llama)), device), LLAMA, tokens // n, n)
    model = placed(TransNormerForCausalLM(preset("385m", **ours)), device).eval()
    for batch, context in ((1, CONTEXTS[0]), (1, CONTEXTS[1]), (64, CONTEXTS[0])):
        yield decoding(model, batch, context // divide)
    del model
    width = 64 if quick else 4096
    yield from minimax(device, width, 2 if quick else 32, 65536 // divide)


def placed(model: nn.Module, device: torch.device) -> Any:
    """A model on its device, in the dtype that is measured there."""
    return model.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)


def timed(run: Callable[[], object], device: torch.device, times: int = 5) -> float:
    """The median of several runs after two that are not timed."""
    found = []
    for turn in range(times + 2):
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        if turn >= 2:
            found.append(time.perf_counter() - start)
    return statistics.median(found)


def synchronize(device: torch.device) -> None:
    """Wait for a device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def training(model: Any, who: str, batch: int, n: int) -> Row:
    """Forward, backward and AdamW on random tokens."""
    device = model.device
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    model.train()
    ids = torch.randint(0, model.config.vocab_size, (batch, n), device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device.type == "cuda")

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    seconds = timed(step, device)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return Row("training", who, batch, n, seconds, peak)


@torch.no_grad()
def decoding(model: Any, batch: int, context: int) -> Row:
    """A token after `context` others; on CUDA in a graph, where the host takes no time."""
    device = model.device
    cache = TransNormerCache()
    for start in range(0, context, CHUNK):
        piece = torch.randint(1, model.config.vocab_size, (batch, min(CHUNK, context - start)), device=device)
        model(piece, past_key_values=cache, logits_to_keep=1)
    token = torch.ones(batch, 1, dtype=torch.int64, device=device)

    def step() -> Any:
        return model(token, past_key_values=cache).logits

    run: Callable[[], object] = step
    if device.type == "cuda":
        graph, _ = captured(step)
        run = graph.replay
    weights = sum(x.numel() * x.element_size() for x in model.parameters())
    return Row("decoding", OURS, batch, context, timed(run, device, 20), weights=weights)


@torch.no_grad()
def minimax(device: torch.device, width: int, heads: int, n: int) -> Iterator[Row]:
    """The lightning layer of a MiniMax: as it is, by linattn, and its projections alone."""
    config = MiniMaxConfig(
        hidden_size=width, num_attention_heads=heads, num_key_value_heads=heads, head_dim=width // heads,
        num_hidden_layers=2, layer_types=["linear_attention"] * 2,
    )  # fmt: skip
    layer = placed(MiniMaxLightningAttention(config, 0).eval(), device)
    x = torch.randn(1, n, width, device=device, dtype=layer.out_proj.weight.dtype)

    def run() -> object:
        return layer(x, None, None)

    def projections() -> object:
        return layer.qkv_proj(x), layer.output_gate(x), layer.out_proj(x)

    yield Row("layer", "MiniMax", 1, n, timed(run, device))
    with patch_minimax(layer):
        yield Row("layer", "MiniMax, patched", 1, n, timed(run, device))
    yield Row("layer", "MiniMax, projections alone", 1, n, timed(projections, device))


def verdicts(rows: list[Row], bandwidth: float = 0.0) -> list[Verdict]:
    """What is required of these rows on an H200, where they are there.

    bandwidth: bytes per second that a copy reads and writes, 0 where it is not known.
    """
    at = {(row.what, row.who, row.batch, row.n): row for row in rows}
    found: list[Verdict] = []

    def judge(required: str, value: float, unit: str, *, least: float = 0, most: float = math.inf) -> None:
        found.append(Verdict(required, f"{value:.3g}{unit}", least <= value <= most))

    base, long, longest = (at.get(("training", OURS, b, n)) for b, n in ((4, 8192), (1, 32768), (1, 131072)))
    for n, ours, times in ((8192, base, 1.5), (32768, long, 3.0)):
        other = at.get(("training", LLAMA, TOKENS // n, n))
        if ours and other:
            ratio = ours.rate / other.rate
            judge(f"N = {n}: {times:g} times Llama's tokens per second", ratio, " times", least=times)
        if n == 8192 and ours and other and ours.peak and other.peak:
            judge(f"N = {n}: less memory than Llama", ours.peak / other.peak, " of it", most=1)
    if base and longest:
        judge("N = 131072: 95 % of the rate at 8192", 100 * longest.rate / base.rate, " %", least=95)
    near, far = (at.get(("decoding", OURS, 1, n)) for n in CONTEXTS)
    if near and far:
        ratio = 100 * far.seconds / near.seconds
        judge("a token after 131072 takes as long as after 1024, within 2 %", ratio, " %", most=102)
    for row in (near, at.get(("decoding", OURS, 64, CONTEXTS[0]))):
        if row and row.weights and bandwidth:
            ratio = row.seconds * bandwidth / row.weights
            judge(f"batch {row.batch}: a token in 1.3 times reading the weights", ratio, " times", most=1.3)
    layer = at.get(("layer", "MiniMax, patched", 1, 65536))
    if layer:
        judge("MiniMax's layer, N = 65536: 22 ms", 1e3 * layer.seconds, " ms", most=22)
    return found


def as_json(rows: list[Row]) -> list[dict[str, Any]]:
    """Rows as JSON can hold them, with their rates."""
    return [
        asdict(row) | {"tokens_per_second": row.rate if math.isfinite(row.rate) else None} for row in rows
    ]
