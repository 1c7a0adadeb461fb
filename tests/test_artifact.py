"""Which files a result becomes, and how its values are written."""

import asyncio
import collections
import dataclasses
import datetime as dt
import decimal
import enum
import fractions
import io
import itertools
import json
import math
import os
import pathlib
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import NamedTuple
from unittest import mock

import attrs
import msgspec
import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import skilltrace
from skilltrace import artifact, tracked_job, tracked_phase
from skilltrace.artifact import JsonTree, file_name, of_result, of_value, safe_path
from skilltrace.errors import ArtifactError, ConfigurationError
from skilltrace.redaction import Redactor

MAX = 10 << 20


def record(store, result, artifacts=True, name="report", **options):
    """Return the value from a phase, as the caller gets it, and give the run that it made."""

    @tracked_phase(name, artifacts=artifacts, **options)
    def phase():
        return result

    returned = phase()
    assert returned is result
    return store.run()


def files_of(result, option=True, *, name="report", max_bytes=MAX, redactor=None, **options):
    """The artifacts of a value by path, without MLflow."""
    made = of_result(result, option, name=name, redactor=redactor or Redactor(), max_bytes=max_bytes, **options)
    contents = {}
    for file in made:
        content = file.text if file.text is not None else file.data if file.data is not None else file.json
        assert file.path not in contents
        contents[file.path] = content
    return contents


def tree(value, max_bytes=MAX):
    """A value as JSON; it must be valid JSON of any encoder."""
    made = JsonTree(Redactor(), max_bytes).of(value)
    json.dumps(made, allow_nan=False)
    return made


@pytest.fixture(autouse=True)
def own_registry():
    """Serializers registered in a test are forgotten with it."""
    registered, exact = dict(artifact._registered), dict(artifact._exact)
    yield
    artifact._registered.clear()
    artifact._registered.update(registered)
    artifact._exact.clear()
    artifact._exact.update(exact)
    artifact._by_type.clear()


@pytest.fixture
def warned(caplog):
    """The warnings that skilltrace has given in this test."""

    def messages():
        return [record.getMessage() for record in caplog.records if record.name == "skilltrace"]

    return messages


# --- laid out by field -----------------------------------------------------------------------------------------------

TEXT = "# Python decorators\n\nA decorator wraps a function.\n"


@dataclasses.dataclass
class DataclassReport:
    text: str
    nested: dict
    score: float


@dataclasses.dataclass(frozen=True, slots=True)
class SlottedReport:
    text: str
    nested: dict
    score: float


@attrs.define
class AttrsReport:
    text: str
    nested: dict
    score: float


class PydanticReport(pydantic.BaseModel):
    text: str
    nested: dict
    score: float


class NamedTupleReport(NamedTuple):
    text: str
    nested: dict
    score: float


class StructReport(msgspec.Struct):
    text: str
    nested: dict
    score: float


class ToDictReport:
    def __init__(self, **fields):
        self._fields = fields

    def to_dict(self):
        return self._fields


class MappingReport(Mapping):
    def __init__(self, **fields):
        self._data = fields

    def __getitem__(self, key):
        return self._data[key]

    def __iter__(self):
        return iter(self._data)

    def __len__(self):
        return len(self._data)


def prediction(**fields):
    import dspy

    return dspy.Prediction(**fields)


def example(**fields):
    import dspy

    return dspy.Example(**fields).with_inputs("text")


MAPPING_LIKE = {
    "dict": dict,
    "OrderedDict": collections.OrderedDict,
    "UserDict": lambda **fields: collections.UserDict(fields),
    "ChainMap": lambda **fields: collections.ChainMap(fields, {}),
    "dspy.Prediction": prediction,
    "dspy.Example": example,
    "dataclass": DataclassReport,
    "slotted dataclass": SlottedReport,
    "attrs": AttrsReport,
    "pydantic": PydanticReport,
    "named tuple": NamedTupleReport,
    "msgspec": StructReport,
    "to_dict": ToDictReport,
    "Mapping": MappingReport,
}


@pytest.mark.parametrize("make", MAPPING_LIKE.values(), ids=MAPPING_LIKE)
def test_a_mapping_like_result_is_laid_out_by_field(store, make, warned):
    """Each kind of object with fields gives a file for each text and structure, and one for the scalars."""
    run = record(store, make(text=TEXT, nested={"a": [1, 2]}, score=0.5))
    assert store.files(run) == ["nested.json", "result.json", "text.md"]
    assert store.text(run, "text.md") == TEXT
    assert store.json(run, "nested.json") == {"a": [1, 2]}
    assert store.json(run, "result.json") == {"score": 0.5}
    assert warned() == []


def test_the_seed_gets_its_four_files(store):
    """The four fields that its users know give the four files that they know."""
    run = record(
        store,
        {
            "skill_content": "# Skill",
            "metadata": {"name": "python"},
            "validation_report": {"passed": True},
            "conversation_history": [{"role": "user", "content": "hi"}],
        },
    )
    assert store.files(run) == [
        "conversation_history.json",
        "metadata.json",
        "skill_content.md",
        "validation_report.json",
    ]
    assert store.text(run, "skill_content.md") == "# Skill"
    assert store.json(run, "conversation_history.json") == [{"role": "user", "content": "hi"}]


def test_long_text_is_a_file_and_short_text_is_not():
    """A text of one line is in result.json up to 249 characters, and a file from 250 on."""
    files = files_of({"short": "x" * 249, "long": "x" * 250})
    assert files == {"result.json": {"short": "x" * 249}, "long.md": "x" * 250}


