"""Tables of `make matrix` and of the two `make bench`, and the pages of docs/ that show them."""

from __future__ import annotations

from pathlib import Path

PAGES = {"matrix": Path("docs/tested.md"), "bench": Path("docs/costs.md")}
PAGES["bench-native"] = PAGES["bench"]
PAGES["survival"] = PAGES["survival-booted"] = Path("docs/service.md")


def save(what: str, text: str) -> None:
    """Write ``text`` to build/, where `make readme` finds it."""
    path = _saved(what)
    path.parent.mkdir(exist_ok=True)
    path.write_text(text.rstrip() + "\n")


def keep(what: str, text: str) -> None:
    """Put ``text`` between the marks ``<!-- what -->`` and ``<!-- /what -->`` of its page.

    Raises ValueError where they are not there.
    """
    old = PAGES[what].read_text()
    begin_mark = f"<!-- {what} -->\n"
    begin, end = old.index(begin_mark) + len(begin_mark), old.index(f"<!-- /{what} -->")
    PAGES[what].write_text(old[:begin] + text.rstrip() + "\n" + old[end:])


def _saved(what: str) -> Path:
    return Path("build") / f"{what}.md"


def main() -> None:
    """Keep what the last runs saved."""
    for what in PAGES:
        if _saved(what).exists():
            keep(what, _saved(what).read_text())


if __name__ == "__main__":
    main()
