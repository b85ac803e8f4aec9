"""Launch configurations that `linattn tune` found for a GPU: the file they lie in, and their lookup.

A file is JSON: {"tuned": {KEY: {FAMILY: {"c", "block_e", "warps", "stages", "across", ...}}}}. KEY names the
GPU, its compute capability, Triton's version and FORMAT; what stands under another key is ignored. Nothing
here needs torch or Triton before a call on a GPU asks.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from linattn.backends.triton.plan import Blocks, padded
from linattn.errors import LinattnError

FORMAT = 2
"""What a configuration means: raised whenever the kernels change so that older ones mean something else."""

TOKENS, SLICES, WARPS, STAGES = (16, 32, 64, 128), (16, 32, 64, 128), (4, 8), (2, 3, 4)
"""What c, block_e, warps and stages may be."""


@dataclass(frozen=True)
class Family:
    """The calls that share one configuration: padded sizes, one state or two, values or gradients.

    operand: what matrix products take, "bfloat16", or "float32" for float16 and float32 calls. d, e:
    contracted and value features, powers of two from 16 on. two: with angles. gradient: of the gradients
    of q and k.
    """

    operand: str  # "bfloat16" | "float32": what matrix products take
    d: int
    e: int
    two: bool
    gradient: bool

    @classmethod
    def of(cls, operand: str, d: int, e: int, two: bool, gradient: bool) -> Family:
        """The family of d contracted and e value features."""
        return cls(operand, padded(d), padded(e), two, gradient)

    def __str__(self) -> str:
        angles, what = "angles" if self.two else "plain", "gradient" if self.gradient else "value"
        return f"{self.operand} {self.d} {self.e} {angles} {what}"


Table = Mapping[str, Blocks]
"""Configurations by the name of their family."""


class _Choice:
    """What is in force in this process: the user's file, one that the program named, none, or a table."""

    default: bool = True
    path: Path | None = None
    table: Table | None = None


def default_path() -> Path | None:
    """Where `linattn tune` writes unless told otherwise; None where the user has no home folder."""
    try:
        return Path.home() / ".cache" / "linattn" / "tuned.json"
    except RuntimeError:
        return None


def chosen_path() -> Path | None:
    """The file that calls look into, whether or not it exists."""
    return default_path() if _Choice.default else _Choice.path


def load(path: str | os.PathLike[str]) -> dict[str, dict[str, Blocks]]:
    """Return every configuration of a file that has this FORMAT, by key and family.

    Raises LinattnError for a file that is missing, unreadable or not what `linattn tune` writes.
    """
    path = Path(path)
    ours = f"format {FORMAT}"
    return {name: _table(path, found) for name, found in _parsed(path).items() if name.endswith(ours)}


def use(path: str | os.PathLike[str] | None) -> None:
    """From now on, take configurations from this file; None: only those that the library ships.

    Raises LinattnError as `load` does, and then changes nothing.
    """
    if path is not None:
        load(path)
    _set(default=False, path=None if path is None else Path(path).resolve())


def use_default() -> None:
    """From now on, take configurations from the user's file again, as a new process does; it is read anew."""
    _set(default=True)


def use_table(table: Table) -> None:
    """From now on, use these configurations on every device: how a configuration is tried."""
    _set(default=False, table=dict(table))


def _set(*, default: bool, path: Path | None = None, table: Table | None = None) -> None:
    from linattn.backends.triton import plan

    _Choice.default, _Choice.path, _Choice.table = default, path, table
    of_device.cache_clear()
    plan.blocks.cache_clear()


def lookup(device: str, operand: str, d: int, e: int, two: bool, gradient: bool) -> Blocks | None:
    """The configuration that was tuned for this device ("cuda:0") and these sizes, or None."""
    if _Choice.table is None and not device.startswith("cuda"):
        return None
    return of_device(device).get(str(Family.of(operand, d, e, two, gradient)))


@functools.lru_cache(maxsize=64)
def of_device(device: str) -> Table:
    """What was tuned for a device. A file that cannot be used is one warning, and as good as none."""
    if _Choice.table is not None:
        return _Choice.table
    path = chosen_path()
    if path is None:
        return {}
    try:
        return _table(path, _parsed(path, missing_is_empty=True).get(key_of(device), {}))
    except LinattnError as error:
        warnings.warn(f"{error}; the shipped launch configurations are used", RuntimeWarning, stacklevel=2)
        return {}