def test_scalars_stand_together_in_result_json():
    """Numbers, booleans, None, short texts and what reads as one of these share one file."""
    files = files_of(
        {
            "n": 1, "x": 0.5, "ok": True, "none": None, "text": "t", "id": uuid.UUID(int=1), "day": dt.date(2025, 1, 2),
            "path": pathlib.PurePosixPath("a/b"), "price": decimal.Decimal("1.50"), "part": fractions.Fraction(1, 4),
        }
    )  # fmt: skip
    assert files == {
        "result.json": {
            "n": 1, "x": 0.5, "ok": True, "none": None, "text": "t", "id": str(uuid.UUID(int=1)), "day": "2025-01-02",
            "path": "a/b", "price": "1.50", "part": 0.25,
        }
    }  # fmt: skip


def test_bytes_are_a_bin_file(store):
    """Bytes of any sort keep their content."""
    run = record(store, {"raw": b"\x00\xff", "buffer": bytearray(b"b"), "view": memoryview(b"v")})
    assert store.files(run) == ["buffer.bin", "raw.bin", "view.bin"]
    assert store.read(run, "raw.bin") == b"\x00\xff"


@pytest.mark.parametrize(
    "value", [[1], (1,), {"a": 1}, collections.deque([1]), {1}, range(2), {"a": 1}.values(), {}, []], ids=repr
)
def test_structures_are_json_files(value):
    """Lists, tuples, mappings, sets, deques, ranges and views are JSON, empty ones too."""
    assert list(files_of({"field": value})) == ["field.json"]


def test_models_in_fields_are_json_files(store):
    """A field that has fields itself is one JSON file, with its own inside."""
    run = record(store, {"model": PydanticReport(text="a\nb", nested={"c": AttrsReport("x", {}, 1)}, score=1)})
    assert store.json(run, "model.json") == {
        "text": "a\nb",
        "nested": {"c": {"text": "x", "nested": {}, "score": 1}},
        "score": 1.0,
    }


def test_pydantic_extras_and_computed_fields_are_fields():
    """What a pydantic model writes of itself is what is recorded, extras and computed fields included."""

    class Report(pydantic.BaseModel, extra="allow"):
        a: int

        @pydantic.computed_field
        @property
        def double(self) -> int:
            return 2 * self.a

    assert files_of(Report(a=1, b=5)) == {"result.json": {"a": 1, "double": 2, "b": 5}}


def test_a_pydantic_root_model_is_its_root():
    """A root model has no fields of its own: it is recorded as what it holds."""

    class Scores(pydantic.RootModel[list[int]]):
        pass

    assert files_of(Scores([1, 2])) == {"report.json": [1, 2]}
    assert files_of({"scores": Scores([1, 2])}) == {"scores.json": [1, 2]}


def test_keys_that_are_no_text_are_field_names_too():
    """Numbers, enums, None, tuples and texts of other classes name files and fields."""

    class Color(str, enum.Enum):
        RED = "red"

    class Text(str):
        __slots__ = ()

    files = files_of({1: [1], Color.RED: [2], Text("t"): [3], None: 4, (1, 2): 5})
    assert files == {"1.json": [1], "red.json": [2], "t.json": [3], "result.json": {"None": 4, "(1, 2)": 5}}
    msgspec.json.encode(files)


def test_more_than_a_hundred_file_fields_go_into_result_json(warned):
    """A mapping from ids to structures is a collection: it does not become thousands of files."""
    files = files_of({f"document-{number}": {"n": number} for number in range(150)})
    assert len(files) == 101
    assert files["result.json"]["document-149"] == {"n": 149}
    assert len(warned()) == 1


def test_a_result_without_fields_or_value_gives_no_files():
    """An empty mapping and None have nothing to write."""
    assert files_of({}) == {}
    assert files_of(None) == {}


# --- other values ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "path", "content"),
    [
        ("short", "report.md", "short"),
        (7, "report.json", 7),
        (True, "report.json", True),
        ([1, {"a": (2,)}], "report.json", [1, {"a": [2]}]),
        (b"raw", "report.bin", b"raw"),
        (decimal.Decimal("0.5"), "report.md", "0.5"),
    ],
    ids=repr,
)
def test_a_value_without_fields_is_one_file_named_after_the_phase(value, path, content):
    """A text, a number, a list or bytes is one file, with the phase's name."""
    assert files_of(value) == {path: content}


def test_the_file_of_a_value_is_named_by_the_rendered_phase(store):
    """The phase's name is the rendered one, made safe for a file."""

    @tracked_phase("draft/{topic}")
    def phase(topic):
        return ["a"]

    phase("C# & co.")
    assert store.files(store.run()) == ["draft_C_ _ co.json"]


def test_the_file_of_a_jobs_value_is_named_after_the_job(store):
    """A job's rendered name holds an id; its file is named after the function."""

    @tracked_job("job_{job_id}")
    def build(job_id):
        return "text"

    build("j-1")
    assert store.files(store.run()) == ["build.md"]


def test_a_data_frame_is_csv(store):
    """A pandas frame can be read back from its file; its default index is left out."""
    import pandas as pd

    frame = pd.DataFrame({"a": [1, 2], "b": ["x", "y"]})
    run = record(store, {"table": frame, "rows": 2})
    assert store.files(run) == ["result.json", "table.csv"]
    pd.testing.assert_frame_equal(pd.read_csv(io.BytesIO(store.read(run, "table.csv"))), frame)


def test_a_named_index_of_a_data_frame_is_kept():
    """What `groupby` leaves in the index are values, not row numbers."""
    import pandas as pd

    frame = pd.DataFrame({"kind": ["a", "a", "b"], "n": [1, 2, 3]}).groupby("kind").sum()
    assert files_of({"table": frame}) == {"table.csv": "kind,n\na,3\nb,3\n"}


