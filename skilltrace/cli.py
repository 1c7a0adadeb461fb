"""The command line: `skilltrace demo`, `skilltrace sync`, `skilltrace status`."""

from __future__ import annotations

import io
import json
import logging
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.logging import RichHandler

from skilltrace import config, delivery, mlflow_bridge, spool
from skilltrace.errors import SkilltraceError

if TYPE_CHECKING:
    from rich.table import Table

_STORE_OPTION = click.option(
    "--spool-dir", type=click.Path(path_type=Path), help="Folder of the journals. Default: that of the settings."
)
_JSON_OPTION = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="skilltrace")
@click.option("-v", "--verbose", is_flag=True, help="Also say what MLflow and DSPy log.")
def main(*, verbose: bool) -> None:
    """Instrumentation for DSPy programs, on MLflow."""
    handler = RichHandler(console=Console(stderr=True), show_time=False, show_path=False)
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[handler])
    if not verbose:
        logging.disable(logging.INFO)  # MLflow sets up handlers and levels of its own when it is imported


@main.command()
@click.option(
    "--model", metavar="MODEL", help="A provider's model, like openai/gpt-4o-mini. Default: a local stand-in."
)
@click.option("--topic", default="Writing Python decorators", show_default=True, help="What the skill is about.")
@click.option("--svg", type=click.Path(path_type=Path, dir_okay=False), help="Also draw the run tree into a file.")
def demo(*, model: str | None, topic: str, svg: Path | None) -> None:
    """Make a skill in three phases, tracked, and show the run that stands in MLflow then.

    It needs no network and no key: a small model server on this machine answers. It writes to ./mlflow.db, or to the
    store that MLFLOW_TRACKING_URI names.

    \b
    Example:
        skilltrace demo
        skilltrace demo --model openai/gpt-4o-mini --topic "Pandas groupby"
    """  # noqa: D301  # \b keeps click from filling the example
    from skilltrace.demo.command import make_skill
    from skilltrace.tree import draw

    console = Console(highlight=False)
    try:
        job, settings = make_skill(topic, model)
    except SkilltraceError as error:
        raise click.ClickException(str(error)) from None
    tree = draw([job])
    # A pipe or a narrow terminal gets whole lines too: a cut figure is worse than a wrapped line.
    console.width = max(console.width, _width(tree))
    console.print(tree)
    if svg is not None:
        _draw_svg(tree, svg)
    console.print()
    if settings.target.uri.startswith("http"):
        console.print(f"Open it: {mlflow_bridge.run_url(settings.target.uri, job.experiment_id, job.run_id, '')}")
        return
    console.print("Open it in the MLflow UI, at the address that this prints:", soft_wrap=True)
    console.print(
        f"  {_command('mlflow')} ui --port {config.UI_PORT} --backend-store-uri {settings.target.uri}", soft_wrap=True
    )


def _width(tree: Table) -> int:
    return Console(width=1000).measure(tree).maximum


def _draw_svg(tree: Table, path: Path) -> None:
    canvas = Console(record=True, file=io.StringIO(), force_terminal=True, width=_width(tree))
    canvas.print(tree)
    canvas.save_svg(str(path), title="skilltrace demo")


def _command(name: str) -> str:
    """A command of this environment as the user can type it: by its path, unless it is on the PATH."""
    beside = Path(sys.argv[0]).parent / name
    return name if shutil.which(name) or not beside.exists() else str(beside)


@main.command()
@_STORE_OPTION
@_JSON_OPTION
def sync(*, spool_dir: Path | None, as_json: bool) -> None:
    """Deliver to MLflow what processes that ended have left in their journals.

    Runs that were open when their process died end as KILLED, with the tag skilltrace.recovered. Doing it again, or
    while others do it, changes nothing.
    """
    mlflow_bridge.know(config.current().tracking_uri)
    report = delivery.sync(*_spools(spool_dir))
    if as_json:
        click.echo(json.dumps({name: getattr(report, name) for name in ("delivered", "alive", "left", "error")}))
    else:
        click.echo(f"{report.delivered} delivered, {report.alive} of running processes, {report.left} left")
        if report.error:
            click.echo(f"left because: {report.error}", err=True)
    sys.exit(1 if report.left else 0)


@main.command()
@_STORE_OPTION
@_JSON_OPTION
def status(*, spool_dir: Path | None, as_json: bool) -> None:
    """Show what waits for delivery, and what MLflow has refused."""
    found = [delivery.status(folder) for folder in _spools(spool_dir)]
    oldest = min((part.oldest for part in found if part.oldest is not None), default=None)
    figures = {
        "pending_runs": sum(part.pending_runs for part in found),
        "oldest": oldest.isoformat() if oldest is not None else None,
        "rejected": sum(part.rejected for part in found),
        "journals": sum(part.journals for part in found),
        "spool": str(found[0].spool),
    }
    if as_json:
        click.echo(json.dumps(figures))
        return
    click.echo(f"spool          {figures['spool']}")
    click.echo(f"journals       {figures['journals']}")
    click.echo(f"pending runs   {figures['pending_runs']}")
    if oldest is not None:
        click.echo(f"oldest         {oldest.astimezone():%Y-%m-%d %H:%M:%S}")
    click.echo(f"rejected       {figures['rejected']}")
    for folder in _spools(spool_dir):
        for path in spool.rejected_files(folder):
            click.echo(f"               {path}")


def _spools(spool_dir: Path | None) -> list[Path]:
    """The folders to look at: the one asked for, or the configured one and that which stands in for it."""
    if spool_dir is not None:
        return [spool_dir.absolute()]
    return [config.current().spool_dir, spool.fallback()]
