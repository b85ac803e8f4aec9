"""The wheel and the sdist carry the whole library, each file once, and need only what they declare."""

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent.parent
OUTSIDE = shutil.ignore_patterns(
    ".venv", ".git", ".*_cache", ".hypothesis", "__pycache__", "build", "dist", "out", "_build", "*.egg-info"
)
IMPORTS = """
import importlib.util, sys
import numpy as np
import linattn, linattn.backends, linattn.reference
import linattn.backends.reference, linattn.reference.weights
assert linattn.__file__.startswith(sys.argv[1]), linattn.__file__
for package in (linattn.backends, linattn.reference):
    assert package.__file__.startswith(sys.argv[1]), package.__file__
for name in ("backends", "reference", "tests"):
    assert importlib.util.find_spec(name) is None, f"{name} is importable at the top level"
ours = [module.__file__ for name, module in sys.modules.items() if name.split(".")[0] == "linattn"]
assert len(ours) == len(set(ours)), sorted(ours)
heavy = {"torch", "triton", "cupy", "typer", "rich", "hypothesis", "matplotlib"} & set(sys.modules)
assert not heavy, f"import linattn brings {heavy}"
one = np.ones((1, 3, 1, 1))
o = linattn.attention(one, one, one)
assert (o == linattn.reference.attention(one, one, one)[0]).all()
print(linattn.__version__, o.ravel().tolist())
"""


def python(executable: Path | str, *arguments: object, cwd: Path) -> str:
    """Run a Python with nothing of this process's paths; return what it prints, or fail with it."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [executable, *map(str, arguments)], cwd=cwd, env=clean, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A copy of the tree, its wheel, its sdist, the sdist unpacked and the wheel built from that."""
    folder = tmp_path_factory.mktemp("built")
    shutil.copytree(ROOT, folder / "tree", symlinks=True, ignore=OUTSIDE)
    build = ("-m", "build", "--no-isolation", "--outdir")
    python(sys.executable, *build, folder / "wheel", "--wheel", folder / "tree", cwd=folder)
    python(sys.executable, *build, folder / "sdist", "--sdist", folder / "tree", cwd=folder)
    (archive,) = (folder / "sdist").iterdir()
    python(sys.executable, "-m", "tarfile", "-e", archive, folder / "unpacked", cwd=folder)
    (source,) = (folder / "unpacked").iterdir()
    shutil.copytree(source, folder / "source")  # the build below leaves its own files in the other copy
    python(sys.executable, *build, folder / "again", "--wheel", source, cwd=folder)
    return folder


def closure(requirements: list[str]) -> set[str]:
    """Names of the installed distributions that these requirements need, and theirs."""
    names: set[str] = set()
    waiting = [Requirement(line) for line in requirements]
    while waiting:
        requirement = waiting.pop()
        if requirement.name in names or (
            requirement.marker and not requirement.marker.evaluate({"extra": ""})
        ):
            continue
        names.add(requirement.name)
        waiting += [Requirement(line) for line in distribution(requirement.name).requires or []]
    return names


def environment(folder: Path, requirements: list[str]) -> Path:
    """Make a virtual environment of exactly these requirements, linked from the present one: no network."""
    venv.create(folder, with_pip=False, symlinks=True)
    (packages,) = (folder / "lib").glob("python*/site-packages")
    for name in closure(requirements):
        for path in {file.parts[0] for file in distribution(name).files or [] if file.parts[0] != ".."}:
            target = Path(str(distribution(name).locate_file(path)))
            if target.exists() and path != "__pycache__":
                (packages / path).symlink_to(target)
    return packages


def install(wheel: Path, packages: Path) -> None:
    """Install a wheel with the outer pip: the inner environment has none."""
    inner = packages.parent.parent.parent / "bin" / "python"
    pip = ("-m", "pip", "--python", inner, "install", "--no-deps", "--no-index", "--quiet", wheel)
    python(sys.executable, *pip, cwd=packages)


