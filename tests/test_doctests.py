"""The examples in docstrings of public names run, and print what they say."""

from __future__ import annotations

import doctest

import pytest
import torch
from torch import nn

import torchreach as tr

# Names without which the project has no tour.
NEEDED = {
    *("reach", "discrepancy", "equivalent", "repair", "merge"),
    *("quantize_weights", "load_int8", "weight_only", "StarBatch.from_box"),
}


def examples() -> dict[str, doctest.DocTest]:
    """Docstrings with examples of all public names and their methods, by name."""
    finder = doctest.DocTestFinder(exclude_empty=True)
    names = {**{name: getattr(tr, name) for name in tr.__all__}, "torch": torch, "nn": nn, "tr": tr}
    found = [test for name in tr.__all__ for test in finder.find(names[name], name, globs=names)]
    return {test.name: test for test in found if test.examples}


EXAMPLES = examples()


def test_the_verbs_have_examples() -> None:
    assert set(EXAMPLES) >= NEEDED


@pytest.mark.filterwarnings("ignore")  # torch announces the end of its eager-mode quantisation
@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_print_what_they_say(name: str) -> None:
    report: list[str] = []
    torch.manual_seed(0)
    ran = doctest.DocTestRunner().run(EXAMPLES[name], out=report.append)
    assert ran.attempted
    assert not ran.failed, "".join(report)


def test_an_example_that_lies_is_seen() -> None:
    test = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, None)
    assert doctest.DocTestRunner().run(test, out=lambda _: None).failed == 1
