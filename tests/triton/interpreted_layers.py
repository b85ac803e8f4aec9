"""Checks of whole layers that keep less, in Triton's interpreter; run with TRITON_INTERPRET=1."""

from __future__ import annotations

import contextlib
import copy
import itertools
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from linattn.models.transnormer_lm import TransNormerConfig, TransNormerLayer, TransNormerLM
from linattn.nn import SGLU, GatedLinearAttention, SimpleRMSNorm
from linattn.nn import fused as maps
from linattn.nn.fused import normed
from tests.triton.interpreted_fused import WIDTH, close, kept
from tests.triton.interpreted_norm import fused
from tests.triton.programs import main

HIDDEN, GLU = 32, 40


def a_layer() -> TransNormerLayer:
    config = TransNormerConfig(
        vocab_size=7, embed_dim=WIDTH, hidden_dim=HIDDEN, num_heads=4, num_layers=2, glu_dim=GLU
    )
    return TransNormerLayer(config, 1)


def run_layer(layer: Any, x: Any) -> Any:
    return layer(x, None, False, None, None, None)[0]


def trained(layer: Any, x: Any, run: Any = run_layer) -> list[Any]:
    """A layer's output and all gradients."""
    leaf = x.clone().requires_grad_()
    layer.zero_grad()
    y = run(layer, leaf)
    y.square().sum().backward()
    return [y.detach(), leaf.grad, *(part.grad.clone() for part in layer.parameters())]


def memory() -> None:
    """What a layer keeps, and what it would."""
    torch.manual_seed(0)
    layer, x = a_layer(), torch.randn(2, 9, WIDTH)
    weights = list(layer.parameters())
    rows = x.numel() // WIDTH * 4  # bytes of one number of each row
    found = []
    for how in (fused(), contextlib.nullcontext()):
        with how:
            leaf = x.clone().requires_grad_()
            found.append(kept(lambda leaf=leaf: run_layer(layer, leaf), weights))
    # x twice, o, q k v u, and l1, l2; plain modules keep norm(x) twice and both products, too
    assert found[0] < rows * (2 * WIDTH + 5 * HIDDEN + 2 * GLU) + 4096
    assert found[1] - found[0] >= rows * (2 * WIDTH + HIDDEN + GLU)


def layers() -> None:
    """A layer with and without nodes, also where it is computed again; no hook misses anything."""
    torch.manual_seed(0)
    layer, x = a_layer(), torch.randn(2, 9, WIDTH)
    plain = trained(layer, x)
    exact = trained(copy.deepcopy(layer).double(), x.double())
    calls = mock.Mock(wraps=maps._apply)
    with fused(), mock.patch.object(maps, "_apply", calls):
        got = trained(layer, x)
        assert calls.call_count == 4  # two norms, the gate, the product
        close(got, exact, torch.float32, 64 * WIDTH)
        for reentrant in (False, True):
            again = trained(
                layer, x, lambda f, x, way=reentrant: checkpoint(run_layer, f, x, use_reentrant=way)
            )
            assert all(torch.equal(mine, other) for mine, other in zip(again, got, strict=True))
        with torch.no_grad():
            calls.reset_mock()
            close([run_layer(layer, x)], exact[:1], torch.float32, 64 * WIDTH)
            assert not calls.called
        # off
        layer.norm.fused = layer.token_mixer.norm.fused = False
        assert all(torch.equal(mine, other) for mine, other in zip(trained(layer, x), plain, strict=True))
        assert not calls.called
        layer.norm.fused = layer.token_mixer.norm.fused = True
        torch.compiler.reset()
        compiled = torch.compile(run_layer, backend="eager")
        assert torch.equal(trained(layer, x, compiled)[0], plain[0])
        assert not calls.called


