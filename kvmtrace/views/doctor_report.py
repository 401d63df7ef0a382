"""The report of ``kvmtrace doctor``: its checks and the verdict, as text and as JSON."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from kvmtrace.source_choice import Attempt
from kvmtrace.views import json_output

PROBE = "probe "
"""How the names of checks of probes begin."""

_MIN_TEXT_WIDTH = 20  # beside the name of a check
_WITHOUT = "`kvmtrace doctor --verbose` has what is not seen without each"


@dataclass(frozen=True, slots=True)
class Check:
    """One line. ``ok``: True, False, or None for a note.

    ``detail``: the message of a library or of the kernel, word for word.
    """

    name: str
    ok: bool | None
    found: str
    fix: str = ""
    detail: str | None = None

    @property
    def cure(self) -> str | None:
        """The fix, where one is needed and known."""
        return self.fix if self.fix and not self.ok else None


@dataclass(frozen=True, slots=True)
class Report:
    """All checks and the verdict. ``ok``: memory-fault exits can be seen on this host."""

    checks: tuple[Check, ...]
    attempts: tuple[Attempt, ...]
    ok: bool
    verdict: str


def with_texts(report: Report, change: Callable[[str], str]) -> Report:
    """The report with ``change`` applied to all texts from the host."""
    checks = (
        replace(
            check,
            found=change(check.found),
            fix=change(check.fix),
            detail=check.detail and change(check.detail),
        )
        for check in report.checks
    )
    return replace(report, checks=tuple(checks))


def as_object(report: Report) -> dict[str, Any]:
    """The object that ``doctor --json`` prints."""
    return {
        "ok": report.ok,
        "verdict": report.verdict,
        "checks": [
            json_output.known(name=c.name, ok=c.ok, found=c.found, fix=c.cure, detail=c.detail)
            for c in report.checks
        ],
        "sources": [
            json_output.known(
                name=attempt.kind,
                works=attempt.refused is None,
                why=attempt.refused,
                detail=attempt.detail,
                probes=[json_output.probe(probe) for probe in attempt.probes],
            )
            for attempt in report.attempts
        ],
    }


def render(
    report: Report, *, ascii_only: bool = False, width: int | None = None, verbose: bool = False
) -> str:
    """The report as text. Each line has a sign and a word, so that it reads without the sign too.

    ``width``: in columns; None: lines of any length. ``verbose``: with the messages of libraries
    and of the kernel.
    """
    signs = (
        {True: "ok", False: "no", None: "--"} if ascii_only else {True: "✓", False: "✗", None: "–"}
    )
    words = {True: "yes", False: "NO", None: "note"}
    checks = report.checks if verbose else _brief(report)
    name_width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        word = f"{signs[check.ok]} {words[check.ok]:<4}"
        head = f"{word}  {check.name:<{name_width}}  "
        below = " " * len(head)
        lines += _wrapped(check.found, head, below, width)
        if fix := check.cure:
            lines += _wrapped(fix, f"{below}→ ", f"{below}  ", width)
        if verbose and check.detail:
            lines += _wrapped(check.detail, f"{below}| ", f"{below}| ", width)
    lines += ["", f"{signs[report.ok]} {report.verdict}"]
    text = "\n".join(lines)
    return text.replace("→ ", "> ") if ascii_only else text


def _brief(report: Report) -> list[Check]:
    """The checks, with probes that are missing for one reason together in one line."""
    works = any(attempt.refused is None for attempt in report.attempts)
    missing: dict[str, list[Check]] = {}
    brief: list[Check] = []
    for check in report.checks:
        if not check.name.startswith(PROBE) or check.ok:
            brief.append(check)
        else:
            reason = check.found if works else "not tried: no source works"
            missing.setdefault(reason, []).append(check)
    for reason, alike in missing.items():
        if len(alike) == 1 and works:
            brief += alike
        else:
            names = ", ".join(check.name.removeprefix(PROBE) for check in alike)
            brief.append(Check(f"{len(alike)} probes", False, f"{reason}: {names}", _WITHOUT))
    return brief


def _wrapped(text: str, head: str, below: str, width: int | None) -> list[str]:
    if width is None:
        return [head + text]
    return textwrap.wrap(
        text,
        max(width, len(head) + _MIN_TEXT_WIDTH),
        initial_indent=head,
        subsequent_indent=below,
        break_long_words=False,
        break_on_hyphens=False,
    )
