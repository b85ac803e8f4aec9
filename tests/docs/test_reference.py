"""The reference lists every public name once, and each says what a user needs: shapes, errors, sources."""

import ast
import doctest
import importlib
import inspect
import re
import textwrap
from collections import Counter
from pathlib import Path

import pytest

from docs._ext.entries import alias, bindings, home, is_module, own_members, signature
from docs._ext.links import BLOCK
from linattn import errors
from linattn.backends import Backend, Decoding, Differentiable, Keeping, Pooling
from linattn.testing import Subject

ROOT = Path(__file__).parent.parent.parent
PAGES = ROOT / "docs" / "reference"
TEXTS = [page for page in sorted((ROOT / "docs").rglob("*.md")) if "_build" not in page.parts]
TEXTS += [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
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
# Whoever computes says where the formula is from. These modules and names compute none of their own:
NO_FORMULAS = {
    "linattn.backends",  # what a backend is; and backends, which are proven equal to `linattn.attention`
    "linattn.backends.triton",
    "linattn.backends.triton.plan",  # sizes of launches
    "linattn.backends.triton.tuned",
    "linattn.errors",
    "linattn.problem",
    "linattn.registry",
    "linattn.testing",  # compares; docs/tolerances.md derives what it allows
    "linattn.vjp",  # how `explain` answers
}
NO_FORMULA = {
    # which backend, and where
    "linattn.available_backends",
    "linattn.environment",
    "linattn.explain",
    "linattn.use_backend",
    # keeps what models and layers return, or puts another method in its place
    "linattn.integrations.transformers.Patch",
    "linattn.models.cosformer.CosformerCache",
    "linattn.models.cosformer.CosformerPreTrainedModel",
    "linattn.models.transnormer.TransNormerCache",
    "linattn.models.transnormer.TransNormerPreTrainedModel",
    # keywords
    "linattn.reference.heads.Options",
    # a training loop, its data, and counts of bits
    "linattn.train.Progress",
    "linattn.train.Settings",
    "linattn.train.Text",
    "linattn.train.Trainer",
    "linattn.train.Windows",
    "linattn.train.bits_per_byte",
    "linattn.train.compressed_bits_per_byte",
    "linattn.train.generate",
    "linattn.train.load_model",
    "linattn.train.read_text",
}
# what takes arrays of any shape
ANY_SHAPE = {"assert_finite", "assert_same", "assert_within", "zeros"}
API = re.compile(r"^```\{api\} (\S+)\n(.*?)^```", re.M | re.S)
PROGRAM = re.compile(r"^(from|import) .*\blinattn\b.*\n", re.M)  # in a string
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
LISTED = [
    (module, line.partition(":")[0])
    for page in sorted(PAGES.glob("*.md"))
    for module, lines in API.findall(page.read_text())
    for line in lines.splitlines()
]
HOMES = {home(*listed) for listed in LISTED}
CALLABLES = [
    pytest.param(value, f"{module}.{name}", id=f"{module}.{name}")
    for module, name in LISTED
    if alias(module, name) is None and callable(value := getattr(importlib.import_module(module), name))
]
PROTOCOLS = (Subject, Backend, Differentiable, Keeping, Decoding, Pooling)
# and the methods that a class of linattn defines itself: transformers has its own words for what it calls
METHODS = [
    pytest.param(inspect.unwrap(getattr(value, "__func__", value)), id=f"{one.id}.{name}")
    for one in CALLABLES
    if inspect.isclass(one.values[0]) and not one.id.startswith("linattn.models.")
    for name, value in vars(one.values[0]).items()
    if not name.startswith("_") and inspect.isfunction(getattr(value, "__func__", value))
    if not any(name in vars(protocol) for protocol in PROTOCOLS)  # said there, once, for all of them
    or one.values[0] in PROTOCOLS
]


def test_every_public_name_is_listed_once():
    assert max(Counter(LISTED).values()) == 1
    assert set(NAMES) <= set(LISTED)
    assert not {(module, name) for module, name in LISTED if module in MODULES} - set(NAMES), "not public"


def annotated(module: str, name: str) -> set[tuple[str, str]]:
    """Where the names in the signatures of a function, or of a class and its methods, are defined."""
    thing = getattr(importlib.import_module(module), name)
    texts = [(thing, signature(thing))]
    if inspect.isclass(thing):
        texts += [
            (method, signature(method)) for kind, _, method in own_members(thing) if kind == "py:method"
        ]
    return {
        home(module, word)
        for owner, text in texts
        if (module := inspect.unwrap(owner).__module__).startswith("linattn")
        for word in re.findall(r"(?<![\w.])[A-Z]\w*", re.sub(r"'[^']*'", "", text))
        if word in bindings(module)
    }


def is_listed(module: str, name: str) -> bool:
    """Whether an API page has what a name stands for; an abbreviation may be written down in many modules."""
    same = {(alias(*each), each[1]) for each in LISTED}
    meant = alias(*home(module, name))
    return home(module, name) in HOMES or (meant is not None and (meant, name) in same)


def test_what_stands_in_a_signature_is_listed():
    found = {each for one in CALLABLES for each in annotated(*one.values[1].rsplit(".", 1))}
    missing = {each for each in found if each[0].startswith("linattn.") and not is_listed(*each)}
    assert not missing, "signatures name what no API page explains"


def used(source: str, scope: dict[str, str]) -> set[tuple[str, str]]:
    """The names of linattn that code imports or reaches, by module; `scope` has its modules by their names.

    Strings that are programs themselves count.
    """
    found, tree = set(), ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for one in node.names:
                if one.name.split(".")[0] == "linattn":
                    scope[one.asname or "linattn"] = one.name if one.asname else "linattn"
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "linattn":
            for one in node.names:
                if is_module(inner := f"{node.module}.{one.name}"):
                    scope[one.asname or one.name] = inner
                else:
                    found.add((str(node.module), one.name))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and re.fullmatch(r"[\w.]+", path := ast.unparse(node)):
            found |= reached(path, scope)
        elif isinstance(node, ast.Constant) and PROGRAM.search(str(node.value)):
            found |= used(node.value, {})
    return found


def reached(path: str, scope: dict[str, str]) -> set[tuple[str, str]]:
    """The first name in `linattn.a.b` that is no module, with the module that has it; none if all are."""
    first, *rest = path.split(".")
    module = scope.get(first)
    for name in rest:
        if module is None or name.startswith("_"):
            break
        inner, leaf = home(module, name) if name in bindings(module) else (f"{module}.{name}", "")
        if leaf or not is_module(inner):
            return {(module, name)}
        module = inner
    return set()


def named(text: str) -> set[tuple[str, str]]:
    """The names of linattn in a page's code, and in its sentences by their path, as `linattn.decay.fla`."""
    scope, found = {"linattn": "linattn"}, set()
    for kind, code in BLOCK.findall(text):
        if kind != "sh":
            shell = code.lstrip().startswith(">>>")
            examples = doctest.DocTestParser().get_examples(code) if shell else []
            found |= used("".join(one.source for one in examples) if shell else code, scope)
    for path in re.findall(r"(?<!`)`([A-Za-z_]\w*(?:\.\w+)+)[^`]*`", text):
        found |= reached(path, scope)
    return found


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.name)
def test_what_a_page_names_is_listed(page):
    missing = {each for each in named(page.read_text()) if not is_listed(*each)}
    assert not missing, "no API page explains them"


