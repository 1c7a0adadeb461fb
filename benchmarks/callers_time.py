"""What the caller of a decorated function waits for: `python -m benchmarks.callers_time`.

A job of three phases that return about 1 KB each, per decorated call, journal write included: bare, with skilltrace
switched off, with it only writing the journal, with it delivering to sqlite in its background thread, and the same job
written by hand with `mlflow.start_run` on sqlite. The ways take turns, so that all of them meet the same machine.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import skilltrace
from skilltrace import tracked_job, tracked_phase

RESULT = {"skill_content": "# Title\n" + "word " * 180, "score": 0.85, "passed": True, "metadata": {"tags": ["a", "b"]}}


def phase(number: int) -> dict:
    return RESULT


tracked = [tracked_phase(name)(phase) for name in ("understanding", "generation", "validation")]


def bare_job(job_id: str) -> None:
    for number in range(3):
        phase(number)


@tracked_job("job_{job_id}")
def tracked_job_(job_id: str) -> None:
    for number, function in enumerate(tracked):
        function(number)


def by_hand(job_id: str) -> None:
    import mlflow

    with mlflow.start_run(run_name=f"job_{job_id}"):
        mlflow.set_tag("job_id", job_id)
        for number, name in enumerate(("understanding", "generation", "validation")):
            with mlflow.start_run(run_name=name, nested=True):
                mlflow.set_tag("phase", name)
                result = phase(number)
                mlflow.log_metric("score", result["score"])
                mlflow.log_text(result["skill_content"], "skill_content.md")
                mlflow.log_dict(result["metadata"], "metadata.json")


def timed(job: Callable[[str], None], calls: int) -> list[float]:
    """Seconds per decorated call (a job is four), one figure a job."""
    times = []
    for number in range(calls):
        start = time.perf_counter()
        job(f"job_{number}")
        times.append((time.perf_counter() - start) / 4)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=200, help="jobs of each way in each round (a tenth of it by hand)")
    arguments = parser.parse_args()

    import mlflow

    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        uri = f"sqlite:///{Path(folder) / 'mlflow.db'}"
        mlflow.set_tracking_uri(uri)
        mlflow.set_experiment("by hand")
        options = {"tracking_uri": uri, "autolog": False, "spool_dir": Path(folder) / "spool"}
        ways: dict[str, tuple[Callable[[str], None], dict, int]] = {
            "bare": (bare_job, {"enabled": False}, arguments.jobs),
            "skilltrace, off": (tracked_job_, {"enabled": False}, arguments.jobs),
            "skilltrace, journal only": (tracked_job_, {"delivery": "external"}, arguments.jobs),
            "skilltrace, delivering": (tracked_job_, {}, arguments.jobs),
            "mlflow by hand": (by_hand, {"enabled": False}, max(1, arguments.jobs // 10)),
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(arguments.rounds):
            for name, (job, extra, calls) in ways.items():
                skilltrace.configure("benchmark", **options, **extra)
                times[name] += timed(job, calls)
                skilltrace.flush(300)
        versions = f"Python {platform.python_version()}, MLflow {mlflow.__version__}"
        print(f"{platform.machine()}, {os.cpu_count()} cores, {versions}")
        print("| way | median, µs a call | p99, µs |")
        print("|---|---:|---:|")
        for name, values in times.items():
            p99 = statistics.quantiles(values, n=100)[98]
            print(f"| {name} | {statistics.median(values) * 1e6:,.1f} | {p99 * 1e6:,.0f} |")
        skilltrace.shutdown(60)


if __name__ == "__main__":
    main()
