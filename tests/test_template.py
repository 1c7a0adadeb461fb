"""Fields in names and tags, and paths into results."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skilltrace import tracked_phase
from skilltrace.errors import ConfigurationError
from skilltrace.redaction import Redactor
from skilltrace.template import Template, follow, found, parse_path


@pytest.fixture
def warned(caplog):
    """The warnings that skilltrace has given in this test."""

    def messages():
        return [record.getMessage() for record in caplog.records if record.name == "skilltrace"]

    return messages


@dataclasses.dataclass
class Request:
    topic: str = "python"
    scores: tuple = (0.25, 0.5)
    options: dict = dataclasses.field(default_factory=lambda: {"level": "hard", 3: "three", "a b": "spaced"})

    @property
    def broken(self):
        raise RuntimeError("no")


VALUES = {"request": Request(), "job_id": "j-1", "n": 5, "x": 0.125, "größe": "xl", "名前": "ada"}


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("plain", "plain"),
        ("", ""),
        ("{job_id}", "j-1"),
        ("a_{job_id}_b{n}", "a_j-1_b5"),
        ("{request.topic}", "python"),
        ("{request.scores[1]}", "0.5"),
        ("{request.scores[-1]}", "0.5"),
        ("{request.options[level]}", "hard"),
        ("{request.options['level']}", "hard"),
        ("{request.options.level}", "hard"),
        ("{request.options[3]}", "three"),
        ("{request.options[a b]}", "spaced"),
        ("{job_id[0]}", "j"),
        ("{größe}-{名前}", "xl-ada"),
        ("{n:03d}", "005"),
        ("{x:.1f}", "0.1"),
        ("{job_id!r}", "'j-1'"),
        ("{job_id:>5}", "  j-1"),
        ("{{job_id}} {{", "{job_id} {"),
    ],
)
def test_fields_are_filled_from_attributes_and_items(template, text):
    """Fields look as in `str.format`, with formats and conversions."""
    assert Template(template).render(VALUES) == text


@pytest.mark.parametrize(
    "template",
    [
        "{missing}", "{request.missing}", "{request.options[missing]}", "{request.scores[9]}", "{request.broken}",
        "{n.real.x}", "{n[0]}", "{job_id:d}",
    ],
)  # fmt: skip
def test_a_field_that_cannot_be_filled_is_unknown_and_warns_once(template, warned):
    """The call goes on; the run says `unknown`, and one warning names the field."""
    made = Template(f"a_{template}")
    assert made.render(VALUES) == made.render(VALUES) == "a_unknown"
    assert len(warned()) == 1
    assert template.strip("{}").partition(":")[0].replace("[", ".").replace("]", "") in warned()[0]


@pytest.mark.parametrize(
    "template",
    [
        "{", "}", "{}", "{0}", "{a.}", "{a..b}", "{a[}", "{a]}", "{a()}", "{a.b()}", "{a+b}", "{a!x}", "{a:{n}}",
        "{a b}",
        "{__class__}", "{_a}", "{a._b}", "{a.__class__}", "{a[__class__]}", "{a['_b']}", "{a.b.__init__.__globals__}",
    ],
)  # fmt: skip
def test_a_bad_template_is_refused_at_decoration(template):
    """Calls, expressions and private attributes are errors where they are written, with the option's name."""
    with pytest.raises(ConfigurationError, match="name"):
        tracked_phase(template)
    with pytest.raises(ConfigurationError, match="tags"):
        tracked_phase("p", tags={"t": template})


@settings(deadline=None)
@given(text=st.text(alphabet="{}[]!:.()_'ab0 ", max_size=20))
def test_any_text_is_a_template_or_an_error(text):
    """Nothing but ConfigurationError comes out of a template, and rendering one never raises."""
    try:
        template = Template(text)
    except ConfigurationError:
        return
    assert isinstance(template.render({"a": {"b": ["x"]}, "b": "y"}), str)
    assert "__" not in "".join(template.roots)


def test_a_template_without_fields_is_fixed():
    """It is known before the call what it renders."""
    assert Template("a{{b}}").fixed
    assert not Template("{a}").fixed
    assert Template("{a.b}_{c}").roots == ("a", "c")


@pytest.mark.parametrize("template", ["{api_key}", "{request.password}", "{request[auth_token]}", "{password.topic}"])
def test_a_field_with_a_secret_name_is_masked(template):
    """A secret cannot be put into a name or tag by a template."""
    values = {"api_key": "hunter2", "request": {"password": "hunter2", "auth_token": "hunter2"}, "password": Request()}
    assert Template(template).render(values) == "[redacted]"


def test_a_field_that_is_a_structure_shows_no_secrets():
    """The text of a dict shows its fields; those named like secrets are masked in it."""
    rendered = Template("{config}").render({"config": {"url": "u", "password": "hunter2"}})
    assert rendered == "{'url': 'u', 'password': [redacted]}"


def test_the_users_redact_function_sees_fields():
    """What `redact=` returns for a name stands in names and tags too."""
    redactor = Redactor(lambda name, value: "someone" if name == "email" else value)
    values = {"email": "a@b", "user": {"email": "c@d"}, "n": 1}
    assert Template("{email}-{user.email}-{n}").render(values, redactor) == "someone-someone-1"


def test_templates_name_runs(store):
    """The method's owner, the arguments and the job's identity are there to be named."""

    class Service:
        region = "eu"

        @tracked_phase("{self.region}/{topic}", tags={"topic": "{topic}"})
        def work(self, topic):
            pass

    Service().work("python")
    run = store.run("eu/python")
    assert run.data.tags["topic"] == "python"
    assert run.data.tags["phase"] == "eu/python"


# --- paths into results ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("topic", "python"), ("scores[0]", 0.25), ("scores.1", 0.5), ("scores.x", None), ("options.level", "hard"),
        ("options[3]", "three"),
        ("options.a b", "spaced"), (" topic ", "python"),
    ],
)  # fmt: skip
def test_a_path_is_followed(path, value):
    """Attributes and items, from any object."""
    result = follow(Request(), parse_path(path, "metrics"))
    assert (result if found(result) else None) == value


@pytest.mark.parametrize("name", ["rouge-L", "pass@1", "f1 score", "größe", "@", "a:b", "1st"])
def test_a_field_of_any_name_is_a_path(name):
    """Fields of a result are not arguments: their names need not be identifiers."""
    assert follow({name: 1, "deep": {name: 2}}, parse_path(name, "metrics")) == 1
    assert follow({name: 1, "deep": {name: 2}}, parse_path(f"deep.{name}", "metrics")) == 2


def test_a_path_may_begin_with_an_item():
    """A result may be a list or a tuple."""
    assert follow(({"a": 1}, 2), parse_path("[0].a", "metrics")) == 1
    assert follow((1, 2), parse_path("[-1]", "metrics")) == 2


@pytest.mark.parametrize(
    "path", ["", ".", "a.", ".a", "a..b", "a[", "a]b", "[", "[]", "_a", "a._b", "[__class__]", "{a}"]
)
def test_a_bad_path_is_refused(path):
    """What is no path names its option in the error."""
    with pytest.raises(ConfigurationError, match="metrics"):
        parse_path(path, "metrics")


def test_what_is_missing_is_not_found():
    """None is a value; what is not there is not."""
    assert found(follow({"a": None}, ("a",)))
    assert not found(follow({"a": None}, ("b",)))
    assert not found(follow({"a": None}, ("a", "b")))
    assert not found(follow(5, ("a",)))
