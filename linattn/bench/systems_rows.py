"""Whole models on one device: training and `generate` beside a Llama of the same size, decoding steps,
MiniMax's layer.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MiniMaxConfig
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

from linattn.bench import claims
from linattn.bench.gpu_measure import STEPS, captured
from linattn.bench.systems import CONTEXTS, LLAMA, OURS, PATCHED, TOKENS, Row, Task, clear, peak_of, timed
from linattn.integrations.transformers import patch_minimax
from linattn.models.huggingface.newer import CHECKPOINTING
from linattn.models.transnormer import TransNormerCache, TransNormerForCausalLM, preset
from linattn.nn import SimpleRMSNorm

CHUNK = 8192  # of a prompt, and of a loss
EAGER = f"{OURS}, no graphs"
NEW = 16, 80  # tokens of two runs, whose difference is free of the prompt
SHARES = (
    (0, ""),
    (1 / 8, "an eighth of the layers checkpointed: without, memory is short"),
    (1 / 4, "a quarter of the layers checkpointed: without, memory is short"),
    (1, "checkpointed: without, memory is short"),
)


def chosen(device: torch.device, kinds: Iterable[str] = (), *, quick: bool = False) -> Iterator[Task]:
    """The rows of some kinds, said as `OF_MODELS` does; of none, all."""
    wanted = {*kinds}
    for task in tasks(device, quick=quick):
        if not wanted or re.split(r"\W", task.row.what)[0] in wanted:
            yield task


def tasks(device: torch.device, *, quick: bool = False) -> Iterator[Task]:
    """All rows, bfloat16 on CUDA, float32 on the CPU; quick: small models, lengths divided by 256."""
    ours, llama, divide = sized(quick)

    def model(fused: bool = True) -> Any:
        made = placed(TransNormerForCausalLM(preset("385m", **ours)), device)
        made.loss_chunk = CHUNK
        for part in made.modules():
            if isinstance(part, SimpleRMSNorm):
                part.fused = fused
        return made

    def other() -> Any:
        return placed(LlamaForCausalLM(LlamaConfig(**llama)), device)

    def trained(make: Callable[[], Any], who: str, n: int, claim: str = "") -> Task:
        row = Row("training", who, max(1, TOKENS // n), n // divide, claim=claim)
        return Task(row, functools.partial(training, make, row.batch, row.n))

    for n in (8192, 32768, 131072):
        yield trained(model, OURS, n)
    for n in (8192, 32768):
        yield trained(other, LLAMA, n)
    yield trained(functools.partial(model, fused=False), claims.PLAIN, 8192, claims.NORM)

    yield from decodings(model, divide)
    yield from generations(model, other, divide)
    yield from minimax(device, 64 if quick else 4096, 2 if quick else 32, 65536 // divide)
    yield from claims.tasks(device, divide, width=preset("385m", **ours).decoder_embed_dim)


def sized(quick: bool) -> tuple[dict[str, Any], dict[str, Any], int]:
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


def placed(model: nn.Module, device: torch.device) -> Any:
    """A model on its device, in the dtype that is measured there."""
    return model.to(device, claims.dtype_of(device))


def training(make: Callable[[], Any], batch: int, n: int) -> dict[str, Any]:
    """A step of a new model; where memory is short, of one whose first layers run twice."""
    for layers, note in SHARES:
        model = make()
        if layers:
            getattr(model, f"{CHECKPOINTING}_enable")()
            blocks = model.get_decoder().layers
            for block in blocks[int(len(blocks) * layers) :]:
                block.gradient_checkpointing = False
        try:
            return {**steps(model, batch, n), "note": note}
        except torch.OutOfMemoryError:
            if layers == 1:
                raise
        del model
    raise AssertionError("the last share returns or raises")


def steps(model: Any, batch: int, n: int) -> dict[str, Any]:
    """Forward, backward and AdamW on random tokens."""
    device = model.device
    clear(device)
    model.train()
    ids = torch.randint(0, model.config.vocab_size, (batch, n), device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device.type == "cuda")

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return {"seconds": timed(step, device), "peak": peak_of(device)}


def decodings(make: Callable[[], Any], divide: int) -> Iterator[Task]:
    """One model behind a short and a long text, and behind many."""

    @functools.cache
    def model() -> Any:
        return make().eval()

    def measured(batch: int, context: int) -> dict[str, Any]:
        return decoding(model(), batch, context)

    near, far = CONTEXTS
    for batch, context in ((1, near), (1, far), (16, near), (64, near)):
        row = Row("decoding", OURS, batch, context // divide)
        yield Task(row, functools.partial(measured, row.batch, row.n))


def generations(ours: Callable[[], Any], llama: Callable[[], Any], divide: int) -> Iterator[Task]:
    """Tokens of `generate` as users call it, by one model with its graphs and without, and by a Llama."""

    @functools.cache
    def made(who: str) -> Any:
        model = (llama if who == LLAMA else ours)().eval()
        if who == EAGER:
            model.graphs = False
        return model

    def measured(who: str, batch: int, context: int) -> dict[str, Any]:
        return generating(made(who), batch, context)

    for who, batch in itertools.product((OURS, EAGER, LLAMA), (1, 64)):
        row = Row("generating", who, batch, CONTEXTS[0] // divide)
        yield Task(row, functools.partial(measured, who, row.batch, row.n))


def generating(model: Any, batch: int, context: int) -> dict[str, Any]:
    """A token of `generate`, greedily: what more tokens take than few do, over how many more they are."""
    device = model.device
    ids = torch.randint(3, model.config.vocab_size, (batch, context), device=device)
    mask = torch.ones_like(ids)

    def run(tokens: int) -> float:
        options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
        return timed(lambda: model.generate(ids, attention_mask=mask, eos_token_id=None, **options), device)

    few, more = NEW
    return {"seconds": max(run(more) - run(few), 0.0) / (more - few), "peak": peak_of(device)}


@torch.no_grad()
def decoding(model: Any, batch: int, context: int) -> dict[str, Any]:
    """A token after `context` others; on CUDA one of several in a graph, where the host takes no time."""
    device = model.device
    cache = TransNormerCache()
    for start in range(0, context, CHUNK):
        piece = torch.randint(1, model.config.vocab_size, (batch, min(CHUNK, context - start)), device=device)
        model(piece, past_key_values=cache, logits_to_keep=1)
    token = torch.ones(batch, 1, dtype=torch.int64, device=device)

    def step() -> Any:
        return model(token, past_key_values=cache).logits

    run, count = step, 1
    if device.type == "cuda":
        graph, _ = captured(step, STEPS)
        run, count = graph.replay, STEPS
    weights = weights_read(model, batch)
    return {
        "seconds": timed(run, device, 20) / count,
        "peak": peak_of(device),
        "weights": weights,
        "bytes": weights + 2 * cache.nbytes,
    }


def weights_read(model: Any, tokens: int) -> int:
    """Bytes of weights that a step reads: of an embedding that is not also the head, one row a token."""
    size: int = sum(x.numel() * x.element_size() for x in model.parameters())
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    if table is not head:
        size -= (len(table) - min(tokens, len(table))) * table.shape[1] * table.element_size()
    return size


def minimax(device: torch.device, width: int, heads: int, n: int) -> Iterator[Task]:
    """The lightning layer of a MiniMax: as it is, by linattn, and its projections alone."""

    @functools.cache  # for all rows
    def given() -> tuple[Any, torch.Tensor]:
        config = MiniMaxConfig(
            hidden_size=width, num_attention_heads=heads, num_key_value_heads=heads, head_dim=width // heads,
            num_hidden_layers=2, layer_types=["linear_attention"] * 2,
        )  # fmt: skip
        layer = placed(MiniMaxLightningAttention(config, 0).eval(), device)
        return layer, torch.randn(1, n, width, device=device, dtype=claims.dtype_of(device))

    @torch.no_grad()
    def whole() -> dict[str, Any]:
        layer, x = given()
        return {"seconds": timed(lambda: layer(x, None, None), device), "peak": peak_of(device)}

    def patched() -> dict[str, Any]:
        with patch_minimax(given()[0]):
            return whole()

    @torch.no_grad()
    def projections() -> dict[str, Any]:
        layer, x = given()
        found = timed(lambda: (layer.qkv_proj(x), layer.output_gate(x), layer.out_proj(x)), device)
        return {"seconds": found, "peak": peak_of(device)}

    for who, run in (("MiniMax", whole), (PATCHED, patched), ("MiniMax, projections alone", projections)):
        yield Task(Row("layer", who, 1, n), run)
