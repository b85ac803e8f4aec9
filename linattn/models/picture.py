"""A picture of pair weights: what each position takes from each earlier one, under four rules."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from linattn.errors import DataError, LinattnError
from linattn.models.transnormer_lm import TransNormerLayer, TransNormerLM
from linattn.reference import weights as pair_weights

if TYPE_CHECKING:
    from jaxtyping import Float

    Weights = Float[np.ndarray, "n n"]

SHOWN = 48  # bytes of text in the picture: as many as can be read beside the axes
DPI = 200


def weights_of_first_layer(model: TransNormerLM, text: bytes, head: int) -> dict[str, Weights]:
    """Return the pair weights [n, n] of one head of the first layer on a text, by the rule's name.

    All four rules see the same learned q and k: softmax(q·k / sqrt(D)); cosFormer with max_len = n,
    normalised; LRPE with decay as the layer really has it (no LRPE in the layer: decay with its features);
    and the decay alone.

    Raises DataError when the text is empty.
    """
    if not text:
        raise DataError("there is no text to draw the weights of")
    layer = model.layers[0]
    assert isinstance(layer, TransNormerLayer)
    mixer = layer.token_mixer
    ids = torch.tensor([list(text)], device=model.lm_head.weight.device)
    with torch.no_grad():
        q, k = (
            x.double().cpu().numpy()[:, :, [head]] for x in mixer.project(layer.norm(model.embed(ids)))[:2]
        )
    n, d = len(text), mixer.head_dim
    decay = np.zeros(1) if mixer.log_decay is None else mixer.log_decay.cpu().numpy()[[head]]
    theta = None if mixer.lrpe is None else mixer.lrpe.theta.detach().double().cpu().numpy()[[head], 0]
    scores = np.where(np.tri(n, dtype=bool), q[0, :, 0] @ k[0, :, 0].T / np.sqrt(d), -np.inf)
    exponentials = np.exp(scores - scores.max(1, keepdims=True))
    cosine = pair_weights(q, k, theta=np.full((1, d), np.pi / (2 * n)), feature_map="relu")[0, 0]
    lrpe = pair_weights(q, k, log_decay=decay, theta=theta, feature_map=mixer.feature_map)[0, 0]
    lag = np.arange(n)[:, None] - np.arange(n)
    return {
        "softmax": exponentials / exponentials.sum(1, keepdims=True),
        "cosFormer": cosine / np.maximum(cosine.sum(1, keepdims=True), 1e-6),
        "LRPE with decay": lrpe,
        "decay alone": np.where(lag >= 0, np.exp(decay * np.maximum(lag, 0)), 0.0),
    }


def draw(model: TransNormerLM, text: bytes, path: Path, *, head: int | None = None) -> None:
    """Write a PNG of the four rules on the first bytes of a text.

    head: counted from 0; unless given, one that forgets neither fast nor slowly.

    Raises DataError when the text is empty, LinattnError when the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    text = text[:SHOWN]
    head = (model.config.num_heads - 1) // 2 if head is None else head
    figure = Figure(figsize=(11, 11), layout="compressed")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2).ravel()
    for axis, (name, weights) in zip(axes, weights_of_first_layer(model, text, head).items(), strict=True):
        _panel(figure, axis, name, weights, text)
    figure.suptitle(
        f"What each byte takes from the bytes before it: head {head} of the first layer, after training",
        fontsize=13,
    )
    try:
        figure.savefig(path, dpi=DPI, metadata={"Software": None})
    except OSError as error:
        raise LinattnError(f"{path} cannot be written: {error.strerror or error}") from error


CAPTIONS = {
    "softmax": "rows sum to 1",
    "cosFormer": "rows sum to 1; relu features, a quarter wave long",
    "LRPE with decay": "as the layer has it: signed, rows sum to nothing in particular",
    "decay alone": "1 on the diagonal, one factor per byte",
}


def _panel(figure: Any, axis: Any, name: str, weights: Weights, text: bytes) -> None:
    n = len(text)
    past = np.tri(n, dtype=bool)
    shown = np.where(past, weights, np.nan)  # what may not be looked at stays white
    # a few large weights must not leave the rest black: the scale ends at the 99th percentile
    top = float(np.quantile(abs(weights[past]), 0.99)) or 1.0
    signed = bool((weights[past] < -1e-3 * top).any())
    image = axis.imshow(
        shown,
        cmap="RdBu_r" if signed else "viridis",
        vmin=-top if signed else 0.0,
        vmax=top,
        interpolation="nearest",
    )
    over = float(abs(weights[past]).max()) > top * (1 + 1e-9)
    extend = ("both" if signed else "max") if over else "neither"
    figure.colorbar(image, ax=axis, shrink=0.8, pad=0.02, extend=extend)
    axis.set_title(name, fontsize=12, fontweight="bold", pad=18)
    axis.text(0.5, 1.015, CAPTIONS[name], transform=axis.transAxes, ha="center", fontsize=9, color="0.35")
    letters = [_letter(byte) for byte in text]
    axis.set_xticks(range(n), letters, fontsize=6.5, family="monospace")
    axis.set_yticks(range(n), letters, fontsize=6.5, family="monospace")
    axis.tick_params(length=0, pad=1.5)
    axis.set_xlabel("byte that is looked at", fontsize=9)
    axis.set_ylabel("byte that looks", fontsize=9)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _letter(byte: int) -> str:
    """A byte as one visible character; $ would begin a formula in matplotlib."""
    if byte == 0x20:
        return "·"
    if byte == 0x0A:
        return "↵"
    return rf"\{chr(byte)}" if byte == 0x24 else chr(byte) if 0x21 <= byte < 0x7F else "▪"
