"""A job and its phases as a tree: read back from MLflow, and drawn for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

_STYLES = {"FINISHED": "green", "FAILED": "red", "KILLED": "yellow", "RUNNING": "cyan"}
_MOST_METRICS = 3


@dataclass
class Node:
    """One run as MLflow has it.

    Attributes:
        seconds: From start to end, or None while it runs.
        metrics: The last value of each metric.
        children: The runs inside it, by start.
    """

    run_id: str
    experiment_id: str
    name: str
    status: str
    seconds: float | None
    metrics: dict[str, float]
    tags: dict[str, str]
    children: list[Node] = field(default_factory=list)


def draw(roots: Sequence[Node]) -> Table:
    """The trees, a line a run: name, status, duration, LM calls, tokens, and the metrics that are the user's own."""
    from rich.table import Table  # a third of a second on a slow machine: only for those who look
    from rich.text import Text

    table = Table.grid(padding=(0, 3))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    for _ in range(3):
        table.add_column(no_wrap=True, justify="right")
    table.add_column()
    for root in roots:
        for prefix, node in _lines(root):
            table.add_row(
                Text(prefix + node.name),
                Text(node.status, style=_STYLES.get(node.status, "")),
                Text("" if node.seconds is None else f"{node.seconds:,.1f} s"),
                Text(_counted(node.metrics.get("lm_calls"), "LM call")),
                Text(_counted(node.metrics.get("lm_tokens_total"), "token")),
                Text(_extra(node, is_root=not prefix)),
            )
    return table


def _lines(root: Node) -> Iterator[tuple[str, Node]]:
    yield "", root
    for position, child in enumerate(root.children):
        last = position == len(root.children) - 1
        for depth, (prefix, node) in enumerate(_lines(child)):
            if depth == 0:
                yield ("└── " if last else "├── ") + prefix, node
            else:
                yield ("    " if last else "│   ") + prefix, node


def _counted(number: float | None, what: str) -> str:
    if number is None:
        return ""
    return f"{number:,.0f} {what}{'' if number == 1 else 's'}"


def _extra(node: Node, *, is_root: bool) -> str:
    cost = node.metrics.get("lm_cost")
    parts = [f"${cost:,.4f}"] if cost is not None and is_root else []
    own = [name for name in sorted(node.metrics) if not name.startswith("lm_") and name != "duration"]
    parts += [f"{name} {node.metrics[name]:.4g}" for name in own[:_MOST_METRICS]]
    if "error.type" in node.tags:
        parts.append(f"{node.tags['error.type']}: {node.tags.get('error.message', '')}".splitlines()[0][:80])
    return "   ".join(parts)
