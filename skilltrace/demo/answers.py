"""What the demo's model answers: from a prompt of DSPy's to the fields that it asks for, always the same."""

from __future__ import annotations

import ast
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

_Schema = Mapping[str, Any]
_DEEP = 3  # below this, lists are empty and what may be None is None, so that a type that contains itself ends

# DSPy ends its last message with one of these lines; it names the output fields in order, and their Python types.
_ASKS_FOR_MARKERS = "Respond with the corresponding output fields, starting with the field "
_ASKS_FOR_JSON = "Respond with a JSON object in the following order of fields: "
_ASKED_FIELD = re.compile(
    r"`(?:\[\[ ## )?(?P<name>\w+)(?: ## \]\])?`"
    r"(?: \((?:must be formatted as a valid Python )?(?P<type>.*?)\))?(?=, then |, and then |\.)"
)
# Before that, in the system message: what each field's value must look like (in JSON, so escaped, for the JSONAdapter).
_NOTE = re.compile(
    r'^(?P<json> *"\w+": ")?\{(?P<name>\w+)\} +# note: the value you produce (?P<note>.*)$', re.MULTILINE
)
# And the input fields with their values.
_SECTION = re.compile(r"^\[\[ ## (\w+) ## \]\][ \t]*\n?", re.MULTILINE)

_END = "completed"  # the field that ends an answer for the ChatAdapter

_SIMPLE_TYPES = {"str": "string", "int": "integer", "float": "number", "bool": "boolean"}


def compose(text: str, last: str, whole: Mapping[str, Any] | None) -> str:
    """Write the answer to a prompt.

    Args:
        text: All messages of the prompt, one below the other.
        last: The last message, which is the question where the prompt asks for no fields.
        whole: The JSON schema that the answer has to have, or None.

    Returns:
        The answer, in the format that the prompt asks for.
    """
    start = max(text.rfind(_ASKS_FOR_MARKERS), text.rfind(_ASKS_FOR_JSON))
    asked = _asked_fields(text, start)
    inputs = {name: value for name, value in _input_fields(text[: max(start, 0)]).items() if name not in asked}
    brief = _Brief(inputs, last)
    if whole is not None and "properties" in whole:
        return json.dumps(_write("", whole, brief, whole), ensure_ascii=False)
    values = {name: _write(name, schema, brief, schema) for name, schema in asked.items()}
    if values and text.startswith(_ASKS_FOR_MARKERS, start):
        sections = [f"[[ ## {name} ## ]]\n{_as_text(asked[name], value)}" for name, value in values.items()]
        return "\n\n".join([*sections, f"[[ ## {_END} ## ]]"])
    if values or whole is not None:
        return json.dumps(values or {"answer": _answer(brief)}, ensure_ascii=False)
    return _answer(brief)


def _asked_fields(text: str, start: int) -> dict[str, _Schema]:
    """The output fields asked for by the line at `start`, each with a JSON schema of its value."""
    if start < 0:
        return {}
    notes = {}
    for match in _NOTE.finditer(text):
        note = match["note"]
        notes[match["name"]] = json.loads('"' + note.rstrip(",")) if match["json"] else note
    line = text[start:].partition("\n")[0]
    asked = {
        match["name"]: _schema(match["type"], notes.get(match["name"], "")) for match in _ASKED_FIELD.finditer(line)
    }
    asked.pop(_END, None)
    return asked


def _schema(python_type: str | None, note: str) -> _Schema:
    """The JSON schema of a field, from its Python type's name and from the note, which has what the name lacks."""
    if python_type is None or python_type in _SIMPLE_TYPES:
        return {"type": _SIMPLE_TYPES[python_type or "str"]}
    if python_type.startswith("Literal["):
        with suppress(ValueError, SyntaxError):  # a Literal of enum members is no literal
            return {"enum": list(ast.literal_eval(f"({python_type[len('Literal[') : -1]},)"))}
    _, has_options, options = note.partition("one of: ")
    if has_options and not note.startswith("must adhere"):
        return {"enum": options.split("; ")}
    _, has_schema, schema = note.partition("JSON schema: ")
    parsed: _Schema = json.loads(schema) if has_schema else {"type": "string"}
    return parsed


