"""The page of runs: one file that needs no network, no script and no other file."""

import re
from collections.abc import Iterator, Sequence
from html import escape

from trm_fast.train.reports import tables
from trm_fast.train.reports.reading import RunReport
from trm_fast.train.reports.tables import Table

_STYLE = """
:root { color-scheme: light dark; --ink: #1d1f21; --paper: #fff; --line: #dcdfe3; --soft: #62676d;
  --shade: #f5f6f8; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e6e8; --paper: #16181b; --line: #3a3e44; --soft: #9aa0a6; --shade: #1f2226; }
}
body { margin: 0 auto; padding: 1.5rem 1rem 3rem; max-width: 62rem; color: var(--ink);
  background: var(--paper); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0; } details ~ h1 { margin-top: 3.5rem; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .5rem; }
.result { font-size: 1.1rem; margin: .4rem 0 0; } .soft, caption { color: var(--soft); }
.warn { border-left: 4px solid #d97a1e; padding: .3rem .8rem; background: var(--shade); }
.wide { overflow-x: auto; }
svg { display: block; width: 100%; min-width: 34rem; height: auto; color: var(--ink); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .9rem .2rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); overflow-wrap: anywhere; }
th { font-weight: 600; white-space: nowrap; } td:first-child { white-space: nowrap; }
.numeric th:not(:first-child), .numeric td:not(:first-child) { text-align: right;
  white-space: nowrap; }
summary { cursor: pointer; font-size: 1.15rem; font-weight: 600; margin: 2.2rem 0 .5rem; }
"""
_MOST = 200  # evaluations and events; all of them are in the files of the run
# What stands above the tables of a run, as it must not be overlooked.
_LOUD = ("interrupted", "stopped", "unfinished", "empty")


def page(reports: Sequence[RunReport], curves: str) -> str:
    """Returns the page.

    Args:
        reports: at least one run.
        curves: an SVG element.
    """
    only = reports[0] if len(reports) == 1 else None
    title = f"{only.name}: {only.label}" if only else f"{len(reports)} runs"
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        # Nothing is to be fetched, whatever the texts of a run should contain.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'\">",
        f"<title>{_text(title)}</title>",
        f"<style>{_STYLE}</style>",
        "</head>",
        "<body>",
        f"<h1>{_text(title)}</h1>",
        *(_head(only) if only else _table(tables.overview(reports))),
        "<h2>curves</h2>",
        f'<div class="wide">{_drawing(curves)}</div>',
    ]
    for report in reports:
        if only is None:
            parts += [f"<h1>{_text(f'{report.name}: {report.label}')}</h1>", *_head(report)]
        parts += _run(report)
    return "\n".join([*parts, "</body>", "</html>", ""])


def _head(report: RunReport) -> Iterator[str]:
    yield f'<p class="result">{_text(tables.sentence(report))}.</p>'
    kind = "warn" if report.state in _LOUD else "soft"
    yield f'<p class="{kind}">{_text(report.reason)}</p>'
    for note in report.notes:
        yield f'<p class="warn">{_text(note)}</p>'


def _run(report: RunReport) -> Iterator[str]:
    yield from _section(tables.evaluations(report, _MOST), "There was none.")
    yield from _section(tables.throughput(report), "")
    yield from _section(tables.environment(report), "Nothing is recorded.")
    yield from _section(tables.checkpoints(report), "There is none.")
    unknown = "Not recorded: a run writes them when it ends."
    none = "It has called none of the ops." if report.backends else unknown
    yield from _section(tables.backends(report), none)
    yield from _section(tables.events(report, _MOST), "Nothing out of the ordinary was recorded.")
    shown = tables.settings(report)
    yield f"<details><summary>settings ({len(shown.rows)})</summary>"
    yield from _table(shown)
    yield "</details>"


def _section(table: Table, nothing: str) -> Iterator[str]:
    yield f"<h2>{_text(table.title)}</h2>"
    yield from _table(table) if table.rows else [f'<p class="soft">{_text(nothing)}</p>']


def _table(table: Table) -> Iterator[str]:
    yield f'<div class="wide"><table{" class=numeric" if table.numeric else ""}>'
    if table.header:
        cells = "".join(f'<th scope="col">{_text(text)}</th>' for text in table.header)
        yield f"<thead><tr>{cells}</tr></thead>"
    yield "<tbody>"
    for row in table.rows:
        yield f"<tr>{''.join(f'<td>{_text(text)}</td>' for text in row)}</tr>"
    yield "</tbody></table></div>"


def _drawing(curves: str) -> str:
    """Returns the SVG with a name for those who do not see it."""
    opening = '<svg role="img" aria-label="loss, accuracy and steps per second over steps"'
    return re.sub(r"^<svg", opening, curves, count=1)


def _text(text: str) -> str:
    # Control characters are no HTML, whatever a message holds.
    return escape("".join(c if c.isprintable() else " " for c in text))
