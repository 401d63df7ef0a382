"""The live table on a terminal: Textual draws the lines of ``screen`` and passes keys to a UiState.

One widget draws all lines and redraws only those that changed: over ssh that is a hundredth of what
a table widget sends. The mouse is left to the terminal, so that an address can be selected and
copied.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

from rich.segment import Segment
from rich.style import Style
from textual import events
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.geometry import Region
from textual.strip import Strip
from textual.widget import Widget

from kvmtrace.errors import KvmtraceError
from kvmtrace.views.format import cells, counted, plain
from kvmtrace.views.terminal import pages
from kvmtrace.views.terminal.screen import Drawn, frame
from kvmtrace.views.terminal.ui_state import UiState, Wish
from kvmtrace.views.terminal.watched import Watched

# The terminal's own sixteen colours: legible on dark and on light. No meaning is in colour alone.
_STYLES = {
    "": Style.null(),
    "title": Style(bold=True),
    "head": Style(underline=True),
    "sorted": Style(underline=True, bold=True),
    "bad": Style(color="red", bold=True),
    "warn": Style(color="yellow"),
    "note": Style(color="cyan"),
    "dim": Style(dim=True),
}
_SELECTED = Style(reverse=True)
_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
# Textual's driver sets handlers for these and does not restore them.
_BORROWED = (*_SIGNALS, signal.SIGTSTP, signal.SIGCONT, signal.SIGWINCH)


class Canvas(Widget):
    """The whole screen, line by line."""

    DEFAULT_CSS = "Canvas { width: 100%; height: 100%; background: ansi_default; }"

    def __init__(self, coloured: bool) -> None:
        super().__init__()
        self._lines: list[Drawn] = []
        self._styles_by_name = {
            name: style if coloured else style.without_color for name, style in _STYLES.items()
        }

    def draw(self, lines: list[Drawn]) -> None:
        """Show these lines; only those that changed are sent to the terminal."""
        old, self._lines = self._lines, lines
        if len(old) != len(lines):
            self.refresh()
            return
        changed = [
            Region(0, y, _changed_until(before, after, self.size.width), 1)
            for y, (before, after) in enumerate(zip(old, lines, strict=True))
            if before != after
        ]
        if changed:
            self.refresh(*changed)

    def render_line(self, y: int) -> Strip:
        drawn = self._lines[y] if y < len(self._lines) else Drawn()
        over = _SELECTED if drawn.selected else Style.null()
        # Segments, not markup: a VM may be called "[red]".
        segments = [
            Segment(text, self._styles_by_name[style] + over) for text, style in drawn.line if text
        ]
        return Strip(segments).adjust_cell_length(self.size.width, over).simplify()


class TopApp(App[None]):
    """The display; start it with ``run``. Tests drive it with Textual's pilot.

    ``failure``: the exception that ended it, if any.
    """

    ENABLE_COMMAND_PALETTE = False
    CSS = "Screen { background: ansi_default; overflow: hidden; }"
    # Textual's own ctrl+c only explains how to quit.
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("ctrl+c", "leave", show=False, priority=True),
        # After a kernel message on the console, or a torn line over ssh.
        Binding("ctrl+l", "redraw", show=False, priority=True),
        Binding("ctrl+z", "suspend_process", show=False, priority=True),
    ]

    def __init__(self, watched: Watched, interval: float) -> None:
        super().__init__(ansi_color=True)
        self.failure: BaseException | None = None
        self.state = UiState()
        self._watched = watched
        self._interval = interval
        self._canvas = Canvas(coloured=not os.environ.get("NO_COLOR"))
        self._bundling: threading.Thread | None = None

    def compose(self) -> ComposeResult:
        yield self._canvas

    def on_mount(self) -> None:
        for number in _SIGNALS:
            # A handler of the loop, not of signal.signal: it wakes a loop that waits.
            asyncio.get_running_loop().add_signal_handler(number, self.exit)
        # After ctrl+z the terminal no longer shows the screen.
        self.app_resume_signal.subscribe(self, lambda _: self.action_redraw())
        self.tick()
        self.set_interval(self._interval, self.tick)

    def on_unmount(self) -> None:
        for number in _SIGNALS:
            asyncio.get_running_loop().remove_signal_handler(number)

    def tick(self) -> None:
        """Take a snapshot and draw it unless paused. A failure of the source shows at once."""
        with self._failing():
            self._take()
            self.state.passed()
            self._draw()

    def _take(self) -> None:
        state, watched = self.state, self._watched
        snapshot = watched.snapshot()
        if state.paused:
            return
        state.status = watched.status()
        state.tape = watched.tape.place if watched.tape else ""
        state.empty = snapshot is None
        if snapshot is not None:
            state.take(snapshot, watched.now(), watched.recent())

    def on_key(self, event: events.Key) -> None:
        event.stop()
        event.prevent_default()  # there is no focus to move
        with self._failing():
            self._grant(self.state.press(event.key, event.character))
            self._draw()

    def _grant(self, wish: Wish) -> None:
        tape = self._watched.tape
        match wish:
            case Wish.QUIT:
                self.exit()
            case Wish.BUNDLE:
                self._start_bundle()
            case Wish.COPY:
                lines = [plain(line) for line in pages.shown_text(self.state)]
                # OSC 52: the terminal puts it into the clipboard, also over ssh, or ignores it.
                self.copy_to_clipboard("\n".join(lines) + "\n")
                self.state.say(f"sent {counted(len(lines), 'line')} to the terminal's clipboard")
            case Wish.NOTHING:
                pass
            case _ if tape is not None:
                match wish:
                    case Wish.PLAY:
                        tape.toggle()
                    case Wish.STEP_BACK:
                        tape.step(-1)
                    case Wish.STEP_ON:
                        tape.step(1)
                    case Wish.SLOWER:
                        tape.faster(0.5)
                    case Wish.FASTER:
                        tape.faster(2.0)
                self._take()
            case Wish.PLAY:
                self._take()
            case _:
                self.state.say("time goes on here; `kvmtrace top --from FILE` steps through it")

    def _start_bundle(self) -> None:
        make = self._watched.bundle
        if make is None:
            self.state.say("no bundle from here: `kvmtrace bundle -o FILE.tar.gz` makes one")
            return
        if self._bundling is not None and self._bundling.is_alive():
            self.state.say("a bundle is being written")
            return

        def work() -> None:
            try:
                said = make()
            except (KvmtraceError, OSError) as error:
                said = f"no bundle: {error}"
            with contextlib.suppress(RuntimeError):  # the display has ended meanwhile
                self.call_from_thread(self._say, said)

        self.state.say("writing a bundle …")
        self._bundling = threading.Thread(target=work, name="kvmtrace-bundle", daemon=True)
        self._bundling.start()

    def _say(self, message: str) -> None:
        self.state.say(message)
        self._draw()

    def on_paste(self, event: events.Paste) -> None:
        event.stop()
        with self._failing():
            if self.state.typing:
                for character in event.text:
                    self.state.press(character, character)
            self._draw()

    def on_resize(self, event: events.Resize) -> None:
        with self._failing():
            self._draw(event.size.width, event.size.height)

    def action_leave(self) -> None:
        self.exit()

    def action_redraw(self) -> None:
        self._canvas.refresh()

    def _draw(self, width: int | None = None, height: int | None = None) -> None:
        lines = frame(self.state, width or self.size.width, height or self.size.height)
        self._canvas.draw(lines)

    @contextmanager
    def _failing(self) -> Iterator[None]:
        # Textual would print a traceback with all locals; instead run() raises it.
        try:
            yield
        except Exception as failure:
            self.failure = self.failure or failure
            self.exit()


def run(watched: Watched, interval: float = 1.0) -> None:
    """Show it, anew every ``interval`` seconds, until the user quits or a signal comes.

    An exception of ``watched`` ends the display and is raised here, with the terminal restored.
    SIGTERM, SIGHUP and SIGINT end it as "q" does. Raises KvmtraceError if there is no terminal.
    """
    if not all(stream and stream.isatty() for stream in (sys.stdin, sys.stdout, sys.stderr)):
        raise KvmtraceError("top needs a terminal", "kvmtrace top --once prints the table once")
    watched.snapshot()  # what fails at once fails before the screen is taken
    before = {number: signal.getsignal(number) for number in _BORROWED}
    try:
        with _own_terminal_descriptor():
            app = TopApp(watched, interval)
            app.run(mouse=False)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
    if app.failure is not None:
        raise app.failure
    if app.return_code:
        raise KvmtraceError("the display failed", "kvmtrace top --once prints the table once")


@contextlib.contextmanager
def _own_terminal_descriptor() -> Iterator[None]:
    """Let Textual draw through a descriptor of its own.

    It draws on ``sys.__stderr__``, descriptor 2. A source in another thread may redirect that for a
    moment to catch messages of a C library, and a repaint would be lost.
    """
    original = sys.__stderr__
    terminal = os.fdopen(os.dup(2), "w", encoding="utf-8", errors="replace")
    sys.__stderr__ = terminal  # type: ignore[misc]
    try:
        yield
    finally:
        sys.__stderr__ = original  # type: ignore[misc]
        terminal.close()


def _changed_until(before: Drawn, after: Drawn, width: int) -> int:
    """The column after the last change; Textual redraws a line from its start up to it."""
    old, new = _cells(before), _cells(after)
    if old is None or new is None or before.selected != after.selected:
        return width
    blank = (" ", "")
    old += [blank] * (width - len(old))
    new += [blank] * (width - len(new))
    return max((x + 1 for x in range(width) if old[x] != new[x]), default=0)


def _cells(drawn: Drawn) -> list[tuple[str, str]] | None:
    """[(character, style)] by cell; None if a character is not one cell wide."""
    found = []
    for text, style in drawn.line:
        if cells(text) != len(text) or not text.isprintable():
            return None
        found += [(char, style) for char in text]
    return found
