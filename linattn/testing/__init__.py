"""The conformance suite, for anyone's kernel. `linattn verify` is its command."""

from linattn.testing import properties
from linattn.testing.case import RATES, Case, Inputs
from linattn.testing.check import Finding, Report, check_backend, check_kernel
from linattn.testing.compare import Mismatch, NotOffered, assert_finite, assert_same, assert_within
from linattn.testing.kernel import Kernel
from linattn.testing.properties import PROPERTIES, Property
from linattn.testing.strategies import cases, inputs
from linattn.testing.subject import BackendSubject, Result, Subject, subject
from linattn.testing.variants import AXES, VARIANTS, combinations

__all__ = [
    "AXES",
    "PROPERTIES",
    "RATES",
    "VARIANTS",
    "BackendSubject",
    "Case",
    "Finding",
    "Inputs",
    "Kernel",
    "Mismatch",
    "NotOffered",
    "Property",
    "Report",
    "Result",
    "Subject",
    "assert_finite",
    "assert_same",
    "assert_within",
    "cases",
    "check_backend",
    "check_kernel",
    "combinations",
    "inputs",
    "properties",
    "subject",
]
