"""What is taken from a call: arguments as tags and params, the result as metrics."""

import collections
import dataclasses
import datetime as dt
import decimal
import enum
import fractions
import functools
import math
import pathlib
import uuid
from typing import NamedTuple
from unittest import mock

import attrs
import msgspec
import numpy as np
import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import skilltrace
from skilltrace import capture, tracked_job, tracked_phase
from skilltrace.capture import Binder, as_number, clean_key, clean_tags
from skilltrace.redaction import Redactor

OWN_METRICS = {
    "duration", "lm_calls", "lm_calls_cached", "lm_calls_failed", "lm_cost", "lm_duration", "lm_tokens_cached",
    "lm_tokens_input", "lm_tokens_output", "lm_tokens_reasoning", "lm_tokens_total",
}  # fmt: skip


@pytest.fixture
def warned(caplog):
    """The warnings that skilltrace has given in this test."""

    def messages():
        return [record.getMessage() for record in caplog.records if record.name == "skilltrace"]

    return messages


def call(store, function, *args, **kwargs):
    """Call the function as a phase, and give the run."""
    tracked_phase("phase")(function)(*args, **kwargs)
    return store.run()


def result_metrics(store, result, metrics=True):
    """The metrics that a result gives, without skilltrace's own."""

    @tracked_phase("phase", metrics=metrics)
    def phase():
        return result

    assert phase() is result
    return {name: value for name, value in store.run().data.metrics.items() if name not in OWN_METRICS}


class Color(enum.Enum):
    RED = "red"


class Level(enum.IntEnum):
    HIGH = 3


# --- params ----------------------------------------------------------------------------------------------------------


def test_scalar_arguments_are_params(store):
    """Texts, numbers, booleans, None, dates, paths, UUIDs and enums are params, by their text."""

    def function(text, n, x, ok, none, day, path, key, color, level, price):
        pass

    run = call(
        store, function, "t", 1, 0.5, True, None, dt.date(2025, 1, 2), pathlib.PurePosixPath("a/b"),
        uuid.UUID(int=1), Color.RED, Level.HIGH, decimal.Decimal("1.50"),
    )  # fmt: skip
    assert run.data.params == {
        "text": "t", "n": "1", "x": "0.5", "ok": "True", "none": "None", "day": "2025-01-02", "path": "a/b",
        "key": str(uuid.UUID(int=1)), "color": "red", "level": "3", "price": "1.50",
    }  # fmt: skip


def test_numpy_scalars_are_params(store):
    """Numbers of NumPy read as numbers."""
    run = call(store, lambda n, x, ok: None, np.int64(1), np.float32(0.5), np.bool_(True))
    assert run.data.params == {"n": "1", "x": "0.5", "ok": "True"}


def test_structures_and_long_texts_are_left_out(store):
    """Lists, dicts, objects and texts over 500 characters are no params; 500 characters are one."""
    run = call(store, lambda a, b, c, d, e: None, [1], {"b": 1}, object(), "x" * 501, "y" * 500)
    assert run.data.params == {"e": "y" * 500}


def test_an_empty_text_is_a_param(store):
    """Nothing is something too, and does not cost the other params."""
    assert call(store, lambda a, b: None, "", "b").data.params == {"a": "", "b": "b"}


def test_defaults_are_params(store):
    """What the caller leaves out is recorded as it holds in the call."""

    def function(a, b=2, *, c=3, d=4):
        pass

    assert call(store, function, 1, d=5).data.params == {"a": "1", "b": "2", "c": "3", "d": "5"}


def test_keyword_arguments_are_params(store):
    """What goes into `**kwargs` is recorded by its own name."""
    assert call(store, lambda a, **more: None, 1, b=2).data.params == {"a": "1", "b": "2"}


def test_only_the_named_arguments_are_params(store):
    """`params=[…]` names those that are wanted."""

    @tracked_phase("phase", params=["b", "missing"])
    def phase(a, b):
        pass

    phase(1, 2)
    assert store.run().data.params == {"b": "2"}


def test_params_can_be_turned_off(store):
    """`params=False` records no argument."""

    @tracked_phase("phase", params=False)
    def phase(a):
        pass

    phase(1)
    assert store.run().data.params == {}


