"""Values that cannot be meant: one sentence that says what is wrong and what there is, before any work."""

import re
import sys

import pytest
from typer.testing import CliRunner

from linattn import cli, testing
from linattn.cli.names import LARGEST_SEED
from linattn.errors import OptionError
from linattn.testing.variants import AXES

MODULES = {
    "fine": "number = 3\ndef kernel(q, k, v):\n    return v\n",
    "lazy": "class A:\n    @property\n    def one(self):\n        raise ValueError('early')\nmade = A()\n",
    "raises": "def half(x):\n    return 1 / x\nhalf(0)\n",
    "says_nothing": "raise RuntimeError\n",
    "unfinished": "def kernel(:\n",
    "needs_more": "import nobody_has_this\n",
    "ends": "import sys\nsys.exit(3)\n",
}
REPR = re.compile(
    r"\(?'\w+',|\{'|<\w+ object|Traceback|\n.*\n", re.S
)  # a tuple, a dict, an object, two lines


def invoke(*arguments: object):
    return CliRunner().invoke(cli.app, list(map(str, arguments)))


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A folder of modules, in which the command is called."""
    for name, text in MODULES.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in MODULES:
        sys.modules.pop(name, None)


def refused(*arguments: object) -> str:
    """The sentence of a refusal, which is all that is printed."""
    result = invoke(*arguments)
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    assert result.stderr.startswith("error: ")
    sentence = result.stderr.removeprefix("error: ").removesuffix("\n")
    assert not REPR.search(sentence), sentence
    return sentence


@pytest.mark.parametrize(
    ("kernel", "sentence"),
    [
        ("lazy:made.one", "lazy:made.one raises ValueError: early (lazy.py, line 4)"),
        ("lazy:made.two", "lazy has no 'made.two'"),
        ("fine:number", "fine:number is neither a linattn.testing.Kernel nor callable"),
        ("raises:x", "raises cannot be imported: ZeroDivisionError: division by zero (raises.py, line 2)"),
        ("says_nothing:x", "says_nothing cannot be imported: RuntimeError (says_nothing.py, line 1)"),
        (
            "unfinished:x",
            "unfinished cannot be imported: SyntaxError: invalid syntax (unfinished.py, line 1)",
        ),
        (
            "needs_more:x",
            "needs_more cannot be imported: ModuleNotFoundError: No module named 'nobody_has_this' "
            "(needs_more.py, line 1)",
        ),
        ("ends:x", "ends cannot be imported: SystemExit: 3 (ends.py, line 2)"),
        ("nobody.kernels:x", "no module named 'nobody.kernels' here or among what is installed"),
        ("fine.kernels:x", "no module named 'fine.kernels' here or among what is installed"),
    ],
)
def test_a_kernel_that_cannot_be_loaded_is_said_with_its_place(kernel, sentence):
    assert refused("verify", "--kernel", kernel) == f"--kernel: {sentence}"


@pytest.mark.parametrize("kernel", ["fine", "fine:", ":kernel", "..fine:kernel", "fine.:kernel", "a b:c"])
def test_what_names_no_object_is_refused(kernel):
    assert refused("verify", "--kernel", kernel) == f"--kernel must be package.module:object, got {kernel!r}"


def test_debug_shows_where_a_kernel_s_module_raised():
    error = invoke("verify", "--kernel", "raises:x", "--debug").exception
    assert isinstance(error, OptionError)
    assert isinstance(error.__cause__, ZeroDivisionError)


def test_options_that_a_kernel_does_not_compute_are_named():
    said = refused("verify", "--kernel", "fine:kernel", "--variant", "cosformer", "--dtype", "f16")
    assert said.startswith("fine:kernel offers nothing of variant cosformer and float16: ")
    assert said.split(": ", 1)[1].split("; ") == [
        "it has causal on, not off",
        "it has reweight none, not cosine",
        "it has feature_map none, not relu",
        "it has normalize off, not on",
        "it has dtype float32, not float16",
    ]
    said = refused("verify", "--backend", "numpy", "--dtype", "bf16")
    assert said.endswith(": it has dtype float32 or float64 or float16, not bfloat16")


def test_a_dtype_that_does_not_exist_is_refused_with_those_that_do():
    with pytest.raises(OptionError) as caught:
        testing.check_backend("numpy", dtype="float8")
    assert str(caught.value) == f"no dtype named 'float8'; known: {', '.join(AXES['dtype'])}"


def test_options_that_exist_but_never_together_are_said_to():
    both = testing.Kernel(len, options={"normalize": True, "dtype": "float16"})  # may divide by nearly 0
    with pytest.raises(OptionError, match="offers nothing of float16: it has each of these options, but no"):
        testing.check_kernel(both, dtype="float16")


def test_a_report_says_why_a_property_is_not_offered():
    report = testing.check_backend("numpy", only=["merges_into_the_whole"], quick=True, dtype="float64")
    assert str(report).endswith("pass")
    kernel = testing.Kernel(lambda q, k, v: v, name="kernel")
    report = testing.check_kernel(kernel, only=["merges_into_the_whole"], quick=True)
    assert str(report).endswith("not offered: it offers no state")


def test_a_device_that_holds_no_arrays_here_is_refused_before_any_check(monkeypatch):
    import torch

    def empty(*sizes, device):
        raise NotImplementedError("It is not linked. Long advice follows.\nAnd more.")

    monkeypatch.setattr(torch, "empty", empty)
    said = refused("verify", "--backend", "torch", "--device", "mps")
    assert said == "--device mps cannot be used here: It is not linked"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("explain", "--max-len", 3), "--max-len is of cosine reweighting: give --reweight cosine"),
        (
            ("explain", "--max-len", 3, "--reweight", "cosine", "--shape", "1,4,1,1"),
            "--max-len 3 is shorter than the call's 4 positions",
        ),
        (("bench", "--gpu", "--cpu"), "give --cpu or --gpu, not both"),
        (("bench", "--gpu", "--models", "--quick"), "give --gpu or --models, not both"),
        (("bench", "--gpu", "--models", "--cpu"), "give --cpu or --gpu or --models, not all"),
        (
            ("bench", "--models", "--quick", "--case", "softmax"),
            "--case of --models is one of training, decoding, generating, layer, attention, norm; got "
            "softmax",
        ),
        (
            ("bench", "--models", "--quick", "--case", "norm", "--out", "x.png"),
            "the picture of --models shows training: add --case training, or leave it out",
        ),
        (("demo", "--seconds", "inf"), "--seconds must be a number above 0, got inf"),
        (("demo", "--seconds", "nan"), "--seconds must be a number above 0, got nan"),
    ],
)
def test_options_that_do_not_go_together_are_refused(arguments, sentence):
    assert refused(*arguments) == sentence


@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_tune_refuses_a_place_that_it_cannot_write_to(here, dry):
    from linattn.backends.triton import tuned

    assert refused("tune", "--out", here, *dry).startswith(f"cannot read {here}: ")
    below = here / "fine.py" / "deeper" / "tuned.json"
    assert (
        refused("tune", "--out", below, *dry) == f"{below} cannot be written: {here / 'fine.py'} is no folder"
    )
    new = here / "new" / "tuned.json"
    assert invoke("tune", "--out", new, "--dry-run").exit_code == 0
    assert not new.parent.exists()
    gpu = tuned.key("NVIDIA H100", (9, 0), "3.6.0")
    tuned.save(here / "mine.json", gpu, {})
    assert invoke("tune", "--out", here / "mine.json", "--dry-run").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "known"),
    [
        (("verify", "--dtype", "nope"), "'float64', 'float32', 'float16', 'bfloat16', 'f64'"),
        (("explain", "--value-dim", -3), "greater than or equal to 0"),
        (("explain", "--not-causal", "--keys", -3), "greater than or equal to 0"),
        (("explain", "--max-len", 0, "--reweight", "cosine"), "greater than or equal to 1"),
        (("demo", "--seed", -1), "greater than or equal to 0"),
        (("demo", "--seed", LARGEST_SEED + 1), f"less than or equal to {LARGEST_SEED}"),
        (("generate", "--checkpoint", "x", "--seed", LARGEST_SEED + 1), f"or equal to {LARGEST_SEED}"),
    ],
)
def test_a_value_outside_its_domain_is_refused_with_the_domain(arguments, known):
    result = invoke(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Error: Invalid value for '--" in result.stderr
    assert known in result.stderr
    assert "Traceback" not in result.stderr


def test_the_largest_seed_is_taken_by_torch():
    import torch

    torch.Generator().manual_seed(LARGEST_SEED)
    with pytest.raises((ValueError, RuntimeError)):
        torch.Generator().manual_seed(2 * LARGEST_SEED + 2)
