"""The tree keeps its own rules: what can be read off the sources, is."""

import ast
import re
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import linattn

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = ("linattn", "backends", "reference", "tests", "docs", ".ci")


def files(*patterns: str, folders: tuple[str, ...] = FOLDERS) -> list[Path]:
    """Every file under the folders, each once: a symlinked folder is its target's business."""
    found = {
        path.resolve()
        for folder in folders
        for pattern in patterns
        for path in (ROOT / folder).rglob(pattern)
        if path.is_file() and "_build" not in path.parts and "__pycache__" not in path.parts
    }
    return sorted(found)


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


LIBRARY = files("*.py", folders=("linattn", "backends", "reference"))
SOURCES = files("*.py")
TEXTS = [path for path in files("*") if path.suffix not in {".png", ".safetensors"}]
TEXTS += [
    ROOT / leaf for leaf in ("Makefile", "pyproject.toml", "README.md", "CHANGELOG.md", "CONTRIBUTING.md")
]
NOTES = (
    r"(?<![\w.$)])/(home|root|work|Users)/",  # somebody's machine
    r"\b(TO[D]O|FIX[M]E|X{3})\b",
    r"pypi\.org|pythonhosted|whl/cpu",  # where packages come from is pip's configuration
)


@pytest.mark.parametrize("path", files("*.py", "*.cu", "*.cuh"), ids=name)
def test_a_file_fits_the_head(path):
    assert len(path.read_text().splitlines()) <= 400


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_a_module_says_what_it_is(path):
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert docstring, "the first line of a module is its docstring"


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_only_expected_errors_are_caught(path):
    caught = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ExceptHandler)]
    for handler in caught:
        kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
        names = [ast.unparse(kind) if kind else "everything" for kind in kinds]
        assert not {"everything", "Exception", "BaseException"} & set(names), f"line {handler.lineno}"


@pytest.mark.parametrize("path", LIBRARY, ids=name)
def test_no_environment_variable_is_read(path):
    for node in ast.walk(ast.parse(path.read_text())):
        word = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
        assert word not in {"environ", "getenv"}, f"line {node.lineno}: options are arguments"


@pytest.mark.parametrize("path", [path for path in SOURCES if path.name != "tolerance.py"], ids=name)
def test_no_tolerance_is_written_by_hand(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.keyword) and node.arg in {"atol", "rtol"}:
            literal = isinstance(node.value, ast.Constant) and node.value.value != 0
            assert not literal, f"line {node.value.lineno}: linattn.tolerance has the bound"


@pytest.mark.parametrize("path", [path for path in TEXTS if path != Path(__file__).resolve()], ids=name)
def test_text_names_no_machine_and_leaves_no_notes(path):
    for number, line in enumerate(path.read_text().splitlines(), 1):
        for pattern in NOTES:
            assert re.search(pattern, line) is None, f"line {number}: {line}"


def test_the_symlinks_are_relative():
    for folder in ("backends", "reference"):
        link = ROOT / "linattn" / folder
        if not link.is_symlink():
            pytest.skip("unpacked from an sdist, which carries the folders themselves")
        assert link.readlink() == Path("..", folder)


def imported(path: Path) -> set[str]:
    """The absolute names a module imports at run time; what stands under TYPE_CHECKING is left out."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(node)
        for test in ast.walk(tree)
        if isinstance(test, ast.If) and ast.unparse(test.test).endswith("TYPE_CHECKING")
        for statement in test.body
        for node in ast.walk(statement)
    }
    package = [*path.relative_to(ROOT).parts[:-1]]
    package = package if package[0] == "linattn" else ["linattn", *package]
    names = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            names |= {f"{origin}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", files("*.py", folders=("linattn/reference",)), ids=name)
def test_the_reference_knows_numpy_and_itself(path):
    for module in imported(path):
        allowed = module.partition(".")[0] in {"numpy", *sys.stdlib_module_names}
        assert allowed or module.startswith("linattn.reference."), f"the reference imports {module}"


@pytest.mark.parametrize("path", files("*.py", folders=("linattn/backends",)), ids=name)
def test_no_backend_imports_another(path):
    folder = (ROOT / "linattn" / "backends").resolve()
    own = path.relative_to(folder).parts[0].removesuffix(".py")
    others = {entry.name.removesuffix(".py") for entry in folder.iterdir()} - {
        own,
        "blockwise",
    }  # shared by design
    for module in imported(path):
        if module.startswith("linattn.backends."):
            assert module.split(".")[2] not in others, f"{own} imports {module}"


def test_the_version_stands_in_one_place():
    assert PYPROJECT["project"]["dynamic"] == ["version"]
    assert PYPROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "linattn.__version__"}
    places = [name(path) for path in SOURCES if re.search(r"^__version__\b", path.read_text(), re.M)]
    assert places == ["linattn/__init__.py"]
    assert f"## {linattn.__version__}" in (ROOT / "CHANGELOG.md").read_text()


DEV = [Requirement(line) for line in PYPROJECT["project"]["optional-dependencies"]["dev"]]
DEV = [pin for pin in DEV if pin.marker is None or pin.marker.evaluate()]


@pytest.mark.parametrize("pin", DEV, ids=lambda pin: pin.name)
def test_what_is_installed_is_what_is_pinned(pin):
    (specifier,) = pin.specifier
    assert specifier.operator == "=="
    assert Version(version(pin.name)).public == specifier.version, "pyproject.toml changed: run `make format`"


def test_the_oldest_torch_has_what_is_used():
    (needed,) = PYPROJECT["project"]["optional-dependencies"]["torch"]
    (floor,) = (part.version for part in Requirement(needed).specifier)
    assert Version(floor) >= Version("2.9")  # torch.backends.mkldnn.matmul.fp32_precision
    assert f"torch {floor} or later" in (ROOT / "README.md").read_text()


def test_pins_stand_in_pyproject_only():
    for path in (ROOT / "Makefile", ROOT / ".pre-commit-config.yaml", ROOT / ".ci" / "run"):
        assert "==" not in path.read_text(), f"{path.name} names a version of its own"
    entries = re.findall(r"entry: (\S+)", (ROOT / ".pre-commit-config.yaml").read_text())
    assert entries
    assert all(entry.startswith(".venv/bin/") for entry in entries), "a hook must run the pinned tool"


def test_the_contributing_guide_is_short():
    assert len((ROOT / "CONTRIBUTING.md").read_text().splitlines()) <= 60