def test_the_owner_of_a_method_is_no_param(store):
    """`self` and `cls` are no arguments of the call, whatever they are named."""

    class Service:
        @tracked_phase("method")
        def method(this, a):
            pass

        @tracked_phase("class")
        @classmethod
        def make(cls, a):
            pass

        @tracked_phase("static")
        @staticmethod
        def plain(a):
            pass

    Service().method(1)
    Service.make(2)
    Service.plain(3)
    Service.method(Service(), 4)
    assert [run.data.params for run in store.runs()] == [{"a": "1"}, {"a": "2"}, {"a": "3"}, {"a": "4"}]


def test_secret_arguments_are_no_params(store):
    """An argument named like a secret is left out, not even masked."""
    run = call(store, lambda api_key, token, password, max_tokens: None, "a", "b", "c", 4)
    assert run.data.params == {"max_tokens": "4"}


def test_a_secret_in_an_argument_is_masked(store):
    """A key of a known shape inside a text is masked there."""
    run = call(store, lambda text: None, "use sk-abcdefghijklmnop1234 now")
    assert run.data.params == {"text": "use [redacted] now"}


@pytest.mark.parametrize(
    "value",
    [10**5000, mock.MagicMock(), mock.MagicMock(spec=int), "\ud800", "a\0b"],
    ids=["int", "mock", "spec", "surrogate", "nul"],
)  # fmt: skip
def test_an_odd_argument_does_not_cost_the_run(store, value):
    """What has no text that can be stored is left out or replaced; the call and its run are there."""
    run = call(store, lambda odd, good: None, value, 1)
    assert run.data.params["good"] == "1"
    assert run.info.status == "FINISHED"


def test_arguments_whose_own_code_raises_are_left_out(store):
    """`__str__`, `__class__` and `get` may raise: the run has the other params."""

    class Text(str):
        __slots__ = ()

        def __str__(self):
            raise RuntimeError

    class Liar:
        @property
        def __class__(self):
            raise RuntimeError

    class Broken(collections.UserDict):
        def get(self, *args):
            raise RuntimeError

    run = call(store, lambda text, liar, broken, good: None, Text("t"), Liar(), Broken(), 1)
    assert run.data.params == {"good": "1"}


def test_a_bad_call_raises_what_it_would_have(store):
    """Missing and surplus arguments are Python's business: its error comes, and the run is FAILED."""

    @tracked_phase("phase")
    def phase(a):
        pass

    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        phase()
    with pytest.raises(TypeError, match="takes 1 positional argument but 3 were given"):
        phase(1, 2, 3)
    assert [run.info.status for run in store.runs()] == ["FAILED", "FAILED"]


@settings(deadline=None)
@given(args=st.lists(st.integers(), max_size=5), kwargs=st.dictionaries(st.sampled_from("abcdxy"), st.integers()))
def test_a_binder_binds_as_python_does(args, kwargs):
    """Where Python accepts the call, the arguments are found by the names that they have in it."""
    seen = {}

    def function(a, b=20, /, c=30, *rest, d=40, **more):
        seen.update(a=a, b=b, c=c, d=d, **more)

    try:
        function(*args, **kwargs)
    except TypeError:
        return
    # A name given both by position only and in **more is two things in Python, and one here.
    if {"a", "b"} & set(kwargs):
        return
    assert Binder(function).bind(None, tuple(args), kwargs) == (seen, None)


def test_a_binder_takes_what_has_no_signature():
    """Built-ins without a signature bind keyword arguments only."""
    assert Binder(dict).bind(None, (1,), {"a": 2})[0]["a"] == 2


def test_a_binder_knows_what_a_partial_has_filled_in():
    """The arguments that `functools.partial` leaves open are bound by their own names."""

    def function(a, b, c):
        pass

    assert Binder(functools.partial(function, 1, c=3)).bind(None, (2,), {}) == ({"b": 2, "c": 3}, None)


def test_arguments_of_a_partial_are_params(store):
    """What `functools.partial` has filled in does not shift the others."""

    def function(a, b, c):
        pass

    run = call(store, functools.partial(function, 1, c=3), 2)
    assert run.data.params == {"b": "2", "c": "3"}


# --- who it is for ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class DataclassRequest:
    job_id: str = "j-1"
    user_id: str = "u-1"
    skill_type: Color = Color.RED


@dataclasses.dataclass(slots=True)
class SlottedRequest:
    job_id: str = "j-1"
    user_id: str = "u-1"
    skill_type: Color = Color.RED


@attrs.define
class AttrsRequest:
    job_id: str = "j-1"
    user_id: str = "u-1"
    skill_type: Color = Color.RED