def in_use(device: str = "cuda") -> str | None:
    """One sentence about what calls on this device use, or None where it is what the library ships."""
    if not device.startswith("cuda") or not all(map(importlib.util.find_spec, ("torch", "triton"))):
        return None
    if not importlib.import_module("torch").cuda.is_available():
        return None
    count = len(of_device(device))
    if not count:
        return None
    return f"{count} launch configuration{'s' * (count > 1)} from {chosen_path()}"


def key_of(device: str = "cuda") -> str:
    """What a configuration depends on besides the sizes: the GPU's name and capability, Triton, FORMAT."""
    gpu = importlib.import_module("torch").cuda.get_device_properties(device)
    return key(gpu.name, (gpu.major, gpu.minor), importlib.import_module("triton").__version__)


def key(name: str, capability: tuple[int, int], triton: str) -> str:
    """The text of a key: "NVIDIA H100, capability 9.0, triton 3.6.0, format 2"."""
    return f"{name}, capability {capability[0]}.{capability[1]}, triton {triton}, format {FORMAT}"


def save(path: str | os.PathLike[str], gpu: str, found: Mapping[Family, Mapping[str, object] | None]) -> None:
    """Put entries of one key into a file, beside what it holds; None takes an entry out.

    The file is replaced in one step, and several processes wait for each other. A file that would hold
    nothing is not made.

    path: the file. gpu: a `key`. found: by family, {"c", "block_e", "warps", "stages"} and, unless it is
    True, "across", as `Blocks` has them; numbers of other names are for people.

    Raises LinattnError for a configuration that is not among those tried, and where the file cannot be
    written or holds something else; it is untouched then.
    """
    from linattn.safetensors_io import write_whole

    path = Path(path).resolve()
    for family, entry in found.items():
        if entry is not None:
            _blocks(path, str(family), entry)  # what is written can be read
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LinattnError(f"cannot write {path}: {error.strerror or error}") from error
    with _alone(path.parent):
        content = _parsed(path, missing_is_empty=True)
        families = content.setdefault(gpu, {})
        for family, entry in found.items():
            families.pop(str(family), None)
            if entry is not None:
                families[str(family)] = dict(entry)
        if not families:
            del content[gpu]
        if content or path.exists():
            write_whole(path, (json.dumps({"tuned": content}, indent=2, sort_keys=True) + "\n").encode())


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold a folder's lock where the system has locks: no entry is lost between read and write."""
    if importlib.util.find_spec("fcntl") is None:
        yield
        return
    fcntl: Any = importlib.import_module("fcntl")
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise LinattnError(f"cannot write into {folder}: {error.strerror or error}") from error
    try:
        with contextlib.suppress(OSError):  # some network folders have no locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _parsed(path: Path, *, missing_is_empty: bool = False) -> dict[str, dict[str, Any]]:
    """The file's content by key, entries as they stand there."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        if missing_is_empty:
            return {}
        raise LinattnError(f"there is no file {path}") from error
    except OSError as error:
        raise LinattnError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise LinattnError(f"{path} is not a file of `linattn tune`: it is no JSON") from error
    found = content.get("tuned") if isinstance(content, dict) else None
    if not isinstance(found, dict) or not all(isinstance(families, dict) for families in found.values()):
        raise LinattnError(f"{path} is not a file of `linattn tune`: it has no configurations by GPU")
    return found


def _table(path: Path, families: Mapping[str, Any]) -> dict[str, Blocks]:
    return {family: _blocks(path, family, entry) for family, entry in families.items()}


def _blocks(path: Path, family: str, entry: Any) -> Blocks:
    """One configuration of a file; other numbers beside its own four are for people."""
    allowed = {"c": TOKENS, "block_e": SLICES, "warps": WARPS, "stages": STAGES}
    if not isinstance(entry, Mapping):
        raise LinattnError(f"{path}: the entry {family!r} is no configuration")
    for name, values in allowed.items():
        value = entry.get(name)
        if type(value) is not int or value not in values:
            known = ", ".join(map(str, values))
            raise LinattnError(f"{path}: {family!r} has {name} = {value!r}, expected one of {known}")
    sizes = [int(word) for word in family.split() if word.isdigit()]
    if len(sizes) == 2 and entry["block_e"] > sizes[1]:
        raise LinattnError(
            f"{path}: {family!r} has block_e = {entry['block_e']}, expected at most {sizes[1]}"
        )
    across = entry.get("across", True)
    if type(across) is not bool:
        raise LinattnError(f"{path}: {family!r} has across = {across!r}, expected true or false")
    c, block_e, warps, stages = (entry[name] for name in allowed)
    return Blocks(c, block_e, warps, stages, across)
