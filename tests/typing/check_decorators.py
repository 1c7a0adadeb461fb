"""Checked by mypy and pyright, not run: what is decorated keeps its static type."""

from collections.abc import AsyncIterator, Callable, Iterator

from typing_extensions import assert_type

import skilltrace
from skilltrace import LMUsage, Run, Settings, current_run, tracked_job, tracked_phase


@tracked_phase
def bare(x: int, *, flag: bool = False) -> str:
    return str(x) + str(flag)


@tracked_job("job_{job_id}", tags={"skill_type": "{x}"}, metrics={"score": lambda result: 1.0}, artifacts="a.json")
def with_options(job_id: str, x: int) -> list[int]:
    return [x]


@tracked_phase("async")
async def coroutine(x: int) -> bytes:
    return bytes(x)


@tracked_phase
def generator(n: int) -> Iterator[int]:
    yield n


@tracked_phase("agen", params=["n"], metrics=False)
async def async_generator(n: int) -> AsyncIterator[int]:
    yield n


class Service:
    @tracked_job
    def method(self, x: int) -> str:
        return str(x)

    @tracked_phase("class")
    @classmethod
    def class_method(cls, x: int) -> str:
        return str(x)

    @staticmethod
    @tracked_phase
    def static_method(x: int) -> str:
        return str(x)


@tracked_phase("class")
class Module:
    def __call__(self, question: str) -> str:
        return question


assert_type(bare(1, flag=True), str)
assert_type(with_options("a", x=1), list[int])


async def use_coroutine() -> None:
    assert_type(await coroutine(1), bytes)
    async for item in async_generator(1):
        assert_type(item, int)


assert_type(generator(1), Iterator[int])
assert_type(async_generator(1), AsyncIterator[int])
assert_type(Service().method(1), str)
assert_type(Service.class_method(1), str)
assert_type(Service.static_method(1), str)
assert_type(Module(), Module)
assert_type(Module()(question="a"), str)
as_callable: Callable[[str, int], list[int]] = with_options
bare("a")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # a wrong argument is still seen

with tracked_phase("validation", metrics={"quality_score": "score"}) as run:
    assert_type(run, Run)
    run.result = 1
    assert_type(run.usage, LMUsage)
    assert_type(run.job, Run | None)

assert_type(current_run(), Run | None)
assert_type(skilltrace.configure("x", autolog=False), Settings)
assert_type(skilltrace.flush(1.0), bool)
assert_type(skilltrace.log_metric("a", 1), None)
skilltrace.log_metric("a", value="x")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # not a number
