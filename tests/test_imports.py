"""What importing skilltrace costs and promises: no heavy package, one direction, a pinned set of names."""

import ast
import inspect
from pathlib import Path

import pytest

import skilltrace

PACKAGE = Path(skilltrace.__file__).parent
MODULES = {path.stem: ast.parse(path.read_text()) for path in PACKAGE.glob("*.py")}

# Along the data: what a module may import stands to its right. Each of these knows nothing of those before it.
LINE = ("tracked", "call", "run", "journal", "delivery", "deliverer", "mlflow_bridge")

NAMES = [
    "ArtifactError",
    "ConfigurationError",
    "DeliveryError",
    "DeliveryStatus",
    "JournalError",
    "LMUsage",
    "MLflowContext",
    "Run",
    "Settings",
    "SkilltraceError",
    "artifact",
    "configure",
    "current_run",
    "flush",
    "get_current_run_id",
    "log_artifact",
    "log_dict",
    "log_metric",
    "log_metrics",
    "log_param",
    "log_params",
    "log_text",
    "log_turn",
    "propagate",
    "set_tag",
    "set_tags",
    "setup_dspy_autologging",
    "shutdown",
    "status",
    "tracked_job",
    "tracked_phase",
]


def imported(tree):
    """The names of the modules that a tree imports, wherever in it; those for the type checker only left out."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names |= {argument.value for argument in node.args if isinstance(argument, ast.Constant)}
    return names


IMPORTS = {name: imported(tree) for name, tree in MODULES.items()}


def of_package(name):
    """The modules of the package that a module imports."""
    return {other for other in MODULES if other != "__init__" and f"skilltrace.{other}" in IMPORTS[name]}


def reachable(name):
    """The modules of the package that a module imports, directly or not."""
    found, todo = set(), [name]
    while todo:
        new = of_package(todo.pop()) - found
        found |= new
        todo += new
    return found


def test_importing_skilltrace_imports_neither_mlflow_nor_dspy(python):
    """They take seconds; a command line tool or a test suite that only decorates must not pay for them."""
    python(
        """
import sys
import skilltrace

@skilltrace.tracked_job
def job():
    pass

heavy = {"mlflow", "dspy", "litellm", "openai", "pandas", "numpy", "sqlalchemy", "pydantic", "requests", "rich", "IPython"}
heavy |= {"cloudpickle", "joblib"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    )


@pytest.mark.parametrize(("package", "owner"), [("mlflow", "mlflow_bridge"), ("dspy", "dspy_bridge")])
def test_one_module_knows_each_heavy_package(package, owner):
    """Only the bridge imports it, anywhere in its code (the demo is a user's program)."""
    users = {name for name, names in IMPORTS.items() if any(other.split(".")[0] == package for other in names)}
    assert users == {owner}


def test_imports_go_one_way():
    """Decorators → run → journal → delivery → MLflow: no module reaches one before it in the line."""
    for position, name in enumerate(LINE):
        assert not reachable(name) & set(LINE[:position]), name


def test_no_imports_go_in_a_circle():
    """No module reaches itself."""
    assert [name for name in MODULES if name != "__init__" and name in reachable(name)] == []


def test_the_public_names_are_these():
    """A name that appears or goes is a decision, made here too."""
    assert skilltrace.__all__ == NAMES
    assert sorted(skilltrace.__all__) == skilltrace.__all__


@pytest.mark.parametrize("name", NAMES)
def test_each_public_name_says_what_it_is(name):
    """A docstring whose first line is a summary."""
    text = inspect.getdoc(getattr(skilltrace, name))
    assert text
    assert text.splitlines()[0].strip()


def test_dspy_imported_inside_a_run_is_still_counted(python):
    """A program that imports DSPy only in its job: the calls made there are in the run, and in the runs inside it."""
    python(
        """
import sys
import skilltrace

skilltrace.configure(autolog=False, delivery="external")
with skilltrace.tracked_job("job") as job:
    assert "dspy" not in sys.modules
    import dspy
    from dspy.utils import DummyLM
    with dspy.context(lm=DummyLM([{"answer": "red"}] * 3)):
        dspy.Predict("question -> answer")(question="?")
        with skilltrace.tracked_phase("phase") as phase:
            dspy.Predict("question -> answer")(question="?")
assert (job.usage.calls, phase.usage.calls) == (2, 1)
assert not dspy.settings.caller_modules
with dspy.context(lm=DummyLM([{"answer": "red"}])):
    dspy.Predict("question -> answer")(question="?")
assert job.usage.calls == 2
"""
    )


def test_dspy_imported_before_skilltrace_is_counted(python):
    """The order of the two imports does not matter."""
    python(
        """
import dspy
from dspy.utils import DummyLM
import skilltrace

skilltrace.configure(autolog=False, delivery="external")
with skilltrace.tracked_job("job") as job, dspy.context(lm=DummyLM([{"answer": "red"}])):
    skilltrace.tracked_phase("phase")(dspy.Predict("question -> answer"))(question="?")
assert job.usage.calls == 1
"""
    )


def test_a_module_is_tracked_whose_dspy_was_imported_last(python):
    """Skilltrace first, DSPy later, then a decorated class."""
    python(
        """
import skilltrace
skilltrace.configure(autolog=False, delivery="external")
import dspy

@skilltrace.tracked_phase("phase")
class Module(dspy.Module):
    def forward(self):
        return dspy.Prediction(name=skilltrace.current_run().name)

assert Module()().name == "phase"
assert skilltrace.current_run() is None
"""
    )