def test_a_large_data_frame_is_cut_and_says_so(monkeypatch):
    """Rows over the limit are left out, and the file's last line says how many."""
    import pandas as pd

    monkeypatch.setattr(artifact, "_MAX_CELLS", 10)
    lines = files_of({"table": pd.DataFrame({"a": range(100), "b": range(100)})})["table.csv"].splitlines()
    assert len(lines) == 1 + 5 + 1
    assert lines[-1] == "# cut by skilltrace: 5 of 100 rows"


def test_a_secret_column_of_a_data_frame_is_left_out():
    """Columns are fields: one named like a secret does not reach the file."""
    import pandas as pd

    csv = files_of({"users": pd.DataFrame({"name": ["ada"], "password": ["hunter2"]})})["users.csv"]
    assert csv == "name\nada\n"


def test_a_matplotlib_figure_is_png(store):
    """A figure is a picture that opens."""
    from matplotlib.figure import Figure
    from PIL import Image

    figure = Figure()
    figure.subplots().plot([1, 2])
    run = record(store, {"plot": figure})
    assert store.files(run) == ["plot.png"]
    assert Image.open(io.BytesIO(store.read(run, "plot.png"))).format == "PNG"


def test_a_plotly_figure_is_html(store):
    """A plotly figure is a page of its own."""
    import plotly.graph_objects

    run = record(store, {"plot": plotly.graph_objects.Figure(data=[{"y": [1, 2]}])})
    assert store.files(run) == ["plot.html"]
    assert "<html>" in store.text(run, "plot.html")[:200]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "1", "P", "CMYK", "F"])
def test_a_pillow_image_is_png(mode):
    """Images of each mode become PNGs, those converted that PNG does not know."""
    from PIL import Image

    data = files_of({"image": Image.new(mode, (2, 3))})["image.png"]
    assert Image.open(io.BytesIO(data)).size == (2, 3)


def test_a_dspy_module_is_its_state(store):
    """A module's file is what `load_state` takes, without any `api_…` setting of its LM."""
    import dspy

    program = dspy.ChainOfThought("question -> answer")
    program.demos = []
    program.set_lm(dspy.LM("openai/gpt", api_key="hunter2", api_base="http://inside.example", temperature=0.5))
    run = record(store, {"program": program, "score": 1.0})
    assert store.files(run) == ["program.json", "result.json"]
    text = store.text(run, "program.json")
    assert "hunter2" not in text
    assert "inside.example" not in text
    again = dspy.ChainOfThought("question -> answer")
    again.load_state(json.loads(text))
    assert again.predictors()[0].lm.kwargs["temperature"] == 0.5


def test_a_dspy_image_is_named_not_dumped():
    """Its own dump would be the whole picture as base64."""
    import dspy

    image = dspy.Image("data:image/png;base64," + "A" * 100_000)
    text = files_of({"image": image})["image.txt"]
    assert len(text) <= 250


def test_numpy_values_read_as_pythons():
    """Arrays are lists; NumPy's scalars are numbers, also where Python's `numbers` does not know them."""
    import numpy as np

    result = {"array": np.arange(4).reshape(2, 2), "n": np.int32(1), "x": np.float32(0.5), "ok": np.bool_(True)}
    files = files_of({**result, "s": np.str_("t")})
    assert files == {"array.json": [[0, 1], [2, 3]], "result.json": {"n": 1, "x": 0.5, "ok": True, "s": "t"}}
    msgspec.json.encode(files)


def test_a_large_array_is_cut_and_says_so(monkeypatch):
    """An array over the limit is not turned into a list of all its elements."""
    import numpy as np

    monkeypatch.setattr(artifact, "_MAX_CELLS", 3)
    assert files_of(np.zeros((2, 2)))["report.json"] == [0.0, 0.0, 0.0, "[cut by skilltrace: 3 of 4 elements]"]


# --- artifacts= ------------------------------------------------------------------------------------------------------


def test_a_path_puts_the_whole_value_there(store):
    """`artifacts="…"` writes the value itself, fields and all, into the one file."""
    run = record(store, {"a": {"b": 1}, "c": 2}, artifacts="reports/report.json")
    assert store.files(run) == ["reports/report.json"]
    assert store.json(run, "reports/report.json") == {"a": {"b": 1}, "c": 2}


def test_a_mapping_picks_by_path_and_by_function(store):
    """`artifacts={…}` takes parts of the result, by paths of attributes and items and by callables."""
    result = {"report": {"issues": [{"id": 1}]}, "text": TEXT}
    run = record(
        store,
        result,
        artifacts={
            "report.json": "report",
            "first.json": "report.issues[0]",
            "deep/text.txt": lambda result: result["text"].upper(),
        },
    )
    assert store.files(run) == ["deep/text.txt", "first.json", "report.json"]
    assert store.json(run, "first.json") == {"id": 1}
    assert store.text(run, "deep/text.txt") == TEXT.upper()


def test_false_writes_no_files(store):
    """`artifacts=False` turns them off; metrics stay."""
    run = record(store, {"text": TEXT, "score": 1}, artifacts=False)
    assert store.files(run) == []
    assert run.data.metrics["score"] == 1


def test_a_part_that_is_missing_or_raises_costs_only_itself(warned):
    """Each pick that fails is named in a warning; the others are recorded."""
    files = files_of({"a": [1]}, {"a.json": "a", "b.json": "b", "c.json": lambda result: result["c"], "d.json": "a[7]"})
    assert files == {"a.json": [1]}
    assert [path for path in ("b.json", "c.json", "d.json") if any(path in text for text in warned())] == [
        "b.json",
        "c.json",
        "d.json",
    ]


