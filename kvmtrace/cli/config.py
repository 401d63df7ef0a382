"""``kvmtrace config``: whether the configuration is right, and what it changes."""

from __future__ import annotations

import copy
import difflib
import json
import os
from collections.abc import Iterator
from typing import Any

import click
from click.core import ParameterSource

from kvmtrace.cli import configuration
from kvmtrace.cli.configuration import Settings, keys_of
from kvmtrace.cli.console import print_line, print_status
from kvmtrace.errors import UsageError
from kvmtrace.sanitize import clean

_MAX_LINE = 8192


@click.group()
def config() -> None:
    """Check the configuration: /etc/kvmtrace/kvmtrace.toml, and variables."""


@config.command()
@click.argument("file", required=False, type=click.Path(), metavar="[FILE]")
@click.pass_context
def check(ctx: click.Context, file: str | None) -> None:
    """Check a file and all variables.

    Prints what differs from the defaults, and where it was set. FILE: instead of the one that
    commands take.
    """
    root = ctx.find_root()
    group = root.command
    assert isinstance(group, click.Group)
    settings = configuration.read(file) if file else configuration.find(root.params["config_file"])
    configuration.attach(root, settings)
    _check_variables(group)
    lines = dict.fromkeys(
        line for name in group.commands for line in _differing(root, group, settings, name)
    )
    _check_web_config(root, group, settings)
    print_line(
        f"ok: {clean(settings.path or f'no configuration file ({configuration.PATH})', _MAX_LINE)}"
    )
    for line in lines:
        print_line(clean(line, _MAX_LINE))


def _check_variables(group: click.Group) -> None:
    """Raise UsageError for a variable that is named like an option that there is not."""
    names = {
        name
        for command in group.commands.values()
        for option in keys_of(command).values()
        for name in option.envvar or ()
    }
    for given in sorted(set(os.environ) - names):
        if any(given.startswith(f"KVMTRACE_{name.upper()}_") for name in group.commands):
            near = difflib.get_close_matches(given[:64], names, 1)
            hint = f"did you mean {near[0]}?" if near else f"unset {given}"
            raise UsageError(f"{given}: there is no option of this name", hint)


def _check_web_config(root: click.Context, group: click.Group, settings: Settings) -> None:
    """Raise UsageError if the file of ``serve --web.config.file`` is wrong."""
    serve = group.commands["serve"]
    option = keys_of(serve)["web_config_file"]
    with click.Context(serve, root, "serve", default_map=settings.defaults(group, "serve")) as ctx:
        path = _value(ctx, option)
    if isinstance(path, str):  # click has a value of its own for none
        # Loads YAML and bcrypt.
        from kvmtrace.views.web.security import Security  # noqa: PLC0415

        try:
            Security(path, print_status)
        except UsageError as error:
            where = f"{settings.path}: serve.web_config_file: " if settings.path else ""
            raise UsageError(where + error.message, error.hint) from None


def _differing(
    root: click.Context, group: click.Group, settings: Settings, name: str
) -> Iterator[str]:
    """A line for each setting of a command that is not the default. Raises click.UsageError."""
    command = group.commands[name]
    values = settings.defaults(group, name)
    for key, option in keys_of(command).items():
        with click.Context(command, root, name, default_map=values) as ctx:
            value = _value(ctx, option)
            source = ctx.get_parameter_source(option.name or "")
        if source == ParameterSource.DEFAULT_MAP:
            given = settings.value(name, key)
            line = f"{settings.section(name, key)}.{key} = {json.dumps(given, default=str)}  (file)"
        elif source == ParameterSource.ENVIRONMENT:
            variable = next(one for one in option.envvar or () if os.environ.get(one))
            line = f"{name}.{key} = {os.environ[variable]}  ({variable})"
        else:
            continue
        alone = copy.copy(option)
        alone.envvar = None
        with click.Context(command, root, name, default_map={}) as ctx:
            if _value(ctx, alone) != value:
                yield line


def _value(ctx: click.Context, option: click.Option) -> Any:
    """What an option has without a command line; None for one that must be given there."""
    try:
        return option.handle_parse_result(ctx, {}, [])[0]
    except click.MissingParameter:
        return None