class PydanticRequest(pydantic.BaseModel):
    job_id: str = "j-1"
    user_id: str = "u-1"
    skill_type: Color = Color.RED


class StructRequest(msgspec.Struct):
    job_id: str = "j-1"
    user_id: str = "u-1"
    skill_type: Color = Color.RED


class NamedTupleRequest(NamedTuple):
    job_id: str = "j-1"
    user_id: str = "u-1"
    skill_type: Color = Color.RED


class PlainRequest:
    def __init__(self):
        self.job_id, self.user_id, self.skill_type = "j-1", "u-1", Color.RED


FIELDS = {"job_id": "j-1", "user_id": "u-1", "skill_type": Color.RED}


def example_request():
    import dspy

    return dspy.Example(**FIELDS)


REQUESTS = {
    "dict": lambda: dict(FIELDS),
    "Mapping": lambda: collections.UserDict(FIELDS),
    "dataclass": DataclassRequest,
    "slots": SlottedRequest,
    "attrs": AttrsRequest,
    "pydantic": PydanticRequest,
    "msgspec": StructRequest,
    "named tuple": NamedTupleRequest,
    "object": PlainRequest,
    "dspy.Example": example_request,
}


def identity(run):
    return {name: run.data.tags[name] for name in capture.IDENTITY if name in run.data.tags}


def test_arguments_of_these_names_are_tags(store):
    """`job_id`, `user_id` and `skill_type` say who a call is for."""
    run = call(store, lambda job_id, user_id, skill_type: None, "j-1", 7, Color.RED)
    assert identity(run) == {"job_id": "j-1", "user_id": "7", "skill_type": "red"}


@pytest.mark.parametrize("make", REQUESTS.values(), ids=REQUESTS)
def test_fields_of_arguments_are_tags(store, make):
    """The same names as fields of any argument, whatever kind of object it is."""
    run = call(store, lambda other, request: None, 1, make())
    assert identity(run) == {"job_id": "j-1", "user_id": "u-1", "skill_type": "red"}


def test_an_argument_goes_before_a_field(store):
    """The argument itself is nearer than a field of another one, unless it is empty."""
    run = call(store, lambda request, job_id, user_id: None, DataclassRequest(), "mine", None)
    assert identity(run) == {"job_id": "mine", "user_id": "u-1", "skill_type": "red"}


def test_properties_are_not_run_for_tags(store):
    """A property may compute, ask a database, or change something."""

    class Request:
        @property
        def job_id(self):
            raise AssertionError("was run")

        def __getattr__(self, name):
            raise AssertionError("was asked")

    assert identity(call(store, lambda request: None, Request())) == {}


@pytest.mark.parametrize("make", [mock.Mock, mock.MagicMock, mock.AsyncMock, lambda: mock.MagicMock(spec=dict)])
def test_mocks_give_no_tags(store, make):
    """A mock has any attribute, and tells nobody's name."""
    assert identity(call(store, lambda request: None, make())) == {}


def test_structures_give_no_tags(store):
    """A job_id that is a list or an object is no identity."""
    assert identity(call(store, lambda job_id, user_id: None, ["j"], object())) == {}


def test_the_owner_gives_no_tags(store):
    """What a service object has in its fields says nothing about the call."""

    class Service:
        def __init__(self):
            self.user_id = "service"

        @tracked_phase("phase")
        def work(self):
            pass

    Service().work()
    assert identity(store.run()) == {}


def test_a_job_without_an_id_gets_one(store):
    """`job_` and twelve hex digits; an empty one counts as none."""

    @tracked_job
    def job(job_id=None):
        pass

    job()
    job(job_id="")
    for run in store.runs():
        prefix, digits = run.data.tags["job_id"].split("_")
        assert prefix == "job"
        assert len(digits) == 12
        assert int(digits, 16) >= 0


def test_a_secret_in_an_identity_is_masked(store):
    """A key in the wrong place does not become a tag."""
    run = call(store, lambda user_id: None, "sk-abcdefghijklmnop1234")
    assert identity(run) == {"user_id": "[redacted]"}


# --- tags ------------------------------------------------------------------------------------------------------------


def test_the_service_is_the_class_of_the_owner(store):
    """Of a method it is the class of the object, a subclass where it is one; of a class method the class."""

    class Service:
        @tracked_phase("method")
        def method(self):
            pass

        @tracked_phase("class")
        @classmethod
        def make(cls):
            pass

        @tracked_phase("static")
        @staticmethod
        def plain():
            pass

    class Special(Service):
        pass

    Special().method()
    Special.make()
    Service.plain()
    assert [run.data.tags["service"] for run in store.runs()] == ["Special", "Special", "Service"]


