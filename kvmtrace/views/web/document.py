"""HTML documents of ``serve``: the frame, the style and the escaping that its pages share.

A document is self-contained (no scripts, no other files), needs no sideways scrolling on a phone,
and is light or dark as the reader's system is. Colours stand for a ``Level``, and never alone: the
word is there, too.
"""

from __future__ import annotations

import html
from collections.abc import Iterable

from kvmtrace import __version__
from kvmtrace.model import Snapshot
from kvmtrace.views.format import Span, clock_of, day_of, zone_of

STYLE = """
:root { color-scheme: light dark;
--back: #ffffff; --card: #f6f8fa; --line: #d5dbe1; --text: #1c2127; --dim: #5a6470; --link: #0a58ca;
--now: #b3261e; --soon: #7a5000; --watch: #0b6374; --over: #5a6470;
--now-back: #fdecea; --soon-back: #fff4d6; --watch-back: #e4f5f8; --over-back: #f1f3f5; }
@media (prefers-color-scheme: dark) { :root {
--back: #0f1317; --card: #161b21; --line: #2b333b; --text: #dde3e9; --dim: #98a2ad; --link: #7db4ff;
--now: #ff8f86; --soon: #e5b752; --watch: #6fcfe2; --over: #98a2ad;
--now-back: #2c1716; --soon-back: #2a2210; --watch-back: #0e2530; --over-back: #1a2027; } }

* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--text); background: var(--back);
margin: 0 auto; padding: 1rem; max-width: 88rem; overflow-wrap: anywhere; }
h1 { font-size: 1.35rem; line-height: 1.3; margin: 0; }
h2, summary { font-size: 1.05rem; font-weight: 600; }
h2 { margin: 1.8rem 0 .5rem; } details { margin: 1.5rem 0 0; } summary { cursor: pointer; }
header, p, ol, ul { margin: 0 0 .6rem; } ol, ul { padding-left: 1.4rem; } li { margin: 0 0 .5rem; }
a { color: var(--link); } footer { margin: 2rem 0 0; } footer, .small { font-size: .9rem; }
.dim, .over, footer { color: var(--dim); } .title { font-weight: 600; }
.now, .bad { color: var(--now); } .soon, .warn { color: var(--soon); }
.watch, .note { color: var(--watch); }
.badge { font-size: .85em; font-weight: 700; letter-spacing: .03em; text-transform: uppercase; }

.answer { border-left: .3rem solid; border-radius: .3rem; padding: .7rem 1rem; margin: 0 0 1rem; }
.answer.now { background: var(--now-back); } .answer.soon { background: var(--soon-back); }
.answer.watch { background: var(--watch-back); } .answer.over { background: var(--over-back); }
.answer > * { color: var(--text); margin: 0; } .todo { font-size: 1.1rem; font-weight: 600; }

pre { font: .8rem/1.5 ui-monospace, "DejaVu Sans Mono", monospace; white-space: pre-wrap;
background: var(--card); border: 1px solid var(--line); border-radius: .3rem; padding: .6rem;
margin: .4rem 0 .8rem; }
.answer, pre { max-width: 60rem; } .answer a { display: inline-block; padding: .3rem 0; }
.answer li:first-child { font-weight: 600; } .answer .lead, pre { font-weight: 400; }
.lead { margin: .4rem 0 0; }
pre.command { font-size: .9rem; user-select: all; } pre.narrow { display: none; }

table { border-collapse: collapse; margin: .5rem 0; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .4rem 1rem .4rem 0; }
th { color: var(--dim); font-size: .8rem; font-weight: 600; white-space: nowrap; }
td { border-top: 1px solid var(--line); } .n { text-align: right; }
.name, .do { font-weight: 600; } .none { color: var(--dim); }
td { white-space: nowrap; } td.name { min-width: 16ch; } td.label { min-width: 20ch; }
td.name, td.label { white-space: normal; overflow-wrap: anywhere; } tr[class] { color: inherit; }

@media (max-width: 76rem) {
thead { display: none; } table, td { display: block; }
tbody { display: grid; gap: .7rem; grid-template-columns: repeat(auto-fill,
minmax(min(100%, 20rem), 1fr)); }
tr { display: flex; flex-wrap: wrap; align-content: flex-start; column-gap: .9rem;
background: var(--card); border: 1px solid var(--line); border-left: .3rem solid var(--line);
border-radius: .3rem; padding: .5rem .8rem; position: relative; }
td.name a::after { content: ""; position: absolute; inset: 0; }
tr.now { border-left-color: var(--now); } tr.soon { border-left-color: var(--soon); }
tr.watch { border-left-color: var(--watch); }
td { border: 0; padding: 0; min-width: 0; max-width: 100%; font-size: .9rem;
white-space: normal; overflow-wrap: anywhere; }
td.none, td.same { display: none; }
td[data-head]::before { content: attr(data-head) " "; color: var(--dim); font-size: .75rem; }
td.name { flex: 1 1 50%; font-size: 1.05rem; }
td.do { flex: 1 0 100%; font-size: 1.05rem; padding-bottom: .2rem; }
}
@media (max-width: 44rem) {
pre.wide { display: none; } pre.narrow { display: block; font-size: .74rem; padding: .5rem; }
}
"""


def document(title: str, header: str, body: str) -> str:
    """A whole document; ``title`` is text, ``header`` and ``body`` are HTML."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>"
        f"<header>{header}</header><main>{body}</main>"
        f'<footer><a href="/">host</a> · <a href="/metrics">metrics</a> · '
        f'<a href="/-/healthy">health</a> · kvmtrace {html.escape(__version__)}</footer>'
        "</body></html>\n"
    )


def host_name(snapshot: Snapshot) -> str:
    """The host's name, or kvmtrace's where it is not known."""
    return snapshot.host.name if snapshot.host is not None else "kvmtrace"


def stamp(snapshot: Snapshot, now: int) -> str:
    """HTML: when the document was made, and of what. ``now``: by the events' clock."""
    wall = snapshot.wall(now)
    parts = [f"as of {day_of(wall)} {clock_of(wall)} {zone_of(wall)}"]
    if (host := snapshot.host) is not None:
        why = f" ({host.source_why})" if host.source_why else ""
        parts += [f"Linux\N{NO-BREAK SPACE}{host.kernel}", f"source {host.source}{why}"]
    return f'<p class="dim small">{html.escape(" · ".join(parts))}</p>'


def badge(text: str, style: str) -> str:
    """HTML of an urgency in its colour."""
    return span(text, f"badge {style}")


def spans(line: Iterable[Span]) -> str:
    """HTML of a line of the tables."""
    return "".join(span(text, style) for text, style in line)


def span(text: str, style: str) -> str:
    """HTML of a piece of text in a style."""
    text = html.escape(text)
    return f'<span class="{style}">{text}</span>' if style else text


def classes(*css: str) -> str:
    """A ``class`` attribute; empty without classes."""
    named = " ".join(filter(None, css))
    return f' class="{html.escape(named)}"' if named else ""
