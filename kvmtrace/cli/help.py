"""Help of the command line: commands in groups with examples, variables for their options."""

from __future__ import annotations

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

    Their settings may also stand in the configuration file.
    """

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.examples: dict[str, Sequence[str]] = {}
        self._sections: dict[str, list[click.Command]] = {}

    def add(self, section: str, command: click.Command, *examples: str) -> None:
        """Add a command with its examples; the first one is shown beside its summary."""
        assert command.name is not None
        self.add_command(command)
        self._sections.setdefault(section, []).append(command)
        self.examples[command.name] = examples
        heading = "Example" if len(examples) == 1 else "Examples"
        command.epilog = "\n".join(["\b", f"{heading}:", *(f"  {one}" for one in examples)])
        _name_variables(command)

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
        width = max(len(name) for name in self.commands)
        for section, commands in self._sections.items():
            rows = []
            for command in commands:
                name = command.name or ""
                rows.append((name.ljust(width), command.get_short_help_str(limit=1000)))
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