def fallbacks() -> None:
    """Modules that somebody watches, replaces or changes are called."""
    torch.manual_seed(0)
    x = torch.randn(2, 9, WIDTH)

    def hooked(name: str) -> Any:
        def change(layer: Any) -> Any:
            seen = layer.get_submodule(name)
            seen.register_forward_hook(lambda module, args, out: seen_by.append((args[0], out)))

        return change

    def replaced(layer: Any) -> None:
        old = layer.channel_mixer.l3
        old.forward = lambda x: seen_by.append((x, None)) or nn.functional.linear(x, old.weight)

    def lora(layer: Any) -> None:
        class Lora(nn.Linear):
            def forward(self, x: Any) -> Any:
                seen_by.append((x, None))
                return super().forward(x)

        old = layer.token_mixer.out_proj
        layer.token_mixer.out_proj = Lora(HIDDEN, WIDTH, False)
        layer.token_mixer.out_proj.load_state_dict(old.state_dict())

    def parametrized(layer: Any) -> None:
        parametrizations.weight_norm(layer.channel_mixer.l1)
        seen_by.append((None, None))

    names = ("token_mixer.qkvu_proj", "token_mixer.out_proj", "channel_mixer.l2", "channel_mixer.l3")
    changes = [(hooked(name), 3) for name in names]
    changes += [(hooked("norm"), 2), (hooked("token_mixer"), 3), (hooked("channel_mixer"), 2)]
    changes += [(replaced, 3), (lora, 3), (parametrized, 3)]
    for change, nodes in changes:
        seen_by: list[Any] = []
        layer = a_layer()
        exact = trained(copy.deepcopy(layer).double(), x.double())
        change(layer)
        calls = mock.Mock(wraps=maps._apply)
        with fused(), mock.patch.object(maps, "_apply", calls):
            got = trained(layer, x)
        assert calls.call_count == nodes, (change, calls.call_count)
        assert len(seen_by) in (1, 2), change
        close(got[:2], exact[:2], torch.float32, 64 * WIDTH)
    norms: list[Any] = []
    for own in (False, True):  # a norm that somebody watches, and one of somebody's own
        layer = a_layer()
        if own:

            class Twice(SimpleRMSNorm):
                def gated(self, x: Any, u: Any) -> Any:
                    norms.append(x)
                    return 2 * super().gated(x, u)

            layer.token_mixer.norm = Twice()
        else:
            layer.token_mixer.norm.register_forward_hook(lambda module, args, out: norms.append(out))
        want = trained(copy.deepcopy(layer).double(), x.double())
        norms.clear()
        with fused():
            close(trained(layer, x)[:2], want[:2], torch.float32, 64 * WIDTH)
        assert len(norms) == 1
    found: list[Any] = []
    for watched in ("token_mixer", "channel_mixer"):
        layer = a_layer()
        found.clear()
        layer.get_submodule(watched).register_forward_pre_hook(lambda module, args: found.append(args[0]))
        layer.norm.register_forward_hook(lambda module, args, out: found.append(out))
        with fused():
            run_layer(layer, x)
        assert any(first is second for first, second in itertools.pairwise(found)), "a mixer has normed rows"
    with fused():
        seen = []
        handle = nn.modules.module.register_module_forward_hook(
            lambda module, args, out: seen.append(type(module))
        )
        run_layer(a_layer(), x.requires_grad_())
        handle.remove()
        assert seen.count(nn.Linear) == 5
        other = nn.Linear(WIDTH, 3).double()
        with pytest.raises(RuntimeError, match="dtype"):
            normed(SimpleRMSNorm(), (other,), x)


def public() -> None:
    """prenorm= is the residual branch, also with a state; a model trains."""
    torch.manual_seed(0)
    norm, x = SimpleRMSNorm(), torch.randn(2, 9, WIDTH)
    mixer, unit = GatedLinearAttention(WIDTH, HIDDEN, 4), SGLU(WIDTH, GLU)
    for how in (contextlib.nullcontext(), fused()):
        with how:
            o, state = mixer(norm(x), return_state=True)
            got, after = mixer(x, return_state=True, prenorm=norm)
            close([got, after.kv], [x + o, state.kv], torch.float32)
            close([unit(x, prenorm=norm)], [x + unit(norm(x))], torch.float32)
    config = TransNormerConfig(
        vocab_size=7, embed_dim=WIDTH, hidden_dim=HIDDEN, num_heads=4, num_layers=2, glu_dim=GLU
    )
    model = TransNormerLM(config)
    nn.init.normal_(model.lm_head.weight)
    ids, wide = torch.randint(7, (2, 9)), copy.deepcopy(model).double()
    results = []
    for module, how in ((wide, contextlib.nullcontext()), (model, fused())):
        with how:
            module(ids).square().sum().backward()
        results.append([part.grad for part in module.parameters()])
    close(results[1], results[0], torch.float32, 256 * WIDTH)


if __name__ == "__main__":
    main(globals())