def test_a_part_that_is_none_is_no_file(warned):
    """A field that is there but empty is nothing to write, and nothing to warn of."""
    assert files_of({"a": None}, {"a.json": "a", "b.json": lambda result: None}) == {}
    assert warned() == []


def test_a_text_at_a_path_is_written_as_it_is():
    """A text may be JSON, CSV or anything already: it is not encoded once more."""
    assert files_of('{"a": 1}', "report.json") == {"report.json": '{"a": 1}'}


@pytest.mark.parametrize(
    "path", ["../out.json", "/etc/out.json", "a/../../b", "", "..", "C:\\x", "a\0b", "a#b", "x" * 201]
)
def test_a_bad_path_is_refused_at_decoration(path):
    """A path that leaves the run, or that no store could hold, is an error where it is written down."""
    for artifacts in (path, {path: "field"}):
        with pytest.raises(ConfigurationError, match="artifacts"):
            tracked_phase("p", artifacts=artifacts)


# --- types that skilltrace does not know -----------------------------------------------------------------------------


class Opaque:
    def __repr__(self):
        return "<opaque>"


def test_an_unknown_type_is_its_repr_with_one_warning(store, warned):
    """It is a text file, and one warning names the type and what to do, however often it comes."""
    first, second = Opaque(), Opaque()
    run = record(store, {"a": first, "b": [second, first]})
    assert store.text(run, "a.txt") == "<opaque>"
    assert store.json(run, "b.json") == ["<opaque>", "<opaque>"]
    assert len(warned()) == 1
    assert "register(Opaque)" in warned()[0]


def test_an_unknown_type_at_a_json_path_is_json(warned):
    """A file that says it is JSON is JSON."""
    assert files_of({"a": Opaque()}, {"a.json": "a", "a.txt": "a"}) == {"a.json": "<opaque>", "a.txt": "<opaque>"}


def test_a_secret_in_the_repr_of_an_unknown_type_is_masked():
    """Fields named like secrets are secrets in a repr too."""

    class Client:
        def __repr__(self):
            return "Client(url='http://x', api_key='hunter2', headers={'Authorization': 'Basic ab', 'n': 1})"

    text = files_of(Client())["report.txt"]
    assert text == "Client(url='http://x', api_key=[redacted], headers={'Authorization': [redacted], 'n': 1})"


class Molecule:
    def __init__(self, name="water"):
        self.name = name


class Acid(Molecule):
    pass


def test_a_registered_type_is_written_by_its_serializer(store, warned):
    """`register` with a suffix: the file has that suffix and the function's text; subclasses too."""

    @artifact.register(Molecule, suffix=".svg")
    def draw(molecule):
        return f"<svg>{molecule.name}</svg>"

    run = record(store, {"one": Molecule(), "two": Acid("acetic")})
    assert store.files(run) == ["one.svg", "two.svg"]
    assert store.text(run, "two.svg") == "<svg>acetic</svg>"
    assert warned() == []


@pytest.mark.parametrize(
    ("content", "path"), [("text", "report.md"), (b"raw", "report.bin"), ({"a": 1}, "report.json"), (5, "report.json")]
)
def test_the_suffix_follows_what_the_serializer_returns(content, path):
    """Without a suffix text is `.md`, bytes `.bin`, all else `.json`."""
    artifact.register(Molecule)(lambda molecule: content)
    assert files_of(Molecule()) == {path: content}


def test_a_registered_type_inside_a_structure_is_serialised_there():
    """In a JSON file the serializer's content stands where the value stood; of bytes only the size."""
    artifact.register(Molecule)(lambda molecule: {"name": molecule.name})
    artifact.register(Opaque)(lambda opaque: b"12345")
    assert files_of([Molecule(), {"deep": Acid("x")}, Opaque()]) == {
        "report.json": [{"name": "water"}, {"deep": {"name": "x"}}, "[5 bytes]"]
    }


def test_the_nearest_base_decides():
    """A serializer of the class itself goes before one of its base."""
    artifact.register(Molecule)(lambda molecule: "molecule")
    artifact.register(Acid)(lambda acid: "acid")
    assert files_of(Acid()) == {"report.md": "acid"}


def test_a_serializer_may_return_its_own_type():
    """What a serializer of dicts returns is not given to it again."""
    artifact.register(dict)(lambda value: {key: item for key, item in value.items() if key != "raw"})
    assert files_of({"a": {"b": 1, "raw": 2}, "raw": 3}) == {"report.json": {"a": {"b": 1}}}


def test_a_serializer_may_return_what_has_a_serializer():
    """A class that is drawn as a data frame is CSV, as the frame itself would be."""
    import pandas as pd

    artifact.register(Molecule)(lambda molecule: pd.DataFrame({"name": [molecule.name]}))
    assert files_of({"m": Molecule()}) == {"m.csv": "name\nwater\n"}


def test_two_serializers_may_return_each_others_type():
    """A circle of serializers comes to an end."""
    artifact.register(Molecule)(lambda molecule: Opaque())
    artifact.register(Opaque)(lambda opaque: Molecule())
    assert "deeper than 50 levels" in str(files_of({"m": Molecule()}))


def test_a_serializer_of_object_takes_what_nobody_knows(warned):
    """`register(object)` is for the rest: known types stay as they are."""
    artifact.register(object)(lambda value: {"type": type(value).__name__})
    assert files_of({"a": Opaque(), "b": [1]}) == {"a.json": {"type": "Opaque"}, "b.json": [1]}
    assert warned() == []


