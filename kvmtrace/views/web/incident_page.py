"""The page of one incident: what to do with its commands, and the whole story by ``explain``."""

from __future__ import annotations

import html
from collections.abc import Sequence

from kvmtrace.judgement.action import Action
from kvmtrace.judgement.actions import actions, steps
from kvmtrace.judgement.urgency import urgency_of
from kvmtrace.model import MAX_INCIDENTS, Incident, Snapshot
from kvmtrace.sanitize import clean
from kvmtrace.views.explain import explain_text, sentence
from kvmtrace.views.format import clip
from kvmtrace.views.tables.rows import IncidentRow
from kvmtrace.views.web.document import badge, document, host_name, stamp
from kvmtrace.views.web.landing import who_has

# Columns of the story where the window is wide, and on a phone.
WIDE = 96
NARROW = 42

# Commands of one step, which may be for as many VMs as the host has.
MOST_COMMANDS = 16

_SHOWN = 64


def render(incident: Incident, snapshot: Snapshot, now: int) -> str:
    """The page for an incident of ``snapshot``; ``now`` as for the landing page."""
    urgency = urgency_of(incident)
    host, who = host_name(snapshot), who_has(IncidentRow(incident, snapshot, now))
    todo = actions(incident, snapshot)
    never = dict.fromkeys(warning for action in todo for warning in action.never)
    return document(
        f"{urgency}: {who} on {host}",
        f'<p class="small"><a href="/">{html.escape(host)}</a></p>'
        f"<h1>{badge(urgency, urgency.level)} {html.escape(who)}</h1>{stamp(snapshot, now)}",
        f'<section class="answer {urgency.level}"><ol>{"".join(map(_step, steps(todo)))}</ol>'
        + "".join(f"<p>{html.escape(sentence(one))}</p>" for one in never)
        + f"</section><h2>The whole story</h2>{_story(incident, snapshot)}",
    )


def render_unknown(name: str) -> str:
    """The page for an id that no incident has; ``name`` is what the client sent."""
    shown = html.escape(clip(clean(name), _SHOWN))
    return document(
        "kvmtrace: no such incident",
        "<h1>No such incident</h1>",
        f"<p>No incident here has the id {shown or 'given'}.</p>"
        f"<p>kvmtrace remembers {MAX_INCIDENTS:,} incidents and forgets closed ones first. It"
        ' finds poisoned pages again when it starts: <a href="/">see all incidents</a>.</p>',
    )


def _step(actions_: Sequence[Action]) -> str:
    """Actions with one text, and the commands of each."""
    with_commands = [action for action in actions_ if action.commands]
    parts = [html.escape(sentence(actions_[0].text))]
    for action in with_commands[:MOST_COMMANDS]:
        who = action.vm.label if action.vm is not None and len(actions_) > 1 else ""
        if lead := ", ".join(filter(None, (who, action.how))):
            parts.append(f'<p class="small dim lead">{html.escape(lead)}:</p>')
        # One by one: the next may have to wait until the one before has had its effect.
        parts += (f'<pre class="command">{html.escape(one)}</pre>' for one in action.commands)
    if (more := len(with_commands) - MOST_COMMANDS) > 0:
        parts.append(f"<p>… and {more:,} more: kvmtrace explain has all</p>")
    return f"<li>{''.join(parts)}</li>"


def _story(incident: Incident, snapshot: Snapshot) -> str:
    # Two foldings, of which the style shows one: text for a terminal does not fold itself well.
    return "".join(
        f'<pre class="{css}">{html.escape(explain_text(incident, snapshot, width))}</pre>'
        for css, width in (("wide", WIDE), ("narrow", NARROW))
    )
