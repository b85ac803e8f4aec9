"""The reference lists every public name once, and each says what a user needs: shapes, errors, sources."""

import ast
import importlib
import inspect
import re
import textwrap
from collections import Counter
from pathlib import Path

import pytest

from linattn import errors
from linattn.testing import Subject

PAGES = Path(__file__).parent.parent.parent / "docs" / "reference"
MODULES = (
    "linattn",
    "linattn.backends",
    "linattn.decay",
    "linattn.errors",
    "linattn.integrations.transformers",
    "linattn.models",
    "linattn.models.cosformer",
    "linattn.models.transnormer",
    "linattn.nn",
    "linattn.reference",
    "linattn.testing",
    "linattn.train",
)
# names that compute something published
FORMULAS = {
    "linattn.attention",
    "linattn.cosformer_attention",
    "linattn.decode_step",
    "linattn.lightning_attention",
}
FORMULAS |= {"linattn.Cosine", "linattn.LRPE"}
ALL_FORMULAS = ("linattn.decay.", "linattn.reference.")
# what takes arrays of any shape
ANY_SHAPE = {"assert_finite", "assert_same", "assert_within", "zeros"}
API = re.compile(r"^```\{api\} (\S+)\n(.*?)^```", re.M | re.S)
SHAPE = re.compile(r"\[[A-Z0-9][\w+ *]*(?:, [\w.+ *]+)*\]")


def public(module: str) -> list[str]:
    found = importlib.import_module(module)
    listed = getattr(found, "__all__", None)
    if listed is not None:
        return list(listed)
    return [
        name
        for name, value in vars(found).items()
        if not name.startswith("_")
        and (getattr(value, "__module__", None) == module or (name.isupper() and isinstance(value, tuple)))
    ]


NAMES = [(module, name) for module in MODULES for name in public(module)]
CALLABLES = [
    pytest.param(getattr(importlib.import_module(module), name), f"{module}.{name}", id=f"{module}.{name}")
    for module, name in NAMES
    if callable(getattr(importlib.import_module(module), name))
]
# and the methods that a class of linattn defines itself: transformers has its own words for what it calls
METHODS = [
    pytest.param(inspect.unwrap(getattr(value, "__func__", value)), id=f"{one.id}.{name}")
    for one in CALLABLES
    if inspect.isclass(one.values[0]) and not one.id.startswith("linattn.models.")
    for name, value in vars(one.values[0]).items()
    if not name.startswith("_") and inspect.isfunction(getattr(value, "__func__", value))
    if name not in vars(Subject)  # said there, once, for all subjects
]


def test_every_public_name_is_listed_once():
    listed = [
        (module, line.partition(":")[0])
        for page in PAGES.glob("*.md")
        for module, lines in API.findall(page.read_text())
        for line in lines.splitlines()
    ]
    assert Counter(listed) == Counter(NAMES)


def raised(thing: object) -> set[str]:
    """The errors of linattn that a function, or a class when it is made, raises in its own lines."""
    if inspect.isclass(thing):
        makers = [vars(thing).get(name) for name in ("__init__", "__post_init__")]
        return set().union(*(raised(maker) for maker in makers if inspect.isfunction(maker)))
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(thing)))
    except OSError:  # a dataclass's own __init__ has no source
        return set()
    nodes = [node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise) and node.exc is not None]
    names = {ast.unparse(node.func if isinstance(node, ast.Call) else node) for node in nodes}
    return {leaf for name in names if hasattr(errors, leaf := name.rpartition(".")[2])}


def shapeless(thing: object) -> list[str]:
    """The array arguments whose annotation gives no axes."""
    if inspect.isclass(thing) and (getattr(thing, "_is_protocol", False) or issubclass(thing, Exception)):
        return []
    notes = {name: str(p.annotation) for name, p in inspect.signature(thing).parameters.items()}
    if thing.__name__ in ANY_SHAPE:
        return []
    return [
        name
        for name, note in notes.items()
        if re.search(r"\b(Array|Tensor|ndarray)\b", note) and not re.search(r"\[[^]]*['\"]", note)
    ]


def check(thing: object) -> None:
    text = inspect.getdoc(thing) or ""
    assert text, "it has no docstring"
    assert not shapeless(thing) or SHAPE.search(text) or "hape" in text, f"{shapeless(thing)} have no shape"
    missing = raised(thing)
    if missing and "errors are `" not in text and "class of `linattn.errors`" not in text:
        missing = {name for name in missing if name not in text}
        assert not missing, f"its docstring does not say that it raises {missing}"


@pytest.mark.parametrize(("thing", "name"), CALLABLES)
def test_a_name_says_its_shapes_and_errors_and_its_source(thing, name):
    check(thing)
    layer = name.startswith("linattn.nn.") and inspect.isclass(thing)
    if layer or name.startswith(ALL_FORMULAS) or name in FORMULAS:
        assert re.search(r"\bSources?: ", inspect.getdoc(thing)), "it does not say where its formula is from"


@pytest.mark.parametrize("thing", METHODS)
def test_a_method_says_its_shapes_and_errors(thing):
    check(thing)


def test_the_check_finds_what_is_missing():
    def bare(x: "Array"):  # noqa: F821
        pass

    def silent(x: "Array"):  # noqa: F821
        """Do something with x [N]."""
        raise errors.ShapeError("x")

    def good(x: "Float[Array, ' n']"):  # noqa: F821
        """Do something. Raises ShapeError."""
        raise ShapeError("x")

    ShapeError = errors.ShapeError
    check(good)
    assert shapeless(bare) == ["x"]
    assert raised(good) == {"ShapeError"}
    for wrong in (bare, silent):
        with pytest.raises(AssertionError):
            check(wrong)
