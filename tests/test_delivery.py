"""From journal to MLflow: exactly once, nothing lost, and never in the caller's way."""

import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
import uuid

import pytest
from conftest import MlflowServer, Tracking, new_experiment

import skilltrace
from skilltrace import delivery, journal, spool, tracked_job, tracked_phase

PROGRAM = """
import os, sys, threading
import skilltrace
from skilltrace import tracked_job, tracked_phase

skilltrace.configure({experiment!r}, tracking_uri={uri!r}, artifact_location={artifacts!r}, autolog=False,
                     delivery={delivery!r}, flush_timeout={flush_timeout})

@tracked_phase("phase_{{n}}")
def phase(n):
    skilltrace.log_metric("n", n, step=n)
    return {{"text": "one\\ntwo", "score": n}}

@tracked_job("job_{{job_id}}")
def job(job_id, phases):
    for n in range(phases):
        phase(n)
    {inside}

job("job_1", 3)
{after}
"""


def program(store, *, delivery="external", inside="pass", after="", flush_timeout=10.0):
    return PROGRAM.format(
        experiment=store.experiment, uri=store.uri, artifacts=store.artifacts, delivery=delivery, inside=inside,
        after=after, flush_timeout=flush_timeout,
    )  # fmt: skip


def spool_of(tmp_path):
    return tmp_path / "spool"


def journals(tmp_path):
    return spool.journals(spool_of(tmp_path))


def points_by_run(store):
    """How often each metric point of each run stands in MLflow."""
    counted = {}
    for run in store.runs(flush=False):
        for name in run.data.metrics:
            points = store.client.get_metric_history(run.info.run_id, name)
            counted[run.info.run_name, name] = len(points)
    return counted


def assert_delivered_once(store):
    """The program's four runs, each once and whole."""
    runs = {run.info.run_name: run for run in store.runs(flush=False)}
    assert sorted(runs) == ["job_job_1", "phase_0", "phase_1", "phase_2"]
    assert len(store.runs(flush=False)) == 4
    assert set(points_by_run(store).values()) == {1}
    for n in range(3):
        run = runs[f"phase_{n}"]
        assert store.parent(run) == runs["job_job_1"].info.run_id
        assert run.info.status == "FINISHED"
        assert run.data.params == {"n": str(n)}
        assert run.data.metrics["score"] == n
        assert store.text(run, "text.md") == "one\ntwo"
    return runs


# --- exactly once ----------------------------------------------------------------------------------------------------


def test_a_journal_delivered_twice_changes_nothing(any_store, python, tmp_path):
    """Runs, metric points, params, tags and artifacts stand in MLflow once, also when the whole journal comes again."""
    python(program(any_store))
    (folder,) = journals(tmp_path)
    shutil.copytree(folder, tmp_path / "copy")
    assert delivery.sync(spool_of(tmp_path)).delivered == 1
    assert_delivered_once(any_store)
    assert not folder.exists()
    shutil.copytree(tmp_path / "copy", folder)
    assert delivery.sync(spool_of(tmp_path)).delivered == 1
    assert_delivered_once(any_store)


def test_several_deliverers_at_once_share_the_work(store, python, tmp_path):
    """`sync` in several processes over the same leftovers: each journal is delivered by one of them."""
    for _ in range(3):
        python(program(store).replace("job_1", f"job_{uuid.uuid4().hex}"))
    command = [sys.executable, "-m", "skilltrace", "sync", "--spool-dir", str(spool_of(tmp_path)), "--json"]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, cwd=tmp_path) for _ in range(3)]
    reports = [json.loads(process.communicate(timeout=120)[0]) for process in running]
    assert sum(report["delivered"] for report in reports) == 3
    assert all(report["left"] == 0 for report in reports)
    assert len(store.runs(flush=False)) == 12
    assert set(points_by_run(store).values()) == {1}
    assert journals(tmp_path) == []


