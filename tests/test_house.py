"""Laws of the repository's own files: what is said twice is the same, and lists name what is there."""

import re

from helpers import ROOT
from slow_tests import SLOW
from yaml import safe_load

from modeling_gemma_encoder import __version__


def test_a_version_is_that_of_the_package_wherever_it_stands():
    assert safe_load((ROOT / "CITATION.cff").read_text())["version"] == __version__
    first = re.search(r"^## \[(.*)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert first[1] in (__version__, "Unreleased")


def test_the_linter_of_a_commit_is_that_of_the_tests():
    (hooks,) = safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert f"ruff=={hooks['rev'].removeprefix('v')}\n" in (ROOT / "constraints.txt").read_text()


def test_every_slow_test_that_is_listed_is_there():
    for name in SLOW:
        path, _, test = name.partition("::")
        assert (ROOT / "tests" / path).exists(), name
        assert not test or f"def {test}(" in (ROOT / "tests" / path).read_text(), name