def test_the_service_of_a_function_is_its_module(store):
    """A function belongs to no class."""
    assert call(store, lambda: None).data.tags["service"] == __name__


def test_user_tags_are_templates(store):
    """Tag values may have fields over the arguments; other values are their text."""

    @tracked_phase("phase", tags={"topic": "{request.topic}!", "fixed": "yes", "n": 5, "braces": "{{x}}"})
    def phase(request):
        pass

    phase({"topic": "python"})
    tags = store.run().data.tags
    assert (tags["topic"], tags["fixed"], tags["n"], tags["braces"]) == ("python!", "yes", "5", "{x}")


def test_tags_of_a_job_are_inherited(store):
    """Phases have the tags of their job, those set later too, but for what is each run's own."""

    @tracked_phase("inner", tags={"own": "phase"})
    def inner():
        pass

    @tracked_job("job", tags={"team": "a", "own": "job"})
    def job(user_id):
        skilltrace.set_tag("late", "yes")
        inner()

    job("u-1")
    tags = store.run("inner").data.tags
    assert [tags[key] for key in ("team", "own", "late", "user_id", "phase")] == ["a", "phase", "yes", "u-1", "inner"]
    assert "phase" not in store.run("job").data.tags


def test_configured_tags_stand_on_each_run(store):
    """`configure(tags=…)` is for all, and gives way to what is nearer."""
    store.configure(tags={"env": "test", "user_id": "nobody"})
    run = call(store, lambda user_id: None, "u-1")
    assert (run.data.tags["env"], run.data.tags["user_id"]) == ("test", "u-1")


def test_a_long_tag_is_cut_with_a_warning(store, warned):
    """MLflow holds 8000 characters; that more was there is to be seen in the tag."""
    run = call(store, lambda: skilltrace.set_tag("long", "x" * 9000))
    assert run.data.tags["long"] == "x" * 7999 + "…"
    assert len(warned()) == 1


def test_a_secret_across_the_cut_is_masked(store):
    """A key is masked before a tag is cut: half a key is a secret too."""
    run = call(store, lambda: skilltrace.set_tag("long", "x" * 7980 + " sk-abcdefghijklmnop1234" + "y" * 100))
    assert "sk-" not in run.data.tags["long"]


@pytest.mark.parametrize("key", ["a#b", "a/../b", "/a", "a//b", "..a", "../a", "k" * 300, "", ".", "a\nb", "ключ/й"])
def test_any_key_of_a_tag_is_taken(store, key):
    """A key that MLflow would refuse is recorded under the nearest that it takes."""
    run = call(store, lambda: skilltrace.set_tags({key: "value", "good": "yes"}))
    assert run.data.tags["good"] == "yes"
    assert run.data.tags[clean_key(key)] == "value"
    assert skilltrace.status().rejected == 0


def test_a_key_that_is_replaced_is_said_once(store, warned):
    """One warning names the key and what it is recorded as."""

    def function():
        for _ in range(3):
            skilltrace.set_tag("a#b", "value")

    call(store, function)
    assert len(warned()) == 1
    assert "'a#b'" in warned()[0]
    assert "'a_b'" in warned()[0]


@settings(deadline=None)
@given(key=st.text(max_size=300) | st.text(alphabet="./a ", max_size=10))
def test_a_clean_key_is_taken_by_mlflow(key):
    """MLflow's own validation accepts each key that comes out."""
    from mlflow.utils import validation

    cleaned = clean_key(key)
    assert len(cleaned) <= 250
    validation._validate_tag(cleaned, "value")
    validation._validate_param(cleaned, "value")
    validation._validate_metric(cleaned, 1.0, 0, 0)
    assert clean_key(cleaned) == cleaned


def test_keys_that_are_no_text_are_taken(store):
    """A number as the name of a tag, a param or a metric is its text."""
    with tracked_phase("phase") as run:
        run.set_tag(5, "five")
        run.log_param(6, "six")
        run.log_metric(7, 7)
    run = store.run()
    assert (run.data.tags["5"], run.data.params["6"], run.data.metrics["7"]) == ("five", "six", 7)