def test_a_serializer_that_raises_costs_its_value_only(store, warned):
    """The value is its repr, one warning says why, the other fields are recorded."""

    @artifact.register(Opaque)
    def broken(opaque):
        raise RuntimeError("no")

    run = record(store, {"a": Opaque(), "b": [Opaque()], "score": 1})
    assert store.text(run, "a.txt") == "<opaque>"
    assert store.json(run, "b.json") == ["[unreadable Opaque: RuntimeError]"]
    assert store.json(run, "result.json") == {"score": 1}
    assert len(warned()) == 1
    assert "RuntimeError" in warned()[0]


@pytest.mark.parametrize(
    ("type_", "suffix"), [("x", None), (5, None), (str, None), (Molecule, "svg"), (Molecule, "./a")]
)
def test_register_refuses_what_it_cannot_use(type_, suffix):
    """No class, a class of Python's texts or numbers, and a bad suffix are errors at once."""
    with pytest.raises(ConfigurationError):
        artifact.register(type_, suffix=suffix)


# --- what was returned is what is recorded ---------------------------------------------------------------------------


def test_a_later_change_of_the_result_is_not_recorded(store):
    """The caller may do with its result what it likes."""

    @tracked_phase("phase")
    def phase():
        return {"nested": {"list": [1]}, "raw": bytearray(b"before")}

    result = phase()
    result["nested"]["list"].append(2)
    result["raw"][:] = b"after!"
    run = store.run()
    assert store.json(run, "nested.json") == {"list": [1]}
    assert store.read(run, "raw.bin") == b"before"


def test_a_result_changed_by_another_thread_meanwhile_is_recorded(store):
    """A mapping that grows while it is read is no error."""
    result = {f"key{number}": [number] for number in range(50)}
    stop = threading.Event()

    def change():
        for number in itertools.count():
            if stop.is_set():
                return
            result[f"new{number % 500}"] = 1
            result.pop(f"new{(number - 7) % 500}", None)

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for _ in range(200):
            assert files_of({"nested": result})["nested.json"]["key7"] == [7]
            assert "key7.json" in files_of(result)
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize(
    "make",
    [
        lambda: (n for n in range(3)),
        lambda: iter([0, 1, 2]),
        lambda: map(int, "012"),
        lambda: zip("ab", "cd", strict=True),
        lambda: io.StringIO("0\n1\n2\n"),
        lambda: itertools.count(),
    ],
    ids=["generator", "iterator", "map", "zip", "file", "endless"],
)
def test_an_iterator_is_never_consumed(store, make, warned):
    """What a plain function returns to be read once is left for the caller, wherever it stands in the result."""
    result = {"items": make(), "nested": [make()]}
    expected = list(itertools.islice(make(), 3))
    record(store, result)
    assert list(itertools.islice(result["items"], 3)) == expected
    assert list(itertools.islice(result["nested"][0], 3)) == expected
    assert len(warned()) == 1


def test_a_coroutine_is_never_consumed(store):
    """A coroutine that a plain function returns can still be awaited by its caller."""

    async def answer():
        return 42

    result = answer()
    record(store, result)
    assert asyncio.run(result) == 42


# --- caps ------------------------------------------------------------------------------------------------------------


def test_a_text_over_the_limit_is_cut_and_says_so(store):
    """The file is no larger than `max_artifact_bytes`, and ends with how much is left out."""
    store.configure(max_artifact_bytes=2000)
    run = record(store, {"text": "line\n" * 1000})
    data = store.read(run, "text.md")
    assert len(data) <= 2000
    assert b"[cut by skilltrace:" in data
    assert b"of 5,000 characters" in data


def test_the_limit_counts_bytes_not_characters():
    """A text of three-byte characters is cut at a third of the characters."""
    text = files_of({"text": "語" * 1000 + "\n"}, max_bytes=2000)["text.md"]
    assert 1500 < len(text.encode()) <= 2000


def test_bytes_over_the_limit_are_left_out_and_say_so():
    """Half a picture is no picture: a note takes its place."""
    files = files_of({"raw": b"x" * 5000}, max_bytes=2000)
    assert list(files) == ["raw.bin.txt"]
    assert "5,000 bytes" in files["raw.bin.txt"]


@pytest.mark.parametrize(
    "value",
    [
        {f"key{number}": "value" for number in range(10_000)},
        list(range(10_000)),
        [["x" * 50] * 50] * 50,
        {"text": "x" * 10_000},
        ["語" * 5000],
        {"k" * 5000: 1, "more": 2},
    ],
    ids=["mapping", "list", "nested", "text", "wide text", "key"],
)
def test_a_structure_over_the_limit_is_cut_and_says_so(value):
    """The JSON is about as large as allowed, still valid, and names the setting."""
    text = json.dumps(tree({"value": value}, max_bytes=2000), indent=2, ensure_ascii=False)
    assert len(text.encode()) < 2 * 2000 + 200
    assert "see max_artifact_bytes" in text


def test_a_deep_structure_is_cut_and_says_so(store):
    """Nesting without end costs no recursion error."""
    deep = []
    for _ in range(5000):
        deep = [deep]
    run = record(store, {"deep": deep, "score": 1})
    assert "deeper than 50 levels" in store.text(run, "deep.json")
    assert store.json(run, "result.json") == {"score": 1}


@pytest.mark.parametrize("kind", ["list", "dict", "dataclass"])
def test_a_cycle_is_cut_and_says_so(kind):
    """What contains itself says so where it would begin again."""
    if kind == "list":
        value = [1]
        value.append(value)
        assert tree(value) == [1, "[cycle: list]"]
    elif kind == "dict":
        value = {"a": 1}
        value["self"] = value
        assert tree(value) == {"a": 1, "self": "[cycle: dict]"}
    else:
        value = DataclassReport("t", {}, 1)
        value.nested["report"] = value
        assert tree(value) == {"text": "t", "nested": {"report": "[cycle: DataclassReport]"}, "score": 1}


