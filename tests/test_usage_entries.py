"""`usage.read_entry` on every shape that an entry of DSPy's history has, from 3.1.2 to 3.4.1."""

import math
from collections.abc import Mapping
from types import SimpleNamespace

import pytest

from skilltrace.usage import LMCall, LMUsage, Meter, read_entry

CHAT = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
RESPONSES = {"input_tokens": 10, "output_tokens": 5, "total_tokens": 15}


def entry(usage, response=None, **more):
    return {"model": "openai/demo", "usage": usage, "response": response, "cost": None, **more}


def tokens(call):
    return call.tokens_input, call.tokens_output, call.tokens_total


class Details:
    """A detail object as LiteLLM's pydantic models are: attributes, and no mapping."""

    def __init__(self, **values):
        self.__dict__.update(values)


# --- tokens ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("usage", [CHAT, RESPONSES])
def test_both_families_of_keys_are_read(usage):
    """`prompt_tokens` and `completion_tokens`, or `input_tokens` and `output_tokens` of the Responses API."""
    assert tokens(read_entry(entry(usage))) == (10, 5, 15)


def test_a_missing_total_is_the_sum():
    """Some providers give no `total_tokens`."""
    assert tokens(read_entry(entry({"prompt_tokens": 10, "completion_tokens": 5}))) == (10, 5, 15)


def test_the_total_is_the_providers():
    """A total that is more than the sum (hidden tokens) is what was billed."""
    assert tokens(read_entry(entry({**CHAT, "total_tokens": 40}))) == (10, 5, 40)


@pytest.mark.parametrize(
    "usage", [0, None, {}, {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}, "", []]
)
def test_a_usage_without_tokens_is_none(usage):
    """`DummyLM` of DSPy 3.1.2 gives `usage=0`, a silent provider zeros or nothing: no tokens, and no cached call."""
    call = read_entry(entry(usage, response=SimpleNamespace(usage=usage)))
    assert tokens(call) == (0, 0, 0)
    assert not call.cached


@pytest.mark.parametrize("value", [None, "many", math.nan, math.inf, True, [1], -math.inf])
def test_a_count_that_is_no_number_is_zero(value):
    """Whatever stands where a number should be, the other counts are read."""
    assert tokens(read_entry(entry({"prompt_tokens": value, "completion_tokens": 5}))) == (0, 5, 5)


def test_the_first_key_that_is_there_counts():
    """A usage that has both families (LiteLLM's for Responses) is not counted twice."""
    assert tokens(read_entry(entry({**RESPONSES, **CHAT}))) == (10, 5, 15)


@pytest.mark.parametrize("make", [dict, Details])
@pytest.mark.parametrize("family", ["chat", "responses"])
def test_details_are_read_from_objects_and_from_mappings(make, family):
    """Reasoning and cached tokens: pydantic objects before DSPy 3.4, mappings since."""
    output, prompt = ("completion_tokens", "prompt_tokens") if family == "chat" else ("output_tokens", "input_tokens")
    usage = {
        **(CHAT if family == "chat" else RESPONSES),
        f"{output}_details": make(reasoning_tokens=3),
        f"{prompt}_details": make(cached_tokens=4),
    }
    call = read_entry(entry(usage))
    assert (call.tokens_reasoning, call.tokens_cached) == (3, 4)


@pytest.mark.parametrize("details", [None, {}, {"reasoning_tokens": None}, Details(), "none"])
def test_missing_details_are_zero(details):
    """Providers without details give None, an empty object, or None inside it."""
    call = read_entry(entry({**CHAT, "completion_tokens_details": details, "prompt_tokens_details": details}))
    assert (call.tokens_reasoning, call.tokens_cached) == (0, 0)


def test_a_usage_object_is_read_like_a_mapping():
    """A usage that is an object with attributes."""
    assert tokens(read_entry(entry(Details(**CHAT)))) == (10, 5, 15)


def test_an_entry_may_be_any_mapping():
    """DSPy 3.3's experimental `LMHistoryEntry` is a Mapping that is no dict."""

    class Entry(Mapping):
        def __init__(self, values):
            self.values_ = values

        def __getitem__(self, key):
            return self.values_[key]

        def __iter__(self):
            return iter(self.values_)

        def __len__(self):
            return len(self.values_)

    assert tokens(read_entry(Entry(entry(CHAT)))) == (10, 5, 15)


@pytest.mark.parametrize(("given", "name"), [({"model": "a/b"}, "a/b"), ({"model": None}, "unknown"), ({}, "unknown")])
def test_the_model_is_the_entrys(given, name):
    """By DSPy's name of it; an entry without one is of an unknown model."""
    assert read_entry({"usage": CHAT, **given}).model == name


