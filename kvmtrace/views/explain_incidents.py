"""Several incidents on one screen: their answers, and the stories of the worst."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from kvmtrace.judgement.actions import actions, named
from kvmtrace.judgement.urgency import Level, Urgency, urgency_of
from kvmtrace.model import Incident, Snapshot
from kvmtrace.views.answer import answer, word
from kvmtrace.views.explain import Showing, headed, headline, listing, paragraph, sections
from kvmtrace.views.format import Line, listed, style_of
from kvmtrace.views.stamp import blind_spots, sees_poison, watching_since

# Whole stories of so many incidents; of the others a line each, up to so many.
_STORIES = 3
_LINES = 30
_IDS = 3
_OVER = 3


def incidents(
    found: Sequence[Incident],
    snapshot: Snapshot,
    showing: Showing,
    reading: str | None = None,
    after: Iterable[Line] = (),
) -> Iterator[Line]:
    """The answers, the stamp, and the stories of the worst."""
    if len(found) == 1:
        yield from headline(found[0], snapshot, showing)
        yield from stamped(snapshot, showing, reading)
        yield from sections(found[0], snapshot, showing, after)
        return
    now = [one for one in found if urgency_of(one).level == Level.NOW]
    explained = (now or list(found))[: _STORIES if now else 1]
    yield from answers(found, snapshot, showing)
    yield from stamped(snapshot, showing, reading)
    yield from after
    for incident in explained:
        yield ()
        yield (("-" * showing.width, "dim"),)
        yield from headline(incident, snapshot, showing)
        yield from sections(incident, snapshot, showing)
    if len(explained) < len(found):
        yield ()
        others = f"The whole story of each other one: {_command('ID', showing)}"
        yield from paragraph(others, showing.width, "", "dim")


def _command(what: str, showing: Showing) -> str:
    return f"kvmtrace explain {what}{showing.command or ''}"


def answers(found: Sequence[Incident], snapshot: Snapshot, showing: Showing) -> Iterator[Line]:
    """A paragraph for each incident: urgency, answer, what to do and id.

    Pages of no VM that need the same, often nothing, share one.
    """
    groups: dict[tuple[Urgency, str], list[Incident]] = {}
    for incident in found:
        urgency = urgency_of(incident)
        brief = actions(incident, snapshot)[0].brief
        key = brief if urgency == Urgency.UNOWNED else incident.id
        groups.setdefault((urgency, key), []).append(incident)
    for (urgency, _), some in list(groups.items())[:_LINES]:
        ids = listed(one.id for one in some[:_IDS]) + (", …" if some[_IDS:] else "")
        text = answer(named(some[0], snapshot), snapshot, showing.end(snapshot))
        if len(some) > 1:
            text = f"{len(some)} pages, the last one: {text}"
        brief = actions(some[0], snapshot)[0].brief
        text = f"{text} {brief[:1].upper()}{brief[1:]} ({ids})."
        yield from headed(f"{word(urgency):<11}", style_of(urgency), text, showing.width)
    if len(groups) > _LINES:
        more = f"and {len(groups) - _LINES} more: kvmtrace top --once lists them"
        yield from paragraph(more, showing.width, "", "dim")


def over(found: Sequence[Incident], snapshot: Snapshot, showing: Showing) -> Iterator[Line]:
    """Incidents that are over, the last ones."""
    end = showing.end(snapshot)
    items = [
        f"{one.id}: {answer(named(one, snapshot), snapshot, end).removeprefix('It is over: ')}"
        for one in found[:_OVER]
    ]
    if found[_OVER:]:
        items.append(f"and {len(found) - _OVER} more")
    yield from listing("What is over", items, showing.width)


# -- what stands on every screen


def healthy(
    text: str,
    snapshot: Snapshot,
    showing: Showing,
    reading: str | None = None,
    *,
    in_doubt: bool = False,
) -> Iterator[Line]:
    """An answer without a poisoned page: OK only if nothing that matters was missed."""
    is_clear = sees_poison(snapshot) and not in_doubt
    since = watching_since(snapshot, showing.end(snapshot))
    head, style = ("OK", "") if is_clear else ("UNCLEAR", "warn")
    yield from headed(head, style, f"{text}, {since}.", showing.width)
    yield from stamped(snapshot, showing, reading)


def stamped(snapshot: Snapshot, showing: Showing, reading: str | None) -> Iterator[Line]:
    """The stamp, and how the target was read."""
    for line in showing.stamp.lines(snapshot, showing.end(snapshot), showing.width):
        yield ((line, "dim"),)
    if reading is not None:
        yield from paragraph(f"Read {reading}.", showing.width, "", "dim")


def not_known(snapshot: Snapshot, showing: Showing) -> Iterator[Line]:
    """What may be wrong all the same, unseen."""
    yield from listing("Not known", blind_spots(snapshot), showing.width)