def test_three_requests_for_a_run_without_artifacts(mlflow_server):
    """Create, one batch, terminate; the experiment is asked for once."""
    store = Tracking(mlflow_server.uri, new_experiment())
    store.configure()
    with tracked_phase("first"):
        pass
    assert skilltrace.flush(30)
    from mlflow.utils import rest_utils

    seen, original = [], rest_utils._get_http_response_with_retries

    def counting(method, url, *args, **kwargs):
        seen.append((method, url.rpartition("/")[2]))
        return original(method, url, *args, **kwargs)

    rest_utils._get_http_response_with_retries = counting
    try:
        with tracked_phase("second", params=False) as run:
            run.log_metric("a", 1)
        assert skilltrace.flush(30)
    finally:
        rest_utils._get_http_response_with_retries = original
    assert [call for call in seen if call[1] != "search"] == [
        ("POST", "create"),
        ("POST", "log-batch"),
        ("POST", "update"),
    ]


# --- nothing lost ----------------------------------------------------------------------------------------------------


def killed(code, tmp_path):
    """Run a program until it says that it is ready, then kill -9."""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=tmp_path)
    assert process.stdout.readline() == b"ready\n"
    process.kill()
    process.wait()
    process.stdout.close()


READY = 'print("ready", flush=True); threading.Event().wait()'


@pytest.mark.parametrize("how", ["external", "thread"])
def test_kill_9_in_the_middle_of_a_job(any_store, tmp_path, how):
    """Each recorded run is delivered once by `sync`; the open job ends as KILLED, at the last sign of life."""
    killed(program(any_store, delivery=how, inside=READY), tmp_path)
    (folder,) = journals(tmp_path)
    last = max(json.loads(line)["ns"] for line in (folder / "journal.jsonl").read_bytes().splitlines())
    report = delivery.sync(spool_of(tmp_path))
    assert (report.delivered, report.left) == (1, 0)
    runs = assert_delivered_once(any_store)
    job = runs["job_job_1"]
    assert job.info.status == "KILLED"
    assert job.data.tags["skilltrace.recovered"] == "true"
    assert job.info.end_time == last // 1_000_000
    assert "skilltrace.recovered" not in runs["phase_0"].data.tags
    assert journals(tmp_path) == []


def test_the_next_process_delivers_what_a_dead_one_left(store, python, tmp_path):
    """No command is needed: any process that records with the same spool does it."""
    killed(program(store, inside=READY), tmp_path)
    with tracked_phase("next"):
        pass
    assert skilltrace.shutdown(60)
    names = sorted(run.info.run_name for run in store.runs(flush=False))
    assert names == ["job_job_1", "next", "phase_0", "phase_1", "phase_2"]
    assert journals(tmp_path) == []


