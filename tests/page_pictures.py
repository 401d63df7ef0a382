"""Pictures of `serve`'s pages for docs/, as a browser shows them: `make page-pictures`."""

from __future__ import annotations

import hashlib
import os
import time
from dataclasses import dataclass
from pathlib import Path

from kvmtrace import __version__
from kvmtrace.views.web import incident_page, landing
from tests import browser, docs, png

_AFTER = 20_000_000_000  # ns from the end of the story until somebody looks


@dataclass(frozen=True)
class Picture:
    """A picture: of the landing page, or of the page of an ``incident`` of the story."""

    width: int
    dark: bool
    incident: str | None = None

    @property
    def path(self) -> Path:
        """Where it is."""
        page = "page" if self.incident is None else "incident"
        scheme = "dark" if self.dark else "light"
        return docs.ROOT / f"docs/{page}-{self.width}-{scheme}.png"

    def html(self) -> str:
        """The document that it shows, without the version, which changes at every release."""
        *_, snapshot = docs.snapshots()
        now = (snapshot.last_ts or 0) + _AFTER
        if self.incident is None:
            html = landing.render(snapshot, now)
        else:
            (one,) = [one for one in snapshot.incidents if one.id == self.incident]
            html = incident_page.render(one, snapshot, now)
        return html.replace(f"kvmtrace {__version__}", "kvmtrace")

    def about(self) -> str:
        """What is kept in the picture, so that a test can tell whether it is of today's page."""
        return hashlib.sha256(self.html().encode()).hexdigest()


PICTURES = (
    *(Picture(width, dark) for width in (360, 800, 1400) for dark in (False, True)),
    Picture(360, True, "4f2311-1"),
    Picture(800, False, "4f2311-1"),
)


def main() -> None:
    """Take all pictures anew, in UTC."""
    os.environ["TZ"] = "UTC"
    time.tzset()
    with browser.browser() as chromium:
        for one in PICTURES:
            chromium.show(one.html(), one.width, height=400, dark=one.dark)
            one.path.write_bytes(png.small(chromium.picture(), one.about()))


if __name__ == "__main__":
    if why := browser.missing():
        raise SystemExit(why)
    main()
