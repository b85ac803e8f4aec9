"""`linattn explain`: which backend a call of this shape would use, without the arrays."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from linattn.backends.triton import tuned
from linattn.cli.device import check_name, cuda_is_missing
from linattn.cli.names import DTYPES, Dtype, backends
from linattn.cli.output import print_json, print_lines, waiting
from linattn.errors import OptionError, ShapeError
from linattn.problem import Problem
from linattn.vjp import explain_problem

if TYPE_CHECKING:
    from linattn.vjp import Explanation

BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
COPIES = {"NVIDIA H200": 4249, "NVIDIA H100": 2950}  # GB/s read and written, as measured: docs/
ASSUMED = (132, "NVIDIA H200")  # multiprocessors, name


def _sizes(text: str) -> tuple[int, int, int, int]:
    parts = text.replace("x", ",").split(",")
    if len(parts) != 4 or not all(part.strip().isdigit() for part in parts):
        raise ShapeError(f"--shape must be four sizes B,N,H,D, such as 4,8192,32,128; got {text!r}")
    b, n, h, d = map(int, parts)
    return b, n, h, d


def _strides(*shape: int) -> tuple[int, ...]:
    """Strides of a contiguous array, in elements."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def describe(
    shape: tuple[int, int, int, int] = (1, 1024, 8, 64),
    *,
    kind: str = "numpy",
    device: str = "cpu",
    dtype: str = "float32",
    value_dim: int | None = None,
    keys: int | None = None,
    decay: str | None = None,
    reweight: str | None = None,
    max_len: int | None = None,
    feature_map: str | None = None,
    normalize: bool = False,
    causal: bool = True,
    state: bool = False,
    needs_grad: bool = False,
) -> Problem:
    """Return the Problem of a call on contiguous arrays of these sizes; options as the public call has them.

    Raises OptionError for combinations that the public call refuses too.
    """
    b, n, h, d = shape
    m, e = n if keys is None else keys, d if value_dim is None else value_dim
    check_name(device)
    if (kind == "numpy") is not (device == "cpu") and kind != "torch":
        homes = {"numpy": "NumPy arrays live on the cpu", "cupy": "CuPy arrays live on a cuda device"}
        raise OptionError(f"{homes[kind]}, not on {device!r}")
    if causal and m != n:
        raise OptionError(f"a causal call has as many keys as queries, got {n} queries and {m} keys")
    if not causal and (decay == "token" or state):
        raise OptionError("per-token decay and states are causal: leave out --not-causal")
    if state and reweight == "cosine" and max_len is None:
        raise OptionError("cosine reweighting with a state needs a fixed length: give --max-len")
    if max_len is not None and reweight != "cosine":
        raise OptionError("--max-len is of cosine reweighting: give --reweight cosine")
    if max_len is not None and max_len < max(n, m):
        raise OptionError(f"--max-len {max_len} is shorter than the call's {max(n, m)} positions")
    return Problem(
        kind=kind,
        device=device,
        dtype=dtype,
        batch=b,
        n=n,
        m=m,
        heads=h,
        d=d,
        e=e,
        sequences=b,
        decay=decay,
        reweight=reweight,
        max_len=max(n, m) if reweight == "cosine" and max_len is None else max_len,
        feature_map=feature_map,
        normalize=normalize,
        eps=1e-6,
        causal=causal,
        scale=1.0,
        key_mask=False,
        lengths=False,
        packed=False,
        initial_state=state,
        return_state=state,
        slots=False,
        precision="ieee",
        batch_invariant=False,
        needs_grad=needs_grad,
        strides=(_strides(b, n, h, d), _strides(b, m, h, d), _strides(b, m, h, e)),
    )