def test_a_line_that_was_cut_costs_only_itself(store, python, tmp_path, caplog):
    """A process that dies in the middle of a write leaves part of a line: all before it is delivered."""
    python(program(store))
    (folder,) = journals(tmp_path)
    lines = (folder / "journal.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "journal.jsonl").write_bytes(b"".join(lines[:-1]) + lines[-1][:20])
    assert delivery.sync(spool_of(tmp_path)).delivered == 1
    runs = assert_delivered_once(store)
    assert runs["job_job_1"].info.status == "KILLED"
    assert "in the middle of a line" in caplog.text


def test_a_line_that_is_no_record_is_set_aside(store, python, tmp_path, caplog):
    """Garbage in a journal is kept in the rejected file and named in the log; the rest is delivered."""
    python(program(store))
    (folder,) = journals(tmp_path)
    lines = (folder / "journal.jsonl").read_bytes().splitlines(keepends=True)
    lines[2:2] = [b"\x00\xff garbage\n", b'{"type":"unknown"}\n', b'{"type":"end","key":7}\n']
    (folder / "journal.jsonl").write_bytes(b"".join(lines))
    assert delivery.sync(spool_of(tmp_path)).delivered == 1
    assert_delivered_once(store)
    assert delivery.status(spool_of(tmp_path)).rejected == 3
    assert "is no record" in caplog.text


@pytest.mark.parametrize("content", [b"", b"{", b'{"offset": "far"}', b'{"offset": 10}'])
def test_a_broken_cursor_means_delivering_again(store, python, tmp_path, content):
    """From the start where it cannot be read, from the next whole line where it points into one."""
    python(program(store))
    (folder,) = journals(tmp_path)
    (folder / "cursor.json").write_bytes(content)
    assert delivery.sync(spool_of(tmp_path)).delivered == 1
    assert_delivered_once(store)


def test_a_run_that_mlflow_refuses_is_kept_and_the_rest_goes_on(store):
    """A job in a deleted experiment: set aside with the reason, shown by status(), blocking nothing."""
    experiment_id = store.client.create_experiment(f"{store.experiment}-deleted")
    store.client.delete_experiment(experiment_id)
    with tracked_job("refused", experiment=f"{store.experiment}-deleted") as run:
        run.log_metric("a", 1)
        run.log_text("precious", "notes.txt")
    with tracked_phase("fine"):
        pass
    assert store.run().info.run_name == "fine"
    status = skilltrace.status()
    assert status.rejected >= 1
    kept = b"".join(path.read_bytes() for path in spool.rejected_files(status.spool)).decode()
    assert "is deleted" in kept
    assert "precious" in kept


def test_one_value_that_mlflow_refuses_does_not_cost_the_batch(store):
    """A param that another client has set differently: the metrics, tags and other params of the batch arrive."""
    with tracked_phase("a") as run:
        store.client.log_param(run.run_id, "lr", "taken")
        run.log_params({"lr": 1, "depth": 2})
        run.log_metric("score", 1)
        run.set_tag("stage", "x")
    stored = store.run()
    assert stored.data.params == {"lr": "taken", "depth": "2"}
    assert stored.data.metrics["score"] == 1
    assert stored.data.tags["stage"] == "x"
    assert stored.info.status == "FINISHED"
    assert skilltrace.status().rejected == 1


# --- never in the way ------------------------------------------------------------------------------------------------


def test_a_server_that_comes_up_later_gets_all(tmp_path, caplog):
    """Down: calls go on, status() says why, one line is logged. Up: everything arrives with its recorded times."""
    server = MlflowServer(tmp_path)
    try:
        store = Tracking(server.uri, new_experiment())
        store.configure()
        os.killpg(server.process.pid, signal.SIGSTOP)  # it listens to nothing yet: connections are refused

        @tracked_phase
        def work(n):
            return {"n": n}

        assert [work(n)["n"] for n in range(3)] == [0, 1, 2]
        worker = journal.of(skilltrace.config.current()).worker
        assert not worker.flush(time.monotonic() + 60, attempts=1)
        status = skilltrace.status()
        assert status.pending_runs == 3
        assert status.oldest is not None
        assert "127.0.0.1" in status.last_error
        os.killpg(server.process.pid, signal.SIGCONT)
        server.wait()
        assert skilltrace.flush(120)
        runs = store.runs()
        assert sorted(run.data.params["n"] for run in runs) == ["0", "1", "2"]
        assert all(run.info.start_time / 1000 <= status.oldest.timestamp() + 5 for run in runs)
        assert caplog.text.count("MLflow cannot be reached") == 1
        assert caplog.text.count("MLflow answers again") == 1
        assert skilltrace.status().last_error is None
    finally:
        server.stop()


def test_mlflow_has_not_answered_before_it_was_asked():
    """A journal that holds no run yet is read without MLflow, which may well be down."""
    told = []
    delivery.on_available.append(lambda: told.append(1) or True)
    try:
        skilltrace.configure("x", tracking_uri="http://127.0.0.1:9", autolog=False, flush_timeout=0)
        opened = journal.of(skilltrace.config.current())
        opened._open()
        assert opened.flush(30)
    finally:
        delivery.on_available.pop()
    assert told == []


def test_a_server_that_hangs_does_not_hold_a_call(tmp_path):
    """A listening socket that never answers: the call returns, flush gives up at its timeout, the journal keeps all."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        skilltrace.configure(
            "x", tracking_uri=f"http://127.0.0.1:{listening.getsockname()[1]}", autolog=False, flush_timeout=0.5
        )
        with tracked_phase("a") as run:
            run.result = 1
        assert run.ended
        assert not skilltrace.flush(0.5)
        assert skilltrace.status().pending_runs == 1


def test_a_user_who_talks_to_the_same_server_keeps_his_own_time_limits(mlflow_server, monkeypatch):
    """Delivery's short timeouts are its own: the environment is not touched, and other calls are not bounded."""
    from mlflow.utils import rest_utils

    before = dict(os.environ)
    store = Tracking(mlflow_server.uri, new_experiment())
    store.configure()
    with tracked_phase("a"):
        pass
    assert skilltrace.flush(30)
    seen = []
    real = rest_utils._get_http_response_with_retries.__wrapped__
    code = real.__code__
    assert dict(os.environ) == before

    def spy(method, url, max_retries, *args, **kwargs):
        seen.append((max_retries, kwargs.get("timeout")))
        return real(method, url, max_retries, *args, **kwargs)

    for cell in rest_utils._get_http_response_with_retries.__closure__:
        if getattr(cell.cell_contents, "__code__", None) is code:
            monkeypatch.setattr(cell, "cell_contents", spy)
    store.client.search_experiments()
    with tracked_phase("b"):
        pass
    assert skilltrace.flush(30)
    assert seen[0][0] > 0
    assert seen[0][1] > 60
    assert {retries for retries, _ in seen[1:]} == {0}


# --- the journal on disk ---------------------------------------------------------------------------------------------


def test_the_spool_is_private(store, tmp_path):
    """Folders 0700, files 0600, also where the umask would allow more."""
    before = os.umask(0)
    try:
        with tracked_phase("a") as run:
            run.log_text("x" * 2**20, "large.txt")
            assert skilltrace.flush(30)
            run.log_text("y" * 2**20, "large2.txt")
    finally:
        os.umask(before)
    for path in [spool_of(tmp_path), *spool_of(tmp_path).rglob("*")]:
        allowed = 0o700 if path.is_dir() else 0o600
        assert stat.S_IMODE(path.stat().st_mode) == allowed, path


def test_a_spool_of_another_user_is_not_used(store, tmp_path, monkeypatch, caplog):
    """Ownership is checked: journals go to the fallback, with one warning, and nothing there is read."""
    spool_of(tmp_path).mkdir()
    monkeypatch.setattr(spool, "fallback", lambda: tmp_path / "fallback")
    real = os.getuid()
    os.chown(spool_of(tmp_path), real + 1, -1) if real == 0 else pytest.skip("only root can give a folder away")
    with tracked_phase("a"):
        pass
    assert store.run().info.status == "FINISHED"
    assert (tmp_path / "fallback").exists()
    assert caplog.text.count("cannot be written") == 1
    assert spool.journals(spool_of(tmp_path)) == []


def test_a_spool_that_cannot_be_written(store, tmp_path, monkeypatch, caplog):
    """The fallback folder takes over, with one warning; nothing is lost."""
    blocker = tmp_path / "file"
    blocker.write_text("")
    monkeypatch.setattr(spool, "fallback", lambda: tmp_path / "fallback")
    store.configure(spool_dir=blocker / "spool")
    for _ in range(2):
        with tracked_phase("a"):
            pass
    assert len(store.runs()) == 2
    assert caplog.text.count("SKILLTRACE_SPOOL_DIR") == 1


def test_nowhere_to_write_at_all(tmp_path, monkeypatch, caplog):
    """The user's call goes on; one warning; status() counts what is lost."""
    blocker = tmp_path / "file"
    blocker.write_text("")
    monkeypatch.setattr(spool, "fallback", lambda: blocker / "fallback")
    skilltrace.configure("x", tracking_uri="http://127.0.0.1:9", autolog=False, spool_dir=blocker / "spool")

    @tracked_phase
    def work(text):
        skilltrace.log_text("x" * 2**20, "large.txt")
        return text

    assert [work("a"), work("b")] == ["a", "b"]
    assert caplog.text.count("cannot write its journal") == 1
    assert skilltrace.status().lost >= 4


def test_without_delivery_the_journal_waits_for_sync(store, tmp_path):
    """`delivery="external"`: no thread; `sync` delivers live what is there, and the rest when it has happened."""
    store.configure(delivery="external")
    before = set(threading.enumerate())
    with tracked_job("open") as run:
        run.log_turn("user", "one")
        assert not skilltrace.flush(0)
        report = delivery.sync(spool_of(tmp_path))
        assert (report.delivered, report.alive) == (0, 1)
        assert store.runs(flush=False)[0].info.status == "RUNNING"
        assert skilltrace.flush(0)
        run.log_turn("user", "two")
    assert {thread for thread in threading.enumerate() if thread.name.startswith("skilltrace")} <= before
    delivery.sync(spool_of(tmp_path))
    (stored,) = store.runs(flush=False)
    assert stored.info.status == "FINISHED"
    assert [turn["content"] for turn in store.json(stored, "conversation_history.json")] == ["one", "two"]


def test_shutdown_removes_the_journal_and_a_later_run_opens_another(store, tmp_path):
    """After shutdown nothing is left on disk and no thread runs; recording goes on when it is needed."""
    before = set(threading.enumerate())
    with tracked_phase("one"):
        pass
    assert skilltrace.shutdown(30)
    assert journals(tmp_path) == []
    assert {thread for thread in threading.enumerate() if thread.name.startswith("skilltrace")} <= before
    with tracked_phase("two"):
        pass
    assert [run.info.run_name for run in store.runs()] == ["one", "two"]


def test_shutdown_while_a_run_is_open_keeps_it(store, tmp_path):
    """The journal stays, and the run ends normally afterwards."""
    with tracked_phase("open"):
        skilltrace.shutdown(30)
        assert len(journals(tmp_path)) == 1
        assert delivery.sync(spool_of(tmp_path)).alive == 1
    assert store.run().info.status == "FINISHED"


# --- processes -------------------------------------------------------------------------------------------------------


def test_a_short_process_delivers_at_its_end(any_store, python, tmp_path):
    """Without flush or shutdown; nothing is printed and nothing is left."""
    done = python(program(any_store, delivery="thread", flush_timeout=60.0))
    assert done.stdout == ""
    assert_delivered_once(any_store)
    assert journals(tmp_path) == []


def test_a_process_that_cannot_deliver_says_where_its_runs_are(store, python, tmp_path):
    """One line at the end; `skilltrace sync` delivers them later."""
    down = Tracking("http://127.0.0.1:9", store.experiment)
    done = python(program(down, delivery="thread", flush_timeout=5.0))
    last = [line for line in done.stderr.splitlines() if "skilltrace sync" in line]
    assert len(last) == 1
    (folder,) = journals(tmp_path)
    assert str(folder) in last[0]
    content = (folder / "journal.jsonl").read_text().replace("http://127.0.0.1:9", store.uri)
    (folder / "journal.jsonl").write_text(content)
    assert delivery.sync(spool_of(tmp_path)).delivered == 1
    assert_delivered_once(store)


FORKING = """
@tracked_phase
def child(n):
    return {"n": n}

with tracked_job("parent") as run:
    pid = os.fork()
    if not pid:
        child(1)
        assert skilltrace.shutdown(60), skilltrace.status()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    child(2)
skilltrace.shutdown(60)
"""


def test_a_forked_child_records_under_the_parents_run(store, python, tmp_path):
    """With a journal of its own; the parent's run is ended by the parent alone."""
    python(program(store, delivery="thread", after=FORKING, flush_timeout=60.0))
    runs = {(run.info.run_name, run.data.params.get("n")): run for run in store.runs(flush=False)}
    parent = runs["parent", None]
    assert parent.info.status == "FINISHED"
    assert store.parent(runs["child", "1"]) == store.parent(runs["child", "2"]) == parent.info.run_id
    assert len(store.runs(flush=False)) == 7
    assert journals(tmp_path) == []


def test_source_tags_are_those_of_the_process_that_recorded(store, python, tmp_path):
    """Not of the one that delivers."""
    script = tmp_path / "service.py"
    script.write_text(program(store))
    subprocess.run([sys.executable, str(script)], check=True, cwd=tmp_path)
    delivery.sync(spool_of(tmp_path))
    for run in store.runs(flush=False):
        assert run.data.tags["mlflow.source.name"] == str(script)
        assert run.data.tags["mlflow.user"]


def test_credentials_of_the_tracking_uri_do_not_reach_the_journal(tmp_path):
    """The journal has the address only; delivery from this process still uses them."""
    skilltrace.configure("x", tracking_uri="http://ada:hunter22@127.0.0.1:9", autolog=False, flush_timeout=0.0)
    with tracked_phase("a"):
        pass
    content = next(spool_of(tmp_path).glob("*/journal.jsonl")).read_text()
    assert "127.0.0.1:9" in content
    assert "hunter22" not in content
    from skilltrace import mlflow_bridge

    assert mlflow_bridge._with_credentials["http://127.0.0.1:9"] == "http://ada:hunter22@127.0.0.1:9"


def test_what_was_logged_after_the_end_is_found_again_by_another_deliverer(store, tmp_path):
    """`sync` has delivered the run and forgotten it: the late record says where the run is."""
    store.configure(delivery="external")
    with tracked_phase("early") as run:
        pass
    delivery.sync(spool_of(tmp_path))
    run.log_metric("late", 1)
    delivery.sync(spool_of(tmp_path))
    (stored,) = store.runs(flush=False)
    assert stored.data.metrics["late"] == 1
    assert delivery.status(spool_of(tmp_path)).rejected == 0


def test_a_fault_of_ours_costs_one_run_and_keeps_its_content(store, monkeypatch, caplog):
    """Delivery goes on with the next run; what the faulty one held is in the rejected file, and a report is logged."""
    from skilltrace import faults, mlflow_bridge

    real = mlflow_bridge.Store.create_run

    def broken(self, experiment_id, name, *args):
        if name == "broken":
            raise ZeroDivisionError("a fault of ours")
        return real(self, experiment_id, name, *args)

    monkeypatch.setattr(mlflow_bridge.Store, "create_run", broken)
    monkeypatch.setattr(faults, "_strict", False)
    with tracked_phase("broken") as run:
        run.log_text("precious", "notes.txt")
    with tracked_phase("fine"):
        pass
    assert store.run().info.run_name == "fine"
    kept = b"".join(path.read_bytes() for path in spool.rejected_files(skilltrace.status().spool)).decode()
    assert "a fault of ours" in kept
    assert "precious" in kept
    assert "Please report it" in caplog.text


@pytest.mark.parametrize("paths", [("a", "a/b.txt"), ("a/b.txt", "a")])
def test_a_path_that_the_store_cannot_have_costs_one_artifact(any_store, paths):
    """A file where a folder is: set aside with its content, and what comes behind is delivered."""
    with tracked_phase("a") as run:
        for number, path in enumerate(paths):
            run.log_text(f"text {number}", path)
        run.log_text("behind", "behind.txt")
    with tracked_phase("next"):
        pass
    runs = any_store.runs()
    assert [run.info.status for run in runs] == ["FINISHED", "FINISHED"]
    files = set(any_store.files(runs[0]))
    assert {paths[0], "behind.txt"} <= files
    kept = b"".join(path.read_bytes() for path in spool.rejected_files(skilltrace.status().spool)).decode()
    # Older MLflows put a file that is named like a folder into that folder: then it is there.
    elsewhere = [any_store.text(runs[0], path) for path in files - {paths[0], "behind.txt"}]
    assert "text 1" in kept or elsewhere == ["text 1"]
