"""Help of the command line: commands in groups with examples, variables for their options."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import click

from kvmtrace.cli import configuration
from kvmtrace.cli.configuration import key_of
from kvmtrace.cli.errors import Group
from kvmtrace.errors import UsageError

PREFIX = "KVMTRACE"


class GroupedCommands(Group):
    """Commands in sections of the help. Each has examples, and variables for its options.

    Their settings may also stand in the configuration file. The module of a command, of the same
    name, is imported when the command is asked for; ``commands`` imports all.
    """

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        self.examples: dict[str, Sequence[str]] = {}
        self._sections: dict[str, list[str]] = {}
        self._imported: dict[str, click.Command] = {}
        super().__init__(*arguments, **settings)

    def add(self, section: str, name: str, *examples: str) -> None:
        """Add a command with its examples; the first one is shown beside its summary."""
        self._sections.setdefault(section, []).append(name)
        self.examples[name] = examples

    @property  # type: ignore[override]
    def commands(self) -> dict[str, click.Command]:
        """All commands by name."""
        return {name: self._command(name) for name in self.examples}

    @commands.setter
    def commands(self, commands: dict[str, click.Command]) -> None:
        assert not commands, "see add"

    def list_commands(self, _ctx: click.Context) -> list[str]:
        return sorted(self.examples)

    def get_command(self, _ctx: click.Context, cmd_name: str) -> click.Command | None:
        return self._command(cmd_name) if cmd_name in self.examples else None

    def _command(self, name: str) -> click.Command:
        if name not in self._imported:
            found = vars(importlib.import_module(f"kvmtrace.cli.{name}")).values()
            command = next(
                one for one in found if isinstance(one, click.Command) and one.name == name
            )
            heading = "Example" if len(self.examples[name]) == 1 else "Examples"
            examples = (f"  {one}" for one in self.examples[name])
            command.epilog = "\n".join(["\b", f"{heading}:", *examples])
            _name_variables(command)
            self._imported[name] = command
        return self._imported[name]

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command, and give it the settings of the configuration file."""
        name, command, rest = super().resolve_command(ctx, args)
        # Completion is silent, and `config` names the file that it reads.
        if name is not None and not ctx.resilient_parsing and not isinstance(command, click.Group):
            try:
                settings = configuration.find(ctx.params["config_file"])
                ctx.default_map = {name: settings.defaults(self, name)}
                configuration.attach(ctx, settings)
            except UsageError as error:
                if not set(rest) & set(ctx.help_option_names):
                    if refuse := getattr(command, "refuse", None):  # in a way of its own
                        refuse(error.message)
                    raise
        return name, command, rest

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write all sections. Summaries are wrapped, not cut."""
        width = max(len(name) for name in self.examples)
        for section, names in self._sections.items():
            rows = []
            for name in names:
                summary = self._command(name).get_short_help_str(limit=1000)
                rows.append((name.ljust(width), summary))
                rows += [("", f"$ {one}") for one in self.examples[name][:1]]
            with formatter.section(section):
                formatter.write_dl(rows)


def variable(command: str, option: click.Option) -> str:
    """The name of the environment variable for an option: ``KVMTRACE_TOP_INTERVAL``."""
    return f"{PREFIX}_{command}_{key_of(option)}".upper()


def _name_variables(command: click.Command) -> None:
    for option in command.params:
        if isinstance(option, click.Option) and option.envvar is None:
            option.envvar = [variable(command.name or "", option)]
            if key_of(option) in configuration.FOR_ALL:
                option.envvar.append(f"{PREFIX}_{key_of(option)}".upper())
