"""One HTML page of a sweep with everything in it: tables that sort, pictures for light and dark, nothing loaded."""

import base64
import json
import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from transmamba.launch.sweeps.report.leaderboard import Leaderboard, Result, Row, Spread, verdict
from transmamba.launch.sweeps.report.picture import picture_bytes

_TEMPLATE = Path(__file__).parent / "page.html"
_GROUP_COLUMNS = {
    "group": "text",
    "TransPoints": "",
    "seeds": "",
    "validation loss": "",
    "bits per byte": "",
    "at equal tokens": "",
    "at equal FLOPs": "",
    "tokens": "",
    "training FLOPs": "",
    "seconds": "",
    "state": "text",
}
_TRIAL_COLUMNS = {
    "trial": "text",
    "group": "text",
    "seed": "",
    "state": "text",
    "exit code": "",
    "step": "",
    "validation loss": "",
    "bits per byte": "",
    "training FLOPs": "",
    "seconds": "",
}


def write_page(board: Leaderboard, definition: Mapping[str, Any], path: Path) -> None:
    """Write the page; all text in it is escaped, and it loads nothing."""
    path.write_text(page(board, definition), encoding="utf-8")


def page(board: Leaderboard, definition: Mapping[str, Any]) -> str:
    """The page as text."""
    results = board.results
    n_done = sum(result.state == "done" for result in results)
    pieces = {
        "title": escape(f"Sweep {board.name}"),
        "summary": escape(f"{len(board.rows)} groups, {len(results)} trials, {n_done} done"),
        "verdict": escape(verdict(board)),
        "compared": escape(comparison(board)),
        "group_head": _head(_GROUP_COLUMNS),
        "group_rows": "\n".join(_group_row(row) for row in board.rows),
        "trial_head": _head(_TRIAL_COLUMNS),
        "trial_rows": "\n".join(_trial_row(result) for result in results),
        "light_png": base64.b64encode(picture_bytes(board, "light")).decode(),
        "dark_png": base64.b64encode(picture_bytes(board, "dark")).decode(),
        "definition": escape(json.dumps(definition, indent=1)),
    }
    template = _TEMPLATE.read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: pieces[match[1]], template)


def comparison(board: Leaderboard) -> str:
    """Where the groups are compared, in one sentence."""
    if board.equal_tokens is None or board.equal_flops is None:
        return "nothing to compare yet"
    who = "a finished trial" if any(result.state == "done" for result in board.results) else "a trial so far"
    return (
        f"equal tokens: {board.measure} at {board.equal_tokens:,} tokens; equal FLOPs: at {board.equal_flops:.4g} "
        f"training FLOPs, the smallest number that {who} reached"
    )


def _head(columns: Mapping[str, str]) -> str:
    return "".join(
        f'<th class="{kind}" scope="col"><button type="button">{escape(name)}</button></th>'
        for name, kind in columns.items()
    )


def _group_row(row: Row) -> str:
    facts = row.results[0].facts
    strips = " ".join(strip(points, facts.seq_len) for _, points in facts.points)
    first = "" if facts.points[0][1] == () else str(sum(min(p, facts.seq_len) for p in facts.points[0][1]))
    is_bad = any(result.state == "failed" for result in row.results)
    return _row(
        [
            _cell(row.group, row.group, "text"),
            f'<td data-value="{escape(first)}">{strips}</td>',
            _cell(str(len(row.results)), len(row.results)),
            _spread_cell(row.loss),
            _spread_cell(row.bits_per_byte),
            _spread_cell(row.at_equal_tokens),
            _spread_cell(row.at_equal_flops),
            _cell(f"{row.tokens:,}", row.tokens),
            _cell(f"{row.flops:.4g}", row.flops),
            _cell(f"{row.seconds:.0f}", row.seconds),
            _cell(row.states, row.states, "text bad" if is_bad else "text"),
        ]
    )


def _trial_row(result: Result) -> str:
    flops = result.facts.flops(result.step)
    return _row(
        [
            _cell(f"{result.number:04d}", result.number, "text"),
            _cell(result.group, result.group, "text"),
            _cell(str(result.seed), result.seed),
            _cell(result.state, result.state, "text bad" if result.state == "failed" else "text"),
            _cell("" if result.code is None else str(result.code), result.code),
            _cell(str(result.step), result.step),
            _cell("" if result.final is None else f"{result.final:.4f}", result.final),
            _cell("" if result.bits_per_byte is None else f"{result.bits_per_byte:.4f}", result.bits_per_byte),
            _cell(f"{flops:.4g}", flops),
            _cell(f"{result.seconds:.0f}", result.seconds),
        ]
    )


def strip(points: Sequence[float], seq_len: int, width: int = 120, height: int = 4) -> str:
    """A schedule as an inline SVG: a bar per layer, attention before its TransPoint and the scan from it on."""
    bars = []
    for layer, point in enumerate(points):
        share = 1.0 if point == math.inf else min(point / seq_len, 1.0)
        y, attended = layer * (height + 1), round(share * width, 1)
        bars.append(f'<rect class="scan" x="0" y="{y}" width="{width}" height="{height}"/>')
        bars.append(f'<rect class="attention" x="0" y="{y}" width="{attended}" height="{height}"/>')
    names = ", ".join("inf" if point == math.inf else str(int(point)) for point in points)
    size = f'width="{width}" height="{len(points) * (height + 1)}"'
    return f'<svg {size} role="img"><title>{escape(names)}</title>{"".join(bars)}</svg>'


def _row(cells: Sequence[str]) -> str:
    return f"<tr>{''.join(cells)}</tr>"


def _cell(text: str, value: object, kind: str = "") -> str:
    shown = "" if value is None else escape(str(value))
    return f'<td class="{kind}" data-value="{shown}">{escape(text)}</td>'


def _spread_cell(value: Spread | None) -> str:
    return _cell("" if value is None else value.text(), None if value is None else value.mean)
