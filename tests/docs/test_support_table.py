"""The README's table of what each backend supports is what the backends themselves say."""

import re
from dataclasses import replace
from pathlib import Path

from linattn import registry
from linattn.backends import Backend
from linattn.cli.explain import describe

README = Path(__file__).parent.parent.parent / "README.md"
GPU = ("triton", "cupy")
PLAIN = describe((2, 8, 3, 4), value_dim=5)
# what a row is called -> the calls that a "yes" there promises
ROWS: dict[str, list[dict[str, object]]] = {
    "causal; not causal; cross lengths": [{}, {"causal": False}, {"causal": False, "m": 12}],
    "decay per head, per token": [{"decay": "head"}, {"decay": "head", "causal": False}, {"decay": "token"}],
    "`Cosine`, `LRPE`": [{"reweight": "cosine", "max_len": 64}, {"reweight": "lrpe"}],
    "relu, silu, elu+1; normalize": [
        {"feature_map": name, "normalize": normalize}
        for name in ("relu", "silu", "elu+1")
        for normalize in (False, True)
    ],
    "key_mask, lengths, cu_seqlens": [
        {"key_mask": True},
        {"lengths": True},
        {"packed": True, "batch": 1, "n": 16, "m": 16},
    ],
    "initial and final state, slots": [
        {"initial_state": True, "return_state": True},
        {"initial_state": True, "slots": True},
    ],
    "float64, float32, float16": [{"dtype": "float64"}, {}, {"dtype": "float16"}],
    "bfloat16 (NumPy: by ml_dtypes)": [{"dtype": "bfloat16"}],
    "gradients": [{"needs_grad": True, "decay": "head", "reweight": "lrpe"}],
}


def takes(backend: Backend, calls: list[dict[str, object]]) -> str:
    where = {"kind": next(iter(backend.arrays)), "device": "cuda:0" if backend.name in GPU else "cpu"}
    answers = [backend.unsupported(replace(PLAIN, **where, **call)) for call in calls]
    return "no" if all(answers) else "some" if any(answers) else "yes"


def test_the_table_is_what_the_backends_say():
    names = ("triton", "cupy", "torch", "numpy", "reference")
    backends = [backend for backend in registry.known().values() if backend.name in names]
    lines = ["| | " + " | ".join(f"`{backend.name}`" for backend in backends) + " |"]
    lines.append("|---" * (1 + len(backends)) + "|")
    kinds = [
        ", ".join(kind if automatic else f"{kind}, when named" for kind, automatic in backend.arrays.items())
        + (" on CUDA" if backend.name in GPU else "")
        for backend in backends
    ]
    lines.append("| arrays | " + " | ".join(kinds) + " |")
    for row, calls in ROWS.items():
        lines.append(f"| {row} | " + " | ".join(takes(backend, calls) for backend in backends) + " |")
    table = "\n".join(lines)
    found = re.search(r"<!-- support: .*-->\n(.*?)\n*<!-- end of support -->", README.read_text(), re.S)
    assert found
    assert found[1] == table, f"README.md should have\n{table}"
