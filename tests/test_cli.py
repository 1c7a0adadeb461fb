"""The command line, as a user runs it."""

import json
import logging
import os
import re
import subprocess
import sys

import pytest
from click.testing import CliRunner

import skilltrace
from skilltrace import autolog, spool, tracked_phase
from skilltrace.cli import main


@pytest.fixture
def run():
    """Run a command in this process."""

    def invoke(*arguments, code=0):
        done = CliRunner().invoke(main, arguments)
        assert done.exit_code == code, done.output
        return done.output if code == 2 else done.stdout

    yield invoke
    logging.disable(logging.NOTSET)  # the command quietens the process


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo, run once as a user runs it, in an empty folder."""
    folder = tmp_path_factory.mktemp("demo")
    done = subprocess.run(
        [sys.executable, "-m", "skilltrace", "demo", "--svg", "tree.svg"], capture_output=True, text=True, cwd=folder,
        env={**os.environ, "SKILLTRACE_SPOOL_DIR": str(folder / "spool")}, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder, done


def test_the_demo_prints_its_run_tree(demo):
    """A job, its three phases with figures, and the command that opens the UI; nothing on stderr."""
    folder, done = demo
    lines = done.stdout.splitlines()
    figures = r"FINISHED +\d+\.\d s +{calls} LM calls +[\d,]+ tokens"
    assert re.fullmatch(rf"skill_creation_job_[0-9a-f]{{12}} +{figures.format(calls=8)} +\$0\.\d{{4}}.*", lines[0])
    assert re.fullmatch(rf"├── understanding +{figures.format(calls=3)} *", lines[1])
    assert re.fullmatch(rf"├── generation +{figures.format(calls=3)} *", lines[2])
    assert re.fullmatch(rf"└── validation +{figures.format(calls=2)} +.*quality_score 0\.\d+.*", lines[3])
    assert any("ui --port 5001 --backend-store-uri sqlite:///" in line for line in lines)
    assert done.stderr == ""
    assert (folder / "mlflow.db").exists()
    assert "skill_creation" in (folder / "tree.svg").read_text()
    assert spool.journals(folder / "spool") == []


def test_the_demos_runs_carry_what_the_design_names(demo):
    """Read back through `mlflow.MlflowClient`: tags, params, metrics, artifacts, parents and linked traces."""
    from mlflow import MlflowClient

    folder, _ = demo
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("skill-creation")
    runs = {run.data.tags.get("phase", "job"): run for run in client.search_runs([experiment.experiment_id])}
    assert sorted(runs) == ["generation", "job", "understanding", "validation"]
    job = runs["job"]
    for phase, run in runs.items():
        assert run.info.status == "FINISHED"
        assert run.data.tags["job_id"] == job.data.tags["job_id"]
        assert run.data.tags["user_id"] == "demo"
        assert run.data.tags["skill_type"] == "guide"
        assert run.data.tags["service"] == "SkillService"
        assert run.data.tags["model"] == "openai/gpt-4o-mini"
        assert run.data.params["lm.model"] == "openai/gpt-4o-mini"
        assert (
            run.data.metrics["lm_tokens_total"]
            == run.data.metrics["lm_tokens_input"] + run.data.metrics["lm_tokens_output"]
        )
        assert run.data.metrics["lm_duration"] > 0
        assert run.data.metrics["lm_cost"] > 0
        if phase != "job":
            assert run.data.tags["mlflow.parentRunId"] == job.info.run_id
    phases = [run for phase, run in runs.items() if phase != "job"]
    for name in ("lm_calls", "lm_tokens_total"):
        assert job.data.metrics[name] == sum(run.data.metrics[name] for run in phases)
    assert job.data.metrics["lm_calls"] == 8
    assert runs["validation"].data.metrics["quality_score"] > 0
    names = {file.path for file in client.list_artifacts(job.info.run_id)}
    assert names == {
        "skill_content.md", "metadata.json", "validation_report.json", "conversation_history.json", "lm_usage.json",
    }  # fmt: skip
    for phase in ("understanding", "generation", "validation"):
        assert client.search_traces(locations=[experiment.experiment_id], run_id=runs[phase].info.run_id), phase


def test_the_demo_of_another_topic(run, store, monkeypatch):
    """`--topic` is what the skill is about; the store is the one that the environment names."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.uri)
    try:
        output = run("demo", "--topic", "Pandas groupby")
    finally:
        autolog.disable()
    assert "└── validation" in output
    assert store.uri in output
    experiment = store.client.get_experiment_by_name("skill-creation")
    job = store.client.search_runs([experiment.experiment_id], "tags.`skilltrace.kind` = 'job'", max_results=1)[0]
    assert "Pandas groupby" in store.text(job, "skill_content.md")


def test_sync_and_status_of_nothing(run, tmp_path):
    """Both say so, and succeed."""
    output = run("status", "--spool-dir", str(tmp_path / "none"))
    assert re.search(r"pending runs +0", output)
    assert run("sync", "--spool-dir", str(tmp_path / "none")) == "0 delivered, 0 of running processes, 0 left\n"


def test_status_and_sync_of_what_was_left(run, store, python, tmp_path):
    """What a process recorded and did not deliver is counted, then delivered."""
    python(
        "import skilltrace\n"
        f"skilltrace.configure({store.experiment!r}, tracking_uri={store.uri!r}, autolog=False, delivery='external')\n"
        "with skilltrace.tracked_phase('left'): pass\n"
    )
    status = json.loads(run("status", "--json"))
    assert (status["pending_runs"], status["journals"], status["rejected"]) == (1, 1, 0)
    assert status["oldest"].startswith("20")
    assert status["spool"] == str(tmp_path / "spool")
    assert run("sync").startswith("1 delivered, 0 of running processes, 0 left")
    assert json.loads(run("status", "--json"))["journals"] == 0
    assert store.run().info.run_name == "left"


def test_sync_while_mlflow_is_down(run, python, tmp_path):
    """What is left is said with the reason, and the exit status is 1."""
    python(
        "import skilltrace\n"
        "skilltrace.configure('x', tracking_uri='http://127.0.0.1:9', autolog=False, delivery='external')\n"
        "with skilltrace.tracked_phase('left'): pass\n"
    )
    report = json.loads(run("sync", "--json", code=1))
    assert (report["delivered"], report["left"]) == (0, 1)
    assert "127.0.0.1" in report["error"]
    assert json.loads(run("status", "--json"))["pending_runs"] == 1


def test_status_shows_what_was_refused(run, store):
    """The number of lines, and the file."""
    experiment_id = store.client.create_experiment(f"{store.experiment}-deleted")
    store.client.delete_experiment(experiment_id)
    with skilltrace.tracked_job("refused", experiment=f"{store.experiment}-deleted"):
        pass
    assert skilltrace.flush(30)
    output = run("status")
    assert re.search(r"rejected +[1-9]", output)
    assert "rejected/" in output


def test_bad_arguments_end_with_status_2(run):
    """And a short message."""
    assert "No such command" in run("fly", code=2)
    assert "No such option" in run("sync", "--fast", code=2)


def test_help_and_version(run):
    """Each command says what it does; the version is the package's."""
    output = run("--help")
    assert all(name in output for name in ("demo", "sync", "status"))
    for name in ("demo", "sync", "status"):
        assert len(run(name, "--help").splitlines()) > 5
    assert re.search(r"\d+\.\d+\.\d+", run("--version"))


def test_a_library_call_prints_nothing(store, capfd):
    """Messages go through logging alone."""

    @tracked_phase
    def work():
        return 1

    work()
    assert skilltrace.flush(30)
    assert capfd.readouterr().out == ""