def _input_fields(text: str) -> dict[str, Any]:
    """The input fields' values, lists and objects decoded. The last value wins: examples come first."""
    _, *pieces = _SECTION.split(text)
    fields: dict[str, Any] = {}
    for name, section in zip(pieces[::2], pieces[1::2], strict=True):
        value = section.strip()
        if name == _END or value.startswith(f"{{{name}}}"):  # the system message's pattern
            continue
        fields[name] = value
        if value.startswith(("[", "{")):
            with suppress(ValueError):
                fields[name] = json.loads(value)
    return fields


def _as_text(schema: _Schema, value: Any) -> str:
    """A value as DSPy reads it between markers: text as it is, all else as JSON."""
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, str) and not ({"format", "pattern"} & schema.keys()):
        return value
    return json.dumps(value, ensure_ascii=False)


# --- The answering: from a field's name and type to a value ----------------------------------------------------------


def digest(*parts: object) -> int:
    """A number that depends on nothing but its arguments (`hash` differs between processes)."""
    data = json.dumps(parts, sort_keys=True, default=str).encode()
    return int.from_bytes(hashlib.sha256(data).digest()[:12], "big")


@dataclass(frozen=True)
class _Brief:
    """What the writers know: the prompt's input fields, or the plain prompt."""

    inputs: Mapping[str, Any]
    prompt: str

    @cached_property
    def topic(self) -> str:
        """What it is all about, on one line."""
        named = [self.inputs[name] for name in ("topic", "question", "query", "task", "request") if name in self.inputs]
        texts = [value for value in (*named, *self.inputs.values(), self.prompt) if isinstance(value, str) and value]
        line = texts[0].strip().partition("\n")[0] if texts else ""
        return (line if len(line) <= 100 else line[:100].rpartition(" ")[0]).rstrip(" .?!:") or "the task"

    @cached_property
    def slug(self) -> str:
        """The topic as a file's name."""
        return "-".join(re.findall(r"[a-z0-9]+", self.topic.lower()))[:60].strip("-") or "skill"

    def text(self, name: str) -> str:
        """An input field's text, or what would be written for a field of that name."""
        value = self.inputs.get(name)
        return value if isinstance(value, str) and value else str(_WRITERS[name](self))

    def items(self, name: str) -> list[str]:
        """An input field's items, or what would be written for a field of that name."""
        value = self.inputs.get(name)
        return [str(item) for item in (value if isinstance(value, list) and value else _WRITERS[name](self))]

    def number(self, salt: str) -> int:
        """A large number that depends on the inputs."""
        return digest(salt, self.inputs, "" if self.inputs else self.prompt)

    def pick(self, salt: str, options: Sequence[Any]) -> Any:
        """One of the options: the one that an input of that name has, or the one that the topic names, or any."""
        given = str(self.inputs.get(salt, ""))
        mentioned = [option for option in options if str(option) == given] or [
            option for option in options if re.search(rf"\b{re.escape(str(option))}\b", self.topic, re.IGNORECASE)
        ]
        return mentioned[0] if mentioned else options[self.number(salt) % len(options)]


def _write(name: str, schema: _Schema, brief: _Brief, root: _Schema, depth: int = 0) -> Any:
    """A value for a field: by its name where a writer knows it, else by its type; it always adheres to the schema."""
    if "$ref" in schema:
        target: Any = root
        for step in schema["$ref"].removeprefix("#/").split("/"):
            target = target[step]
        schema = {**target, **{key: value for key, value in schema.items() if key != "$ref"}}
    for choices in (schema.get("anyOf"), schema.get("oneOf"), schema.get("allOf")):
        if choices:
            wanted = [choice for choice in choices if (choice.get("type") == "null") == (depth > _DEEP)]
            return _write(name, (wanted or choices)[0], brief, root, depth + 1)
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return "finish" if "finish" in schema["enum"] else brief.pick(name, schema["enum"])  # how a dspy.ReAct ends
    kind = schema.get("type", "string")
    if kind == "object":
        properties = schema.get("properties", {})
        return {key: _write(key, value, brief, root, depth + 1) for key, value in properties.items()}
    known = _WRITERS[name](brief) if name in _WRITERS else None
    if kind == "array":
        return _write_list(name, known, schema, brief, root, depth)
    if kind == "boolean":
        return known if isinstance(known, bool) else brief.number(name) % 2 == 0
    if kind in ("number", "integer"):
        share = known if isinstance(known, float) else (brief.number(name) % 99 + 1) / 100
        low = schema.get("minimum", schema.get("exclusiveMinimum", 0))
        high = schema.get("maximum", schema.get("exclusiveMaximum", low + (1 if kind == "number" else 100)))
        value = low + share * (high - low)
        return round(value, 4) if kind == "number" else round(value)
    if kind == "null":
        return None
    if schema.get("format") in _FORMATS:
        return _FORMATS[schema["format"]]
    if isinstance(known, list):
        known = "\n".join(f"- {item}" for item in known)
    text = known if isinstance(known, str) else f"{_words(name).capitalize() or 'Answer'}: {brief.topic}."
    return text[: schema.get("maxLength", len(text))]