def test_the_same_value_twice_is_no_cycle():
    """Only what is inside itself is cut; what merely stands in two places is written in both."""
    shared = {"a": 1}
    assert tree([shared, shared]) == [{"a": 1}, {"a": 1}]


def test_a_structure_that_explodes_is_cut():
    """Fifty lists, each with the one before twice, are 2^50 values when written out."""
    value = []
    for _ in range(49):
        value = [value, value]
    assert "see max_artifact_bytes" in json.dumps(tree(value, max_bytes=5000))


class Clock:
    """A clock that a test moves."""

    def __init__(self, monkeypatch):
        self.now = time.monotonic()
        monkeypatch.setattr(artifact.time, "monotonic", lambda: self.now)


class Slow(Sequence):
    """Takes a second for each item, and has no end."""

    def __init__(self, clock):
        self.clock, self.read = clock, 0

    def __len__(self):
        return 10**12

    def __getitem__(self, index):
        self.clock.now += 1
        self.read += 1
        return index


def test_a_slow_structure_is_cut_in_time_and_says_so(monkeypatch):
    """A lazy sequence that takes its time is read for two seconds."""
    slow = Slow(Clock(monkeypatch))
    made = tree({"slow": slow, "after": [1]})
    assert slow.read <= 4
    assert made["slow"][:2] == [0, 1]
    assert "it took over 2 s" in json.dumps(made)


def test_slow_objects_in_a_structure_are_cut_in_time(monkeypatch):
    """Objects whose `to_dict` takes long are read for two seconds altogether."""
    clock, read = Clock(monkeypatch), []

    class Lazy:
        def to_dict(self):
            clock.now += 1
            read.append(self)
            return {"a": 1}

    assert "it took over 2 s" in json.dumps(tree([Lazy() for _ in range(1000)]))
    assert len(read) <= 4


def test_slow_serializers_are_cut_in_time(monkeypatch):
    """The files of one result take ten seconds at most; later ones say that they are cut."""
    clock = Clock(monkeypatch)

    @artifact.register(Molecule)
    def draw(molecule):
        clock.now += 4
        return "drawn"

    files = files_of({f"m{number}": Molecule() for number in range(5)})
    assert files["m2.md"] == "drawn"
    assert "cut by skilltrace" in files["m4.txt"]


def test_a_million_values_are_written_within_the_caps():
    """A huge result costs seconds at most, not minutes."""
    begin = time.monotonic()
    files = files_of({"rows": [{"id": number, "name": "x"} for number in range(1_000_000)]})
    assert "cut by skilltrace" in json.dumps(files["rows.json"][-1])
    assert time.monotonic() - begin < 20


# --- hostile results -------------------------------------------------------------------------------------------------


def boom(*args, **kwargs):
    raise RuntimeError("boom")


class RaisingRepr:
    __repr__ = boom


class RaisingGetattr:
    __getattr__ = boom


class RaisingGetattribute:
    __getattribute__ = boom


class RaisingClass:
    __class__ = property(boom)


class LyingClass:
    """Claims to be a dict."""

    __class__ = dict


class RaisingToDict:
    to_dict = boom


class OddToDict:
    def to_dict(self):
        return 5


class RaisingMapping(Mapping):
    __getitem__ = __iter__ = __len__ = boom


class RaisingDict(dict):
    __iter__ = keys = items = __len__ = boom


class RaisingSequence(Sequence):
    __getitem__ = __len__ = boom


class RaisingStr(str):
    __slots__ = ()
    __str__ = __repr__ = __len__ = boom


class RaisingInt(int):
    __int__ = __index__ = __float__ = __str__ = __repr__ = boom


class RaisingHash:
    __hash__ = boom
    __eq__ = boom


class RaisingMeta(type):
    armed = False

    def __getattribute__(cls, name):
        return boom() if RaisingMeta.armed else super().__getattribute__(name)

    __hash__ = boom


def of_raising_class():
    value = RaisingMeta("OfRaisingMeta", (), {})()
    RaisingMeta.armed = True
    return value


class RaisingException(Exception):
    __str__ = __repr__ = boom


@dataclasses.dataclass
class UnsetField:
    a: int = dataclasses.field(init=False)


HOSTILE = {
    "repr": RaisingRepr,
    "getattr": RaisingGetattr,
    "getattribute": RaisingGetattribute,
    "class raises": RaisingClass,
    "class lies": LyingClass,
    "to_dict raises": RaisingToDict,
    "to_dict gives a number": OddToDict,
    "mapping": RaisingMapping,
    "dict": lambda: RaisingDict(a=1),
    "sequence": RaisingSequence,
    "str": lambda: RaisingStr("text"),
    "int": lambda: RaisingInt(5),
    "hash": RaisingHash,
    "metaclass": of_raising_class,
    "exception": RaisingException,
    "unset field": UnsetField,
    "MagicMock": mock.MagicMock,
    "MagicMock of dict": lambda: mock.MagicMock(spec=dict),
    "MagicMock of Prediction": lambda: mock.MagicMock(spec=prediction(a=1)),
    "AsyncMock": mock.AsyncMock,
    "lone surrogate": lambda: "\ud800",
    "mixed set": lambda: {1, "a", None, (2,), 2.5},
    "mixed keys": lambda: {1: "a", "1": "b", None: "c", (1,): "d", 1.5: "e", False: "f"},
    "huge int": lambda: 10**5000,
    "big int": lambda: [2**64, -(2**64), 2**63 - 1],
    "nan": lambda: [math.nan, math.inf, -math.inf],
    "recursive repr": lambda: dataclasses.make_dataclass("D", [("f", object)])(dataclasses.field()),
    "ellipsis": lambda: ...,
    "not implemented": lambda: NotImplemented,
    "module": lambda: os,
    "class": lambda: Opaque,
    "function": lambda: boom,
    "complex": lambda: 1 + 2j,
    "released memory": lambda: _released(),
    "fraction": lambda: fractions.Fraction(10**400),
}


