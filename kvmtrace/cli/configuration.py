"""The configuration file: found, read, and checked against the options that there are.

A section for each command has keys with the names of its options; ``[common]`` has those that are
wanted for all commands. Click takes them where neither the command line nor a variable has a value,
and checks the values as it checks those.
"""

from __future__ import annotations

import datetime
import difflib
import os
import re
import shlex
import stat
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import click

from kvmtrace.cli.console import print_status
from kvmtrace.errors import UsageError
from kvmtrace.linux.writers import others_may_write

PATH = "/etc/kvmtrace/kvmtrace.toml"
VARIABLE = "KVMTRACE_CONFIG"
COMMON = "common"
FOR_ALL = ("source", "utc", "history")
"""Options that may be wanted for all commands of a shell, of a host or of a service."""

_META = "kvmtrace.settings"
_MAX_BYTES = 1 << 20


def key_of(option: click.Option) -> str:
    """The name of an option as a key: as it is typed, with underscores."""
    # Click's own choice would be the name of the argument in Python.
    return _plain(max(option.opts, key=len).lstrip("-"))


def _plain(name: str) -> str:
    # Points, too: no shell sets a variable that has one, and in TOML they part tables.
    return re.sub("[-.]", "_", name)


def keys_of(command: click.Command) -> dict[str, click.Option]:
    """{key: option} of a command."""
    options = (one for one in command.params if isinstance(one, click.Option))
    return {key_of(option): option for option in options}


@dataclass(frozen=True)
class Settings:
    """What a configuration file has. ``path`` None: there is no file."""

    path: str | None = None
    tables: Mapping[str, Any] = field(default_factory=dict)

    def defaults(self, group: click.Group, name: str) -> dict[str, Any]:
        """Values for click's ``default_map`` of a command. Raises UsageError.

        Names are checked in the sections that this command takes, forms of values in its own
        settings.
        """
        if not self.tables:  # do not import the modules of all commands
            return {}
        self._check_sections(group)
        options = keys_of(group.commands[name])
        common = {key for one in group.commands.values() for key in keys_of(one)} & {*FOR_ALL}
        found = self._known(COMMON, common, group)
        found = {key: value for key, value in found.items() if key in options}
        found |= self._known(name, options, group)
        return {
            option.name or "": self._as_given(f"{self.section(name, key)}.{key}", value, option)
            for key, option in options.items()
            if (value := found.get(key)) is not None
        }

    def section(self, name: str, key: str) -> str:
        """The section from which a command takes a key that the file has."""
        return name if key in map(_plain, self.tables.get(name, {})) else COMMON

    def value(self, name: str, key: str) -> Any:
        """The value of a key that a command takes, as the file has it."""
        table = self.tables[self.section(name, key)]
        return next(value for written, value in table.items() if _plain(written) == key)

    def _check_sections(self, group: click.Group) -> None:
        sections = [COMMON, *(name for name, one in group.commands.items() if keys_of(one))]
        for name, table in self.tables.items():
            if name in sections:
                if not isinstance(table, dict):
                    raise self._error(name, "is a section, not a value", f"write [{name}]")
            elif isinstance(table, dict):
                hint = _nearest(name, sections, "[{}]") or f"sections: {', '.join(sections)}"
                raise self._error(name, "there is no such section", hint)
            else:
                hint = self._where(group, name) or f"sections: {', '.join(sections)}"
                raise self._error(name, "stands in no section", hint)

    def _known(self, section: str, keys: Iterable[str], group: click.Group) -> dict[str, Any]:
        """The keys of a section with underscores. Raises UsageError for unknown ones."""
        found: dict[str, Any] = {}
        for written, value in self.tables.get(section, {}).items():
            key = _plain(written)
            place = f"{section}.{written}"
            if key not in keys:
                hint = self._where(group, key) or _nearest(key, keys)
                raise self._error(
                    place, "there is no such setting", hint or f"settings: {', '.join(keys)}"
                )
            if key in found:
                raise self._error(place, "is given twice", "with - and _ it is the same")
            found[key] = value
        return found

    @staticmethod
    def _where(group: click.Group, key: str) -> str | None:
        key = _plain(key)
        if key in FOR_ALL:
            return f"put it under [{COMMON}]"
        having = [f"[{name}]" for name, one in group.commands.items() if key in keys_of(one)]
        return f"put it under {' or '.join(having)}" if having else None

    def _as_given(self, place: str, value: Any, option: click.Option) -> Any:
        """A value as the command line would have it: click converts text, and checks it."""
        if option.is_flag:
            if not isinstance(value, bool):
                raise self._error(place, "is true or false", f"{place.split('.')[1]} = true")
            return value
        if isinstance(value, list):
            texts = [self._text(place, one) for one in value]
            if option.multiple:
                return texts
            if option.metavar != "COMMAND":
                raise self._error(place, "takes one value, not a list", "leave out the brackets")
            return shlex.join(texts)
        return [self._text(place, value)] if option.multiple else self._text(place, value)

    def _text(self, place: str, value: Any) -> str:
        match value:
            case bool() | dict() | list():
                kind = "a list" if isinstance(value, list) else "true or false"
                kind = "a section" if isinstance(value, dict) else kind
                raise self._error(place, f"takes text or a number, not {kind}", _OPTIONS)
            case str() if "\0" in value:
                raise self._error(place, "has a NUL character", "text has no \\u0000")
            case datetime.date() | datetime.time():
                return value.isoformat()
        try:
            return str(value)
        except ValueError:  # more digits than Python converts
            raise self._error(place, "is too large a number", _OPTIONS) from None

    def _error(self, place: str, what: str, hint: str) -> UsageError:
        return UsageError(f"{self.path}: {place}: {what}", hint)