def explain(
    shape: Annotated[str, typer.Option(help="Sizes B,N,H,D of q.")] = "1,1024,8,64",
    array: Annotated[Literal["numpy", "torch", "cupy"], typer.Option(help="Whose arrays.")] = "torch",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    dtype: Annotated[Dtype, typer.Option(help="Of q, k and v.")] = "float32",
    value_dim: Annotated[int | None, typer.Option(min=0, help="E, if it is not D.")] = None,
    keys: Annotated[int | None, typer.Option(min=0, help="M, if it is not N (not causal).")] = None,
    decay: Annotated[Literal["head", "token"] | None, typer.Option(help="[H] or [B, N, H].")] = None,
    reweight: Annotated[
        Literal["cosine", "lrpe"] | None, typer.Option(help="Cosine(...) or LRPE(...).")
    ] = None,
    max_len: Annotated[int | None, typer.Option(min=1, help="Of Cosine.")] = None,
    feature_map: Annotated[Literal["relu", "silu", "elu+1"] | None, typer.Option(help="On q and k.")] = None,
    normalize: Annotated[bool, typer.Option("--normalize", help="Divide by the sum of the weights.")] = False,
    not_causal: Annotated[bool, typer.Option("--not-causal", help="Look at every key.")] = False,
    state: Annotated[bool, typer.Option("--state", help="Take and return a state.")] = False,
    grad: Annotated[bool, typer.Option("--grad", help="Differentiate.")] = False,
    backend: Annotated[
        list[str] | None,
        typer.Option(metavar="<name>", help="Only these, in order (repeatable).", autocompletion=backends),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show which backend a call would use here, and one sentence for each that it would not.

    Of Triton's kernels, the plan of a forward pass is shown as well: blocks, launches, the bytes that have to
    be moved and the time that a copy takes for as many, below which no kernel comes. Without a CUDA device
    that is for a card that is named. The call is described, not made: no array is allocated, so the shape may
    be larger than this machine.
    """
    problem = describe(
        _sizes(shape),
        kind=array,
        device=device,
        dtype=DTYPES.get(dtype, dtype),
        value_dim=value_dim,
        keys=keys,
        decay=decay,
        reweight=reweight,
        max_len=max_len,
        feature_map=feature_map,
        normalize=normalize,
        causal=not not_causal,
        state=state,
        needs_grad=grad,
    )
    with waiting("asking the backends"):
        decision = explain_problem(problem, backend or "auto")
        steps, card = plan(problem, decision)
        said = tuned.in_use(device) if steps and card is None else None
    homeless = array == "torch" and cuda_is_missing(device)
    if homeless:
        absent = "would run, but no CUDA device is here"
        decision = replace(
            decision, chosen=None, reasons={name: why or absent for name, why in decision.reasons.items()}
        )
    if as_json:
        answer: dict[str, Any] = {
            "call": str(problem),
            "chosen": decision.chosen,
            "backends": decision.reasons,
        }
        answer |= {"kernels": decision.kernels} if decision.kernels else {}
        print_json(answer | {"tuned": said, "assumed": card, "plan": steps})
        return
    typer.echo(str(decision))
    if homeless:
        so = "" if card is None else f"; on one {card}, triton would run a forward pass like this:"
        typer.echo(f"no CUDA device is here{so}")
    elif steps is not None:
        typer.echo("plan of a forward pass:")
    if steps is not None:
        print_lines({f"  {name}": value for name, value in steps.items()})
    if said is not None:
        typer.echo(f"tuned: {said}")


def plan(problem: Problem, decision: Explanation) -> tuple[dict[str, str] | None, str | None]:
    """How the Triton backend would run a forward pass, where it would; and the card that is assumed.

    Without a CUDA device the plan is that of the card which the published figures are of. Nothing is planned
    where Triton's kernels refuse the call, or come after a backend that takes it.
    """
    from linattn.backends.triton import backend

    names = list(decision.reasons)
    if (
        not problem.device.startswith("cuda")
        or problem.kind not in backend.arrays
        or backend.name not in names
    ):
        return None, None
    if decision.chosen == backend.name:
        from torch.cuda import get_device_properties

        found = get_device_properties(problem.device)
        return _steps(problem, found.multi_processor_count, found.name), None
    earlier = any(decision.reasons[name] is None for name in names[: names.index(backend.name)])
    if earlier or not cuda_is_missing(problem.device) or backend.unsupported(problem) is not None:
        return None, None
    return _steps(replace(problem, device="cpu"), *ASSUMED), ASSUMED[1]  # nothing is tuned for a cpu


def _steps(problem: Problem, multiprocessors: int, card: str) -> dict[str, str]:
    from linattn.backends.triton.plan import described

    moved = problem.batch * problem.heads * (problem.n + problem.m) * (problem.d + problem.e)
    moved *= BYTES[problem.dtype]
    rate = next((rate for name, rate in COPIES.items() if card.startswith(name)), None)
    floor = "not known for this card: `linattn bench --gpu` measures it"
    if rate is not None:
        floor = f"{moved / rate / 1e6:.3g} ms (these bytes at {rate} GB/s, which a copy reached on {card})"
    return {**described(problem, multiprocessors), "floor": floor}
