"""Frameworks that look at functions: they see the function that was decorated."""

import click
import pytest
from click.testing import CliRunner

from skilltrace import tracked_job, tracked_phase

fastapi = pytest.importorskip("fastapi")  # comes with MLflow's server
from fastapi.testclient import TestClient  # noqa: E402


def test_fastapi_routes_and_dependencies(store):
    """Path, query and body parameters, dependencies and response models work; each request is a run."""
    app = fastapi.FastAPI()

    @tracked_phase("who")
    def who(user_id: str = "ada") -> str:
        return user_id

    @app.get("/sync/{job_id}")
    @tracked_job("sync_{job_id}")
    def sync_route(job_id: str, n: int, user: str = fastapi.Depends(who)) -> dict[str, int]:
        return {"n": n + len(user)}

    @app.get("/async/{job_id}")
    @tracked_job("async_{job_id}")
    async def async_route(job_id: str, n: int) -> dict[str, int]:
        return {"n": n}

    client = TestClient(app)
    assert client.get("/sync/job_1", params={"n": 2}).json() == {"n": 5}
    assert client.get("/async/job_2", params={"n": 2}).json() == {"n": 2}
    assert client.get("/sync/job_3").status_code == 422
    names = {run.info.run_name: run for run in store.runs()}
    assert sorted(names) == ["async_job_2", "sync_job_1", "who"]
    assert names["sync_job_1"].data.metrics["n"] == 5
    parameters = {parameter["name"] for parameter in app.openapi()["paths"]["/sync/{job_id}"]["get"]["parameters"]}
    assert parameters == {"job_id", "n", "user_id"}


def test_click_commands(store):
    """A command's callback may be tracked."""

    @click.command()
    @click.option("--n", type=int)
    @tracked_job("command")
    def command(n):
        click.echo(n)

    assert CliRunner().invoke(command, ["--n", "3"]).output == "3\n"
    assert store.run().data.params["n"] == "3"


@pytest.fixture
@tracked_phase("fixture")
def tracked_fixture(tmp_path):
    return tmp_path.name


@tracked_phase("test")
def test_pytest_fixtures_and_tests(store, tracked_fixture, tmp_path):
    """Pytest fills in the arguments of tracked fixtures and tests."""
    assert tracked_fixture == tmp_path.name