def _write_list(name: str, known: Any, schema: _Schema, brief: _Brief, root: _Schema, depth: int) -> list[Any]:
    if "prefixItems" in schema:  # a tuple
        return [
            _write(f"{name}_{place}", item, brief, root, depth + 1) for place, item in enumerate(schema["prefixItems"])
        ]
    items = schema.get("items") or {"type": "string"}
    if items.get("type") == "string" and not ({"enum", "format"} & items.keys()):
        if isinstance(known, str):
            known = [line.strip("- ") for line in known.splitlines() if line.strip("- ")]
        if not isinstance(known, list):
            known = [f"{place} {_words(name)} point on {brief.topic}." for place in ("First", "Second", "Third")]
        values: list[Any] = known
    else:
        many = 0 if depth > _DEEP else max(2, schema.get("minItems", 0))
        singular = name.removesuffix("s")
        values = [_write(singular, items, brief, root, depth + 1) for _ in range(many)]
    return values[: schema.get("maxItems", len(values))]


def _words(name: str) -> str:
    return name.replace("_", " ").strip()


_FORMATS = {
    "date": "2025-01-31",
    "date-time": "2025-01-31T12:00:00Z",
    "time": "12:00:00Z",
    "duration": "PT1H",
    "uuid": "12345678-1234-4678-9234-567812345678",
    "email": "reader@example.com",
    "uri": "https://example.com/",
}


# --- The answering: what is known about some fields ------------------------------------------------------------------


def _reasoning(brief: _Brief) -> str:
    given = ", ".join(_words(name) for name in brief.inputs) or "prompt"
    return (
        f"The subject is: {brief.topic}. I have the {given} to go by. What matters is what a reader has to decide and "
        "do, in the order in which it comes up, and how to see that it was done well. The rest is left out."
    )


def _intent(brief: _Brief) -> str:
    return f"Let the reader do this without help, and know when it is done: {brief.topic}."


def _audience(brief: _Brief) -> str:
    return str(
        brief.pick(
            "audience",
            (
                "engineers who do it for the first time",
                "a team that wants to do it the same way each time",
                "reviewers who check the work of others",
                "maintainers who come back to it after months",
            ),
        )
    )


def _requirements(brief: _Brief) -> list[str]:
    every = [
        "Say when the skill applies and when it does not",
        "Give the steps in order, one action each",
        "Show one worked example from start to end",
        "Name the common mistakes and their symptoms",
        "End with a checklist that a reader can tick off",
        "List the tools and access needed before the first step",
        "State how long each step takes on a normal day",
        "Tell whom to ask when a step fails",
    ]
    start = brief.number("requirements") % len(every)
    return [every[(start + place) % len(every)] for place in range(5)]


def _outline(brief: _Brief) -> list[str]:
    middle = ["Choose an approach", "Set the scope", "Common mistakes"][: brief.number("outline") % 4]
    return ["When to use this skill", "Before you start", *middle, "Step by step", "Checklist"]


def _examples(brief: _Brief) -> list[str]:
    return [
        f"A first try: take the smallest real case of {brief.topic}, follow the steps, and note what was unclear.",
        f"A hard case: two people work on {brief.topic} at once; the scope is written down before either starts.",
        "A failure: the check at the end does not pass, the last step is undone, and its cause is written down.",
    ]


def _description(brief: _Brief) -> str:
    return f"{_title(brief)}, step by step, for {brief.text('audience')}."


