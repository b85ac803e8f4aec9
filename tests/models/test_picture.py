"""The picture shows what the layer does, not something like it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

import linattn
from linattn.errors import DataError, LinattnError
from linattn.models import TransNormerConfig, TransNormerLM
from linattn.models.picture import draw, weights_of_first_layer

TEXT = b"def f(x):\n    return '$' + x\n"
CONFIG = TransNormerConfig(
    embed_dim=8, hidden_dim=12, num_heads=3, num_layers=2, glu_dim=8, linear_use_lrpe_list=(1, 0)
)


def drawn(config=CONFIG):
    torch.manual_seed(0)
    return TransNormerLM(config).double()


def close(got, want):
    assert got.shape == want.shape
    assert (abs(got - want) <= 200 * np.finfo(np.float64).eps * max(1.0, abs(want).max())).all()


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        dataclasses.replace(CONFIG, linear_use_lrpe_list=()),
        *(dataclasses.replace(CONFIG, feature_map=name) for name in ("relu", "elu+1", None)),
    ],
)
@pytest.mark.parametrize("head", [0, 2])
def test_weights_times_values_are_what_attention_gives(config, head):
    model = drawn(config)
    mixer = model.layers[0].token_mixer
    with torch.no_grad():
        x = model.layers[0].norm(model.embed(torch.tensor([list(TEXT)])))
        q, k, v, _ = mixer.project(x)
        layer = linattn.attention(q, k, v, **mixer.options())[0, :, head].numpy()
        cosformer = linattn.cosformer_attention(q, k, v, causal=True)[0, :, head].numpy()
        softmax = torch.nn.functional.scaled_dot_product_attention(
            *(a.transpose(1, 2) for a in (q, k, v)), is_causal=True
        )[0, head].numpy()
    weights, values = weights_of_first_layer(model, TEXT, head), v[0, :, head].numpy()
    close(weights["LRPE with decay"] @ values, layer)
    close(weights["cosFormer"] @ values, cosformer)
    close(weights["softmax"] @ values, softmax)
    lag = np.arange(len(TEXT))[:, None] - np.arange(len(TEXT))
    close(
        weights["decay alone"], np.where(lag >= 0, np.exp(-(2.0 ** -[4, 8, 2][head]) * 1.00001) ** lag, 0.0)
    )


def test_the_picture_is_written(tmp_path):
    path = tmp_path / "picture.png"
    draw(drawn(), TEXT, path)
    assert path.read_bytes()[:4] == b"\x89PNG" and path.stat().st_size > 50_000


def test_refusals(tmp_path):
    with pytest.raises(DataError, match="no text to draw"):
        draw(drawn(), b"", tmp_path / "picture.png")
    with pytest.raises(LinattnError, match=r"picture.png cannot be written: No such file"):
        draw(drawn(), TEXT, tmp_path / "nowhere" / "picture.png")