def test_skilltraces_own_tags_cannot_be_set(store, warned):
    """Delivery finds a run by its key: a tag of that name is left out, with a warning."""
    with tracked_phase("phase") as run:
        run.set_tag("skilltrace.key", "mine")
    assert store.run().data.tags["skilltrace.key"] == run.key
    assert len(warned()) == 1


def test_a_nul_in_a_tag_is_replaced(store):
    """PostgreSQL refuses it, with all that is in the same batch."""
    run = call(store, lambda: skilltrace.set_tag("odd", "a\0b"))
    assert run.data.tags["odd"] == "a\N{REPLACEMENT CHARACTER}b"


def test_tags_of_other_text_classes_are_recorded(store):
    """A journal takes no subclasses of str: the tag is the text."""

    class Text(str):
        __slots__ = ()

    run = call(store, lambda: skilltrace.set_tags({Text("key"): Text("value"), "np": np.str_("text")}))
    assert (run.data.tags["key"], run.data.tags["np"]) == ("value", "text")


def test_a_secret_in_a_structure_that_is_a_tag_is_masked(store):
    """The text of a dict shows its fields: those named like secrets are masked in it."""
    run = call(store, lambda: skilltrace.set_tag("config", {"url": "http://x", "password": "hunter2"}))
    assert run.data.tags["config"] == "{'url': 'http://x', 'password': [redacted]}"


def test_a_tag_whose_text_raises_does_not_cost_the_others(store):
    """A value's own `__str__` may raise."""

    class Broken:
        def __str__(self):
            raise RuntimeError

    run = call(store, lambda: skilltrace.set_tags({"broken": Broken(), "good": 1}))
    assert run.data.tags["good"] == "1"
    assert "RuntimeError" in run.data.tags["broken"]


@settings(deadline=None)
@given(tags=st.dictionaries(st.text(), st.text() | st.integers() | st.none() | st.floats()))
def test_clean_tags_are_taken_by_mlflow(tags):
    """Whatever the tags are, what comes out are texts within MLflow's limits."""
    for key, text in clean_tags(tags, Redactor()).items():
        assert type(key) is str
        assert type(text) is str
        assert len(text) <= 8000


# --- metrics ---------------------------------------------------------------------------------------------------------


def test_numbers_of_the_result_are_metrics(store):
    """Numeric and boolean top-level fields; texts, structures and None are none."""
    result = {"score": 0.5, "n": 3, "ok": True, "text": "1", "none": None, "nested": {"deep": 1}, "list": [1]}
    assert result_metrics(store, result) == {"score": 0.5, "n": 3, "ok": 1}


@pytest.mark.parametrize("make", REQUESTS.values(), ids=REQUESTS)
def test_metrics_of_each_mapping_like_result(make):
    """What is laid out by field has metrics by field."""
    assert capture.metrics(make(), True) == {}


def test_metrics_of_a_prediction(store):
    """A module's outputs that are numbers are metrics."""
    import dspy

    assert result_metrics(store, dspy.Prediction(answer="x", confidence=0.5)) == {"confidence": 0.5}


def test_a_number_without_fields_is_no_metric(store):
    """It has no name; it is an artifact."""
    assert result_metrics(store, 0.5) == {}


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (np.float32(0.5), 0.5), (np.int64(3), 3), (np.bool_(True), 1), (decimal.Decimal("0.5"), 0.5),
        (fractions.Fraction(1, 4), 0.25), (Level.HIGH, 3), (10**400, math.inf), (-(10**400), -math.inf), (False, 0),
    ],
    ids=repr,
)  # fmt: skip
def test_all_real_numbers_are_metrics(value, number):
    """NumPy's scalars, decimals, fractions and integers of any size."""
    assert as_number(value) == number