def test_names_are_found():
    page = """
`linattn.decay.fla(8)`, `tuned.load("x")`, `linattn.tolerance`, `linattn.__version__`, `np.load`
```python
from linattn.backends.triton import tuned
import linattn.models.cosformer as cosformer
cosformer.CosformerModel
program = '''
from linattn import registry, State as S
registry.known()
'''
```
```python
>>> from linattn.train import read_text  # as people
>>> linattn.State.zeros(0)
1
```
"""
    assert named(page) == {
        ("linattn.decay", "fla"),
        ("linattn.backends.triton.tuned", "load"),
        ("linattn.models.cosformer", "CosformerModel"),
        ("linattn.registry", "known"),
        ("linattn", "State"),
        ("linattn.train", "read_text"),
    }
    assert home("linattn", "State") == home("linattn.backends", "State") == ("linattn.state", "State")
    assert home("linattn", "decay") == ("linattn.decay", "")
    assert annotated("linattn.backends", "Differentiable") >= {("linattn.problem", "Problem")}


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
    if inspect.isclass(thing) and (
        getattr(thing, "_is_protocol", False) or issubclass(thing, Exception | dict)
    ):
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
    says = re.search(r"^(?:.*\. )?Sources?: ", inspect.getdoc(thing), re.M) is not None
    silent = name in NO_FORMULA or name.rpartition(".")[0] in NO_FORMULAS
    assert says or silent, "it does not say where its formula is from"
    assert not (says and name in NO_FORMULA), "it says so, and need not be left out here"


def test_what_has_no_formula_exists():
    names = {one.id for one in CALLABLES}
    assert names >= NO_FORMULA
    assert {name.rpartition(".")[0] for name in names} >= NO_FORMULAS


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