def _title(brief: _Brief) -> str:
    return brief.topic[:1].upper() + brief.topic[1:]


def _tags(brief: _Brief) -> list[str]:
    words = [word for word in brief.slug.split("-") if len(word) > 3]
    return list(dict.fromkeys([*words[:4], str(brief.inputs.get("skill_type", "guide"))]))


_PARAGRAPHS = (
    "Start from the result and go back to what it needs. Write down in one sentence what this section settles.",
    "Keep it short. What a machine can check should be checked by a machine; what is left is judgement, for people.",
    "Do one thing at a time and look at the outcome before going on. A step that cannot be looked at is two steps.",
    "Ask what would show that this is wrong, and look for that first. It costs minutes here and days later.",
    "Write for a reader who has never seen it: name each file, each command and each person, and no more than that.",
)
_CHECKS = (
    "Check: a second person who has only this section comes to the same result.",
    "Check: the outcome can be shown in one screen, and it is linked here.",
    "Check: undo it once, on purpose, and see that nothing else has changed.",
)


def _skill_content(brief: _Brief) -> str:
    """A whole SKILL.md, from what the earlier steps found out."""
    requirements, start = brief.items("requirements"), brief.number("skill_content")
    # A JSON string is a YAML string too, whatever stands in it.
    lines = ["---", f"name: {brief.slug}", f"description: {json.dumps(_description(brief))}", "---", ""]
    lines += [f"# {_title(brief)}", "", brief.text("intent"), ""]
    for place, heading in enumerate(brief.items("outline")):
        lines += [f"## {heading}", "", _PARAGRAPHS[(start + place) % len(_PARAGRAPHS)], ""]
        if place < len(requirements):
            lines += [f"- {requirements[place]}.", f"- {_CHECKS[(start + place) % len(_CHECKS)]}", ""]
    lines += ["## Examples", "", *(f"- {example}" for example in brief.items("examples")), ""]
    lines += ["```text", f"$ skill run {brief.slug} --dry-run", "all checks passed", "```"]
    return "\n".join(lines)


def _review(brief: _Brief) -> tuple[float, list[str]]:
    """Judge the longest text among the inputs: its score from 0 to 1 and what is wrong with it."""
    text = max((value for value in brief.inputs.values() if isinstance(value, str)), key=len, default="")
    words, known = len(text.split()), set(re.findall(r"\w+", text.lower()))
    sections = len(re.findall(r"^## ", text, re.MULTILINE))
    requirements = brief.items("requirements")
    open_ones = [item for item in requirements if not _significant(item) <= known]
    checks = {
        "The front matter lacks a name or a description.": {"name", "description"} <= known and text.startswith("---"),
        f"It has {sections} sections; a skill of this kind needs four or more.": min(1.0, sections / 4),
        f"It has {words} words; 500 would leave room for detail.": min(1.0, words / 500),
        "It shows no example as code.": "```" in text,
        f"Not addressed: {'; '.join(open_ones)}.": 1 - len(open_ones) / len(requirements),
        "It has no links to further reading.": min(1.0, 0.5 + text.count("](") / 2),
    }
    score = round(sum(float(share) for share in checks.values()) / len(checks), 2)
    return score, [issue for issue, share in checks.items() if share < 1]


def _significant(sentence: str) -> set[str]:
    return {word for word in re.findall(r"\w+", sentence.lower()) if len(word) > 3}


def _answer(brief: _Brief) -> str:
    return f"In short, on {brief.topic}: begin with the smallest case that is real, check it, and build on that."


_WRITERS: Mapping[str, Callable[[_Brief], Any]] = {
    "reasoning": _reasoning,
    "rationale": _reasoning,
    "answer": _answer,
    "intent": _intent,
    "audience": _audience,
    "requirements": _requirements,
    "outline": _outline,
    "examples": _examples,
    "skill_content": _skill_content,
    "content": _skill_content,
    "name": lambda brief: brief.slug,
    "title": _title,
    "description": _description,
    "summary": _description,
    "tags": _tags,
    "version": lambda _: "1.0.0",
    "issues": lambda brief: _review(brief)[1],
    "score": lambda brief: _review(brief)[0],
    "quality_score": lambda brief: _review(brief)[0],
    "passed": lambda brief: _review(brief)[0] >= 0.7,
}