def _released():
    view = memoryview(b"x")
    view.release()
    return view


@pytest.mark.parametrize("make", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_result_costs_nobody_anything(store, make, warned):
    """As a result, as a field and deep inside: the caller gets it, one warning is given, the rest is recorded."""
    value = make()

    @tracked_phase("whole")
    def whole():
        return value

    @tracked_phase("field")
    def field():
        return {"hostile": value, "nested": [{"deep": value}], "score": 0.5, "text": TEXT}

    assert whole() is value
    assert field()["hostile"] is value
    store.run("whole")
    run = store.run("field")
    assert run.info.status == "FINISHED"
    assert run.data.metrics["score"] == 0.5
    assert store.text(run, "text.md") == TEXT
    store.json(run, "nested.json")
    assert len(warned()) <= 1
    assert skilltrace.status().rejected == 0


@pytest.mark.parametrize("kind", ["dataclass", "attrs", "pydantic", "msgspec"])
def test_a_field_that_cannot_be_read_costs_itself_only(kind, warned):
    """A property that raises or a slot that was never set leaves a note among the other fields."""
    if kind == "dataclass":
        value = UnsetField()
        value.b = 1
        assert files_of(value) == {"result.json": {"a": "[unreadable UnsetField.a: AttributeError]"}}
    elif kind == "attrs":
        value = AttrsReport("t", {}, 1)
        del value.nested
        assert files_of(value)["result.json"]["score"] == 1
    elif kind == "pydantic":
        value = PydanticReport.model_construct(text="t", score=1)
        assert files_of(value)["result.json"]["text"] == "t"
    else:
        value = StructReport("t", {}, 1)
        del value.nested
        assert files_of(value)["result.json"]["score"] == 1
    assert len(warned()) == 1


def test_half_a_surrogate_pair_does_not_cost_the_run(store):
    """Text that UTF-8 cannot hold is recorded with that character replaced, in names, texts and structures."""
    run = record(store, {"text": "a\ud800\nb", "nested": {"key\udc00": ["\ud800"]}, "name\ud800": "x"})
    assert store.text(run, "text.md") == "a?\nb"
    assert store.json(run, "nested.json") == {"key?": ["?"]}


def test_numbers_that_json_cannot_hold_are_text():
    """NaN, infinities and integers over 64 bits; all readers of JSON then read the same."""
    assert tree([math.nan, math.inf, -math.inf]) == ["nan", "inf", "-inf"]
    assert tree([2**63 - 1, -(2**63), 2**63]) == [2**63 - 1, -(2**63), str(2**63)]
    assert tree(10**5000).startswith("0x")


def test_keys_that_read_the_same_are_all_kept():
    """1 and "1" are two keys: neither is lost."""
    assert tree({1: "a", "1": "b", 1.5: "c", None: "d"}) == {"1": "a", "1 (2)": "b", "1.5": "c", "None": "d"}


def test_texts_of_other_classes_become_plain_text():
    """A journal takes no subclasses of str: they are recorded as the text they are."""

    class Markup(str):
        __slots__ = ()

        def __str__(self):
            return "lies"

    files = files_of({"short": Markup("a"), "long": Markup("b\n"), "nested": [Markup("c"), {Markup("k"): 1}]})
    assert files == {"result.json": {"short": "a"}, "long.md": "b\n", "nested.json": ["c", {"k": 1}]}
    assert type(files["long.md"]) is str
    msgspec.json.encode(files)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.decimals() | st.datetimes()
    | st.uuids() | st.complex_numbers() | st.fractions() | st.builds(Opaque) | st.builds(RaisingRepr)
    | st.builds(mock.MagicMock),
    lambda children: st.lists(children)
    | st.tuples(children, children)
    | st.dictionaries(st.text() | st.integers() | st.floats() | st.none() | st.tuples(st.integers()), children)
    | st.builds(DataclassReport, children, children, children)
    | st.builds(ToDictReport, a=children),
    max_leaves=30,
)  # fmt: skip


@settings(deadline=None)
@given(value=values, size=st.sampled_from([1024, 1500, MAX]))
def test_any_value_becomes_json(value, size):
    """Whatever a result is made of, its tree is valid JSON of plain types, and no exception comes out."""
    made = JsonTree(Redactor(), size).of(value)
    msgspec.json.encode(_replaced(made))
    json.dumps(made, allow_nan=False)


@settings(deadline=None)
@given(value=values)
def test_any_value_becomes_files(value):
    """Whatever a result is, its files have different, safe names, and contents that a journal takes."""
    made = of_result(value, True, name="phase", redactor=Redactor(), max_bytes=MAX)
    paths = [file.path for file in made]
    assert len({path.casefold() for path in paths}) == len(paths)
    for file in made:
        assert safe_path(file.path) == file.path
        assert sum(content not in (None, msgspec.UNSET) for content in (file.text, file.data)) <= 1


def _replaced(value):
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, dict):
        return {_replaced(key): _replaced(item) for key, item in value.items()}
    return [_replaced(item) for item in value] if isinstance(value, list) else value


