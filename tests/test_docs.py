"""The examples in docstrings run as written, and the README names what there is."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import skilltrace
from skilltrace import config

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(skilltrace.__path__, "skilltrace.")
    if not module.name.endswith("__main__") and ".demo" not in module.name
)
README = Path(__file__).parent.parent / "README.md"


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_docstrings_run(name, store):
    """Each `>>>` gives what stands below it."""
    module = importlib.import_module(name)
    failed = doctest.testmod(
        module, optionflags=doctest.ELLIPSIS, extraglobs={"register": skilltrace.artifact.register}
    )
    assert failed.failed == 0


def test_every_public_name_has_an_example():
    """Functions and classes that users call show how."""
    without = [
        name
        for name in skilltrace.__all__
        if callable(public := getattr(skilltrace, name))
        and not (isinstance(public, type) and issubclass(public, Exception))
        and ">>>" not in (public.__doc__ or "")
    ]
    assert set(without) <= {"Settings", "DeliveryStatus"} | {
        name for name in without if name.startswith(("log_", "set_tag"))
    }


def test_the_readme_names_every_setting_and_its_variables():
    """A setting that is added is documented."""
    text = README.read_text()
    for name, (variables, *_) in config._TABLE.items():
        assert f"`{name}`" in text
        for variable in variables:
            assert f"`{variable}`" in text


def test_the_readme_names_every_metric():
    """So is a metric."""
    text = README.read_text()
    for name in (*skilltrace.LMUsage(cost=0.0).metrics(), "duration"):
        assert f"`{name}`" in text


def test_the_readmes_blocks_for_ci_are_there():
    """The commands that CI runs are those that a reader sees."""
    assert re.findall(r"<!-- run: (\w+) -->\n```sh\n", README.read_text()) == ["demo", "tests"]