_OPTIONS = "`kvmtrace COMMAND --help` shows what each option takes"


def _nearest(word: str, words: Iterable[str], form: str = "{}") -> str | None:
    found = difflib.get_close_matches(word[:64], list(words), 1)
    return f"did you mean {form.format(found[0])}?" if found else None


def find(given: str | None) -> Settings:
    """The settings of a file that is named (by option or variable), or else of ``PATH``.

    A variable that is set and empty: no file. Raises UsageError, also if a named file is missing.
    """
    named = given or os.environ.get(VARIABLE)
    if named is None:
        return _of_host()
    return read(named) if named else Settings()


def _of_host() -> Settings:
    try:
        return _read(PATH)
    except FileNotFoundError:
        return Settings()
    except PermissionError as error:
        # It is root's, for serve; members of the group look without it.
        print_status(f"kvmtrace: {PATH}: {error.strerror}; its settings are not used")
        return Settings()
    except OSError as error:
        raise _unread(PATH, error) from None


def read(path: str) -> Settings:
    """The settings of a file. Raises UsageError."""
    try:
        return _read(path)
    except OSError as error:
        raise _unread(path, error) from None


def _unread(path: str, error: OSError) -> UsageError:
    return UsageError(f"{path}: {error.strerror}", f"name another file; {VARIABLE}= (empty): none")


def _read(path: str) -> Settings:
    if "\0" in path:
        raise UsageError(f"{path}: no name of a file", "--config FILE")
    # A FIFO would block, and its contents could not be attributed to anybody.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise UsageError(f"{path}: is no regular file", "--config FILE, or KVMTRACE_CONFIG")
        text = file.read(_MAX_BYTES + 1)
    if len(text) > _MAX_BYTES:
        raise UsageError(f"{path}: is larger than 1 MiB", "it has settings only")
    if os.geteuid() == 0 and (part := others_may_write(path)) is not None:
        # It names programs that run as root.
        raise UsageError(
            f"{path}: others than root may write to {part}",
            f"chown root:root {shlex.quote(part)} && chmod go-w {shlex.quote(part)}",
        )
    try:
        return Settings(path, tomllib.loads(text.decode()))
    except RecursionError:
        raise UsageError(f"{path}: is nested too deeply", "sections hold settings only") from None
    except ValueError as error:  # UnicodeDecodeError, TOMLDecodeError
        raise UsageError(
            f"{path}: {error}", "its form is TOML: [serve], then lines as max_vms = 1000"
        ) from None


def attach(ctx: click.Context, settings: Settings) -> None:
    """Note the settings that the commands of a context use."""
    ctx.meta[_META] = settings


def place_of(ctx: click.Context, option: click.Option) -> tuple[str, str]:
    """The file and the setting that gave an option of a command its value."""
    settings: Settings = ctx.meta[_META]
    name, key = ctx.info_name or "", key_of(option)
    return settings.path or "", f"{settings.section(name, key)}.{key}"