# --- paths and names -------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(path=st.text(alphabet=st.characters(codec="utf-8") | st.sampled_from("./\\:~%#?"), max_size=30))
def test_a_safe_path_stays_in_its_folder(path):
    """Whatever is accepted lies, when joined to a folder, inside of it."""
    try:
        safe = safe_path(path)
    except ArtifactError:
        return
    joined = os.path.normpath(os.path.join("/run/folder", safe))
    assert joined.startswith("/run/folder/")
    assert os.path.normpath(safe) == safe
    assert safe_path(safe) == safe


@settings(deadline=None)
@given(name=st.text(max_size=300))
def test_a_file_name_is_one_safe_name(name):
    """Any text becomes one name that a file system and MLflow take."""
    made = file_name(name)
    assert safe_path(made + ".json") == made + ".json"
    assert "/" not in made
    assert len(made.encode()) <= 120


@pytest.mark.parametrize(
    "path", ["a/./b.json", "a//b.json", " a/ b.json ", "./a/b.json", "a\\b.json", pathlib.PurePath("a/b.json")], ids=str
)
def test_a_path_is_brought_to_its_shortest_form(path):
    """Spellings of one path are that path."""
    assert safe_path(path) == "a/b.json"


@pytest.mark.parametrize("path", [None, 5, b"a", ["a"]])
def test_a_path_that_is_no_text_is_refused(path):
    """What is no path at all is said so, not raised from deep inside."""
    with pytest.raises(ArtifactError, match="must be text"):
        safe_path(path)


@pytest.mark.parametrize(
    "name", ["../../etc/hosts", "/etc/hosts", "a/b", "..", ".", "", "C:\\x", "a\0b", "a\nb", "語" * 300]
)
def test_a_field_name_never_leaves_the_run(store, name, tmp_path):
    """Any name of a field gives one file in the run's own folder."""
    run = record(store, {name: ["x"]})
    (path,) = store.files(run)
    assert "/" not in path
    assert store.json(run, path) == ["x"]


def test_fields_that_clean_to_one_name_are_all_kept(store):
    """`a/b`, `a?b` and `A_B` would be one file, on some stores: they are three."""
    run = record(store, {"a/b": [1], "a?b": [2], "A_B": [3]})
    assert {path: store.json(run, path) for path in store.files(run)} == {
        "a_b.json": [1], "a_b_2.json": [2], "A_B_3.json": [3],
    }  # fmt: skip


def test_a_field_named_result_keeps_its_own_file():
    """It does not overwrite the file of the scalars, nor is it overwritten."""
    assert files_of({"result": {"a": 1}, "score": 1}) == {"result.json": {"score": 1}, "result_2.json": {"a": 1}}


def test_fields_do_not_overwrite_skilltraces_own_files(store, lm):
    """Fields named `lm_usage` and `error` stand beside lm_usage.json and error.txt."""
    import dspy

    @tracked_phase("phase")
    def phase():
        dspy.Predict("question -> answer")(question="?")
        return {"lm_usage": {"mine": 1}, "error": Opaque()}

    phase()
    run = store.run()
    assert store.files(run) == ["error_2.txt", "lm_usage.json", "lm_usage_2.json"]
    assert store.json(run, "lm_usage_2.json") == {"mine": 1}
    assert "openai/demo" in store.json(run, "lm_usage.json")


def test_the_traceback_is_not_overwritten_by_the_result(store):
    """A block that sets a result with a field `error` and then fails has both files."""
    with pytest.raises(ValueError), tracked_phase("phase") as run:  # noqa: PT012
        run.result = {"error": Opaque()}
        raise ValueError("no")
    run = store.run()
    assert store.files(run) == ["error.txt", "error_2.txt"]
    assert "ValueError: no" in store.text(run, "error.txt")


# --- large and other files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "path"),
    [("line\n" * 100_000, "field.md"), (os.urandom(400_000), "field.bin"), ([["x" * 100] * 10] * 400, "field.json")],
    ids=["text", "bytes", "json"],
)
def test_a_large_file_arrives_whole(store, value, path):
    """Contents over 256 KiB do not stand in a line of the journal, and arrive all the same."""
    run = record(store, {"field": value})
    assert store.files(run) == [path]
    if path == "field.json":
        assert store.json(run, path) == value
    else:
        assert store.read(run, path) == (value.encode() if isinstance(value, str) else value)


@pytest.mark.parametrize("suffix", ["yaml", "yml"])
def test_log_dict_writes_yaml(store, suffix):
    """A path that ends with .yaml or .yml gets YAML, in the order of the keys."""
    import yaml

    with tracked_phase("phase") as run:
        run.log_dict({"z": [1, 2], "a": {"ü": dt.date(2025, 1, 2)}}, f"config.{suffix}")
    text = store.text(store.run(), f"config.{suffix}")
    assert yaml.safe_load(text) == {"z": [1, 2], "a": {"ü": "2025-01-02"}}
    assert text.index("z:") < text.index("a:")


def test_a_result_at_a_yaml_path_is_yaml(store):
    """`artifacts="….yaml"` likewise."""
    run = record(store, {"a": 1}, artifacts="report.yaml")
    assert store.text(run, "report.yaml") == "a: 1\n"


def test_a_logged_value_is_one_file():
    """`log_text` and `log_dict` put a value at its path, whatever it is."""
    options = {"redactor": Redactor(), "max_bytes": MAX}
    assert of_value("notes/a.txt", "text", **options).text == "text"
    assert of_value("a.json", {"b": {1}}, **options).json == {"b": [1]}
    assert of_value("a.json", None, **options).json is None
    with pytest.raises(ArtifactError):
        of_value("../a", "text", **options)