@pytest.mark.parametrize("kind", ["wheel", "again", "source"])
def test_it_imports_with_numpy_alone(built, tmp_path, kind):
    packages = environment(tmp_path / "env", ["numpy"])
    inner = tmp_path / "env" / "bin" / "python"
    home = packages
    if kind == "source":  # the unpacked sdist as it is: linattn alone on the path, nothing installed
        home = tmp_path / "path"
        home.mkdir()
        (home / "linattn").symlink_to(built / "source" / "linattn")
        (packages / "source.pth").write_text(f"{home}\n")
    else:
        (wheel,) = (built / kind).iterdir()
        install(wheel, packages)
    version, numbers = python(inner, "-c", IMPORTS, home, cwd=tmp_path).split(maxsplit=1)
    assert numbers.strip() == "[1.0, 2.0, 3.0]"
    assert version in next((built / "wheel").iterdir()).name


def test_the_command_runs_with_the_declared_dependencies(built, tmp_path):
    (wheel,) = (built / "again").iterdir()
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = archive.read(metadata).decode().splitlines()
    declared = [line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")]
    needed = [line for line in declared if "extra ==" not in line]
    assert {Requirement(line).name for line in needed} == {"numpy", "typer", "rich"}
    packages = environment(tmp_path / "env", needed)
    install(wheel, packages)
    command = tmp_path / "env" / "bin" / "linattn"
    inner = tmp_path / "env" / "bin" / "python"
    assert "numpy" in python(inner, command, "backends", cwd=tmp_path)
    assert "verify" in python(inner, "-m", "linattn", "--help", cwd=tmp_path)


def test_both_wheels_hold_the_same_files_once(built):
    def content(kind: str) -> dict[str, int]:
        (wheel,) = (built / kind).iterdir()
        with zipfile.ZipFile(wheel) as archive:
            names = archive.namelist()
            assert len(names) == len(set(names))
            return {name: archive.getinfo(name).CRC for name in names if ".dist-info/" not in name}

    first = content("wheel")
    assert first == content("again")
    assert {name.partition("/")[0] for name in first} == {"linattn"}
    sources = {
        str(path.relative_to(built / "tree"))
        for folder in ("linattn", "linattn/backends", "linattn/reference")
        for path in (built / "tree" / folder).rglob("*")
        if path.suffix in {".py", ".cu", ".cuh", ".typed"}
    }
    assert set(first) == sources


def test_the_sdist_holds_what_testing_it_needs(built):
    folders = [
        path for name in ("tests", "docs") for path in (built / "tree" / name).rglob("*") if path.is_file()
    ]
    wanted = {str(path.relative_to(built / "tree")) for path in folders}
    wanted |= {"Makefile", "LICENSE", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", ".ci/run"}
    missing = {leaf for leaf in wanted if not (built / "source" / leaf).is_file()}
    assert not missing
    assert (built / "source" / ".ci" / "run").stat().st_mode & 0o100


def test_an_installed_entry_point_is_a_backend_by_name(built, tmp_path):
    packages = environment(tmp_path / "env", ["numpy"])
    (wheel,) = (built / "wheel").iterdir()
    install(wheel, packages)
    page = (ROOT / "docs" / "add-a-backend.md").read_text()
    (packages / "tiny.py").write_text(page.partition("```python\n")[2].partition("```")[0])
    facts = packages / "tiny-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text("[linattn.backends]\ntiny = tiny:backend\n")
    code = """
import linattn, numpy as np
assert linattn.available_backends()["tiny"] is None
x = np.ones((1, 3, 1, 1))
with linattn.use_backend("tiny"):
    print(linattn.attention(x, x, x).ravel().tolist())
print(linattn.explain(x, x, x, feature_map="relu", backend=["tiny", "numpy"]))
"""
    shown = python(tmp_path / "env" / "bin" / "python", "-c", code, cwd=tmp_path)
    numbers, _, *reasons = shown.splitlines()
    assert numbers == "[1.0, 2.0, 3.0]"
    assert [reason.split(maxsplit=1) for reason in reasons] == [
        ["tiny", "tiny has no feature_map"],
        ["numpy", "runs"],
    ]
