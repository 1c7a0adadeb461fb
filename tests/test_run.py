"""What is logged inside a run, and what a run says of itself."""

import concurrent.futures
import math
import threading

import pytest

import skilltrace
from skilltrace import ArtifactError, DeliveryError, current_run, tracked_job, tracked_phase


def test_metrics_with_steps_times_and_odd_values(any_store):
    """Points keep their step and timestamp; NaN and infinities arrive as MLflow keeps them; booleans are 0 and 1."""
    with tracked_phase("training") as run:
        run.log_metric("loss", 0.5, step=1, timestamp=1_700_000_000_000)
        run.log_metric("loss", 0.25, step=2, timestamp=1_700_000_001_000)
        run.log_metrics({"nan": math.nan, "inf": math.inf, "passed": True}, step=3)
    stored = any_store.run()
    history = any_store.client.get_metric_history(stored.info.run_id, "loss")
    assert [(point.value, point.step, point.timestamp) for point in history] == [
        (0.5, 1, 1_700_000_000_000),
        (0.25, 2, 1_700_000_001_000),
    ]
    assert math.isnan(stored.data.metrics["nan"])
    assert stored.data.metrics["inf"] > 1e300
    assert stored.data.metrics["passed"] == 1


def test_a_metric_that_is_no_number_is_left_out_with_a_warning(store, caplog):
    """The rest of the run is recorded."""
    with tracked_phase("a") as run:
        run.log_metrics({"bad": "many", "good": 1})
    assert store.run().data.metrics["good"] == 1
    assert "bad" not in store.run().data.metrics
    assert "'bad' is not recorded" in caplog.text


def test_params_keep_their_first_value(any_store, caplog):
    """A second value would make MLflow refuse the whole batch: it is left out and said."""
    with tracked_phase("a") as run:
        assert run.log_param("lr", 0.1) == 0.1
        run.log_param("lr", 0.2)
        run.log_params({"lr": 0.1, "depth": 3, "list": [1, 2]})
    stored = any_store.run()
    assert stored.data.params == {"lr": "0.1", "depth": "3", "list": "[1, 2]"}
    assert "keeps its first value" in caplog.text


def test_an_arguments_param_and_a_logged_one_of_the_same_name(store, caplog):
    """The argument came first."""

    @tracked_phase
    def train(lr):
        skilltrace.log_param("lr", 9)

    train(1)
    assert store.run().data.params == {"lr": "1"}
    assert "keeps its first value" in caplog.text


def test_tags(any_store):
    """A later value replaces an earlier one, also one set at the start."""

    @tracked_phase(tags={"stage": "one"})
    def work():
        skilltrace.set_tag("stage", "two")
        skilltrace.set_tags({"n": 3, "none": None})
        assert current_run().tags["stage"] == "two"

    work()
    tags = any_store.run().data.tags
    assert (tags["stage"], tags["n"], tags["none"]) == ("two", "3", "None")


def test_files_and_dicts(any_store, tmp_path):
    """log_text, log_dict (JSON and YAML), log_artifact (file and folder); as they were when logged."""
    report = tmp_path / "report.csv"
    report.write_text("a,b\n")
    folder = tmp_path / "plots"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "one.txt").write_text("1")
    with tracked_phase("files") as run:
        run.log_text("hello", "notes/hello.txt")
        run.log_dict({"a": [1, {"b": None}]}, "data.json")
        run.log_dict({"a": [1]}, "data.yaml")
        run.log_artifact(report, "tables")
        run.log_artifact(str(folder))
        report.write_text("changed")
        report.unlink()
    stored = any_store.run()
    assert any_store.files(stored) == [
        "data.json", "data.yaml", "notes/hello.txt", "plots/deep/one.txt", "tables/report.csv",
    ]  # fmt: skip
    assert any_store.text(stored, "notes/hello.txt") == "hello"
    assert any_store.json(stored, "data.json") == {"a": [1, {"b": None}]}
    assert any_store.text(stored, "data.yaml") == "a:\n- 1\n"
    assert any_store.text(stored, "tables/report.csv") == "a,b\n"


def test_large_artifacts_stand_beside_the_journal_until_they_are_delivered(store, tmp_path):
    """A megabyte of text or bytes is no line of the journal; nothing is left of it after delivery."""
    text, data = "x" * 2**20, bytes(range(256)) * 2**12
    with tracked_phase("large") as run:
        run.log_text(text, "large.txt")
        run.result = {"data": data, "text": text + "\n"}
    journal = next((tmp_path / "spool").glob("*/journal.jsonl"))
    assert journal.stat().st_size < 2**16
    stored = store.run()
    assert store.text(stored, "large.txt") == text
    assert store.read(stored, "data.bin") == data
    assert not list(journal.parent.glob("blobs/*"))


@pytest.mark.parametrize("path", ["../up.txt", "/abs.txt", "a/../../b", "", "C:\\x"])
def test_artifact_paths_stay_inside_the_run(store, path):
    """A path that leaves the run is refused with a message."""
    with tracked_phase("a") as run, pytest.raises(ArtifactError, match="no artifact path"):
        run.log_text("x", path)


