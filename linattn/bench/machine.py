"""What a figure depends on besides the code: processor, cores, memory, versions, date, commit."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import linattn


def machine() -> dict[str, str]:
    """Return the facts that a number without which means nothing; "busy" says what else was running."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit(),
        "processor": processor(),
        "cores": str(_cores()),
        "memory": _memory(),
        "busy": _load(),
        **linattn.environment(),
    }


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's model name."""
    if cpuinfo.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.M)
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory() -> str:
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return "unknown"
    return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9:.1f} GB"


def _load() -> str:
    if not hasattr(os, "getloadavg"):
        return "unknown"
    load = os.getloadavg()[0]
    warning = "; too busy for times that can be trusted" if load > _cores() / 2 else ""
    return f"{load:.2f} processes on average in the minute before{warning}"


def commit(package: Path = Path(linattn.__file__).parent) -> str:
    """The commit that is checked out ("with changes" where its sources differ), or the version elsewhere."""
    root = package.resolve().parent
    nowhere = f"none: linattn {linattn.__version__} outside a git checkout"
    try:
        if Path(_git(root, "rev-parse", "--show-toplevel")).resolve() != root:
            return nowhere
        changed = _git(root, "status", "--porcelain", "--", "linattn", "backends", "reference")
        return _git(root, "rev-parse", "--short=12", "HEAD") + (" with changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return nowhere


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