@pytest.mark.parametrize(
    "value",
    ["0.5", 1j, None, [1], np.array([1.0]), decimal.Decimal("sNaN"), object(), mock.MagicMock(spec=float)],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_what_is_no_real_number_is_no_metric(value):
    """Texts, complex numbers, arrays and mocks are not turned into numbers."""
    assert as_number(value) is None


def test_nan_and_infinities_are_kept_as_mlflow_does(store):
    """NaN is NaN; MLflow keeps infinities as the largest floats."""
    metrics = result_metrics(store, {"nan": math.nan, "inf": math.inf, "minus": -math.inf, "good": 1})
    assert math.isnan(metrics["nan"])
    assert metrics["inf"] >= 1.797e308
    assert metrics["minus"] <= -1.797e308
    assert metrics["good"] == 1


def test_a_mapping_picks_metrics(store):
    """Paths of attributes and items, and functions of the result."""

    @dataclasses.dataclass
    class Report:
        scores: list

    result = {"report": Report([0.1, 0.2]), "issues": ["a", "b"]}
    picks = {"quality": "report.scores[1]", "issues": lambda result: len(result["issues"]), "last": "report.scores[-1]"}
    assert result_metrics(store, result, picks) == {"quality": 0.2, "issues": 2, "last": 0.2}


def test_a_list_picks_fields(store):
    """Fields by name, also names that are no identifiers."""
    result = {"rouge-L": 0.1, "pass@1": 0.2, "f1 score": 0.3, "other": 0.4}
    assert result_metrics(store, result, ["rouge-L", "pass@1", "f1 score"]) == {
        "rouge-L": 0.1, "pass_1": 0.2, "f1 score": 0.3,
    }  # fmt: skip


def test_an_item_of_a_result_that_is_a_tuple_is_picked(store):
    """A path may begin with an item."""
    assert result_metrics(store, (0.5, {"n": 2}), {"score": "[0]", "n": "[1].n"}) == {"score": 0.5, "n": 2}


def test_metrics_can_be_turned_off(store):
    """`metrics=False` takes none from the result; skilltrace's own stay."""
    assert result_metrics(store, {"score": 1}, False) == {}


def test_a_pick_that_fails_costs_only_itself(store, warned):
    """What is missing, raises or is no number is named in a warning each; the rest is recorded."""
    picks = {"missing": "nothing", "raises": lambda result: 1 / 0, "text": "text", "good": "score"}
    assert result_metrics(store, {"score": 1, "text": "x"}, picks) == {"good": 1}
    assert len(warned()) == 3


@pytest.mark.parametrize("name", ["a#b", "../a", "k" * 300, "a//b", "", "..a"])
def test_any_name_of_a_metric_is_taken(store, name):
    """A field whose name MLflow would refuse is recorded under the nearest that it takes, with one warning."""
    assert result_metrics(store, {name: 1, "good": 2}) == {clean_key(name): 1, "good": 2}
    assert skilltrace.status().rejected == 0


def test_a_field_of_a_reserved_name_is_kept_apart(store):
    """A result's own `duration` or `lm_calls` does not stand in for skilltrace's."""
    metrics = result_metrics(store, {"duration": 99.0, "lm_calls": 98})
    assert metrics == {"result.duration": 99, "result.lm_calls": 98}
    run = store.run()
    assert run.data.metrics["duration"] < 90
    assert run.data.metrics["lm_calls"] == 0


def test_over_a_thousand_numbers_are_cut_with_a_warning(warned):
    """A mapping from ids to numbers is a collection: MLflow is not flooded with it."""
    assert len(capture.metrics({f"id{number}": number for number in range(5000)}, True)) == 1000
    assert len(warned()) == 1


def test_numbers_under_secret_names_are_no_metrics(store):
    """A numeric token or password is a secret, by whatever way it is picked."""
    assert result_metrics(store, {"password": 1234, "score": 1}) == {"score": 1}
    assert capture.metrics({"n": 1}, {"password": "n", "score": "n"}) == {"score": 1}


def test_a_result_whose_fields_raise_has_no_metrics(store):
    """The artifacts' side says so once; nothing comes out."""

    class Broken:
        def to_dict(self):
            raise RuntimeError

    assert result_metrics(store, Broken()) == {}


@pytest.mark.parametrize("metrics", ["score", 5, {"a": 5}, {5: "a"}, {"": "a"}, [5], {"a": "x..y"}, {"a": "_private"}])
def test_bad_picks_are_refused_at_decoration(metrics):
    """An option that cannot work is an error where it is written."""
    with pytest.raises(skilltrace.ConfigurationError, match="metrics"):
        tracked_phase("phase", metrics=metrics)


# --- names -----------------------------------------------------------------------------------------------------------


def test_a_long_name_is_cut(store):
    """A run's name is 250 characters at most."""

    @tracked_phase("{text}")
    def phase(text):
        pass

    phase("x" * 1000)
    assert store.run().info.run_name == "x" * 250


def test_a_name_without_text_is_unnamed(store):
    """MLflow would invent a name for an empty one."""

    @tracked_phase("{text}")
    def phase(text):
        pass

    phase("")
    assert store.run().info.run_name == "unnamed"