def test_a_file_that_is_not_there_cannot_be_logged(store, tmp_path):
    """An ArtifactError that names it."""
    with tracked_phase("a") as run, pytest.raises(ArtifactError, match=r"gone\.txt"):
        run.log_artifact(tmp_path / "gone.txt")


def test_turns_make_a_conversation_history(any_store):
    """All turns in order, with role, content and time."""

    @tracked_job
    def clarify():
        skilltrace.log_turn("assistant", "Which topic?")
        skilltrace.log_turn("user", {"topic": "decorators", "api_key": "sk-1234567890abcdefghij"})

    clarify()
    turns = any_store.json(any_store.run(), "conversation_history.json")
    assert [(turn["role"], turn["content"]) for turn in turns] == [
        ("assistant", "Which topic?"),
        ("user", {"topic": "decorators", "api_key": "[redacted]"}),
    ]
    assert all(turn["timestamp"].startswith("20") for turn in turns)


def test_what_is_logged_after_the_end_still_arrives(store):
    """A task that outlives its run may still log to it."""
    with tracked_phase("a") as run:
        pass
    assert skilltrace.flush(30)
    run.log_metric("late", 1)
    run.log_text("late", "late.txt")
    stored = store.run()
    assert stored.data.metrics["late"] == 1
    assert store.files(stored) == ["late.txt"]
    assert stored.info.status == "FINISHED"


def test_logging_from_many_threads(store):
    """Nothing is lost or mixed up."""
    with tracked_phase("a") as run:
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            list(pool.map(lambda n: run.log_metric(f"m{n % 10}", n, step=n), range(400)))
    stored = store.run()
    for name in range(10):
        points = store.client.get_metric_history(stored.info.run_id, f"m{name}")
        assert sorted(point.value for point in points) == list(range(name, 400, 10))


def test_outside_a_run_the_functions_warn_once_and_do_nothing(store, caplog):
    """Each function by itself."""
    for _ in range(3):
        assert skilltrace.log_metric("a", 1) is None
        skilltrace.set_tag("a", 1)
    assert caplog.text.count("skilltrace.log_metric was called outside any run") == 1
    assert caplog.text.count("skilltrace.set_tag was called outside any run") == 1


def test_module_functions_have_the_signatures_of_the_methods():
    """Without the run."""
    import inspect

    assert list(inspect.signature(skilltrace.log_metric).parameters) == ["key", "value", "step", "timestamp"]
    assert skilltrace.log_metric.__doc__ == skilltrace.Run.log_metric.__doc__


def test_what_a_run_says_of_itself(any_store):
    """Name, kind, parent, job, tags; and from MLflow its id and address."""
    with tracked_job("job_{job_id}") as job, tracked_phase("phase") as phase:
        assert (job.kind, phase.kind) == ("job", "phase")
        assert phase.parent is job
        assert job.parent is None
        assert phase.job is job
        assert phase.tags["job_id"] == job.tags["job_id"]
        assert not phase.ended
        run_id, url = phase.run_id, phase.url
    assert phase.ended
    stored = any_store.run("phase")
    assert stored.info.run_id == run_id == phase.run_id
    assert stored.data.tags["skilltrace.key"] == phase.key
    assert url.endswith(f"/#/experiments/{any_store.experiment_id}/runs/{run_id}")
    if any_store.uri.startswith("http"):
        assert url.startswith(any_store.uri)


def test_a_run_is_seen_running_while_it_is_open(any_store):
    """It stands in MLflow before its call returns, with its tags; params and metrics follow."""
    with tracked_job("open", tags={"team": "search"}) as run:
        run.log_metric("progress", 0.5)
        stored = any_store.run()
        assert stored.info.status == "RUNNING"
        assert stored.info.end_time is None
        assert stored.data.tags["team"] == "search"
        assert stored.data.metrics["progress"] == 0.5
    assert any_store.run().info.status == "FINISHED"


def test_the_run_id_of_a_run_that_mlflow_has_not_got(tmp_path):
    """A DeliveryError that says where to look; the run itself goes on."""
    skilltrace.configure("x", tracking_uri="http://127.0.0.1:9", autolog=False, flush_timeout=0.2)
    with tracked_phase("a") as run:
        with pytest.raises(DeliveryError, match=r"status\(\)"):
            _ = run.run_id
        assert skilltrace.get_current_run_id() is None


def test_a_bare_thread_has_no_run_of_its_own(store):
    """Python gives a new thread an empty context: nothing there is taken for the run of the thread that started it."""
    seen = []
    with tracked_phase("a"):
        thread = threading.Thread(target=lambda: seen.append(current_run()))
        thread.start()
        thread.join()
    assert seen == [None]


def test_turns_and_a_result_of_the_same_name_are_both_kept(store):
    """The transcript has the name; the field of the result gets another."""

    @tracked_phase
    def chat():
        skilltrace.log_turn("user", "hi")
        return {"conversation_history": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}

    chat()
    run = store.run()
    assert [turn["content"] for turn in store.json(run, "conversation_history.json")] == ["hi"]
    assert len(store.json(run, "conversation_history_2.json")) == 2