# --- the cache -------------------------------------------------------------------------------------------------------


def test_a_flag_says_that_the_cache_answered():
    """Up to DSPy 3.3.1 a cached response has `cache_hit=True`; its original's cost and tokens are not billed again."""
    call = read_entry(entry(CHAT, response=SimpleNamespace(cache_hit=True, usage=CHAT), cost=0.5))
    assert call == LMCall("openai/demo", cached=True, cost=0.0)


def test_an_emptied_usage_says_that_the_cache_answered():
    """DSPy 3.4.1 sets no flag: the entry's usage is empty while the response still has the original's."""
    call = read_entry(entry({}, response=SimpleNamespace(usage=Details(**CHAT)), cost=0.5))
    assert call == LMCall("openai/demo", cached=True, cost=0.0)


@pytest.mark.parametrize("kind", [tuple, list])
def test_several_responses_are_cached_if_one_says_so(kind):
    """With n=3 DSPy 3.4.1 keeps a tuple of responses."""
    responses = kind([SimpleNamespace(usage={}), SimpleNamespace(usage=RESPONSES)])
    assert read_entry(entry({}, response=responses)).cached


def test_several_fresh_responses_are_not_cached():
    """A tuple of responses with a usage of their own is a billed call."""
    responses = (SimpleNamespace(usage=CHAT), SimpleNamespace(usage=CHAT))
    call = read_entry(entry({"prompt_tokens": 20, "completion_tokens": 10, "total_tokens": 30}, response=responses))
    assert not call.cached
    assert tokens(call) == (20, 10, 30)


@pytest.mark.parametrize("flag", [False, None, "no"])
def test_a_flag_that_is_not_true_says_nothing(flag):
    """A fresh response may carry the flag with another value."""
    assert not read_entry(entry(CHAT, response=SimpleNamespace(cache_hit=flag, usage=CHAT))).cached


def test_a_response_may_be_a_mapping():
    """The flag and the usage of a response that is a dict."""
    assert read_entry(entry({}, response={"cache_hit": True})).cached
    assert read_entry(entry({}, response={"usage": CHAT})).cached
    assert not read_entry(entry(CHAT, response={"usage": CHAT})).cached


# --- cost ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cost", "known"), [(0.25, 0.25), (0, 0.0), (2, 2.0), (None, None), ("free", None)])
def test_a_cost_is_a_number_or_unknown(cost, known):
    """USD as DSPy says; no number is no price."""
    assert read_entry(entry(CHAT, cost=cost)).cost == known


@pytest.mark.parametrize("cost", [math.nan, math.inf, -math.inf])
def test_a_cost_that_is_not_finite_is_unknown(cost):
    """One NaN would spoil the whole sum."""
    assert read_entry(entry(CHAT, cost=cost)).cost is None


# --- the sums --------------------------------------------------------------------------------------------------------


def test_a_meter_adds_up_by_model():
    """Each call counts in the whole and in its model's part."""
    meter = Meter()
    meter.add(LMCall("a", 1.0, tokens_input=10, tokens_output=2, tokens_total=12, cost=0.5), {})
    meter.add(LMCall("b", 0.5, failed=True), {})
    meter.add(LMCall("a", 0.0, cached=True, cost=0.0), {})
    usage = meter.usage
    assert (usage.calls, usage.calls_cached, usage.calls_failed) == (3, 1, 1)
    assert (usage.tokens_total, usage.duration, usage.cost) == (12, 1.5, 0.5)
    assert {name: part.calls for name, part in usage.by_model.items()} == {"a": 2, "b": 1}


def test_a_meter_keeps_the_settings_in_order_and_once():
    """The values of `lm.…` are those used, in the order of first use; None is no value."""
    meter = Meter()
    for temperature in (0.7, None, 0.1, 0.7):
        meter.add(LMCall("a"), {"lm.model": "a", "lm.temperature": temperature})
    assert meter.settings == {"lm.model": ["a"], "lm.temperature": ["0.7", "0.1"]}


def test_a_closed_meter_counts_what_comes_late_apart():
    """Figures that are written do not change any more."""
    meter = Meter()
    meter.add(LMCall("a"), {})
    usage = meter.close()
    assert not meter.add(LMCall("a"), {"lm.model": "a"})
    assert (usage.calls, meter.settings) == (1, {})


def test_the_metrics_have_a_cost_only_where_it_is_known():
    """Zero would be a claim."""
    assert "lm_cost" not in LMUsage(calls=1).metrics()
    assert LMUsage(calls=1, cost=0.0).metrics()["lm_cost"] == 0.0
