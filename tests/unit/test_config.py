"""The configuration file: what it sets, what counts before it, and what is refused."""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import Result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvmtrace import cli, data_files
from kvmtrace.cli import configuration
from kvmtrace.cli.configuration import COMMON, FOR_ALL, keys_of
from tests import docs
from tests.unit.command_line import invoke

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="what only root is protected from")
Write = Callable[[str], str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a configuration file; its path."""

    def written(text: str) -> str:
        path = tmp_path / "kvmtrace.toml"
        path.write_text(text)
        path.chmod(0o644)
        return str(path)

    return written


def replay(*arguments: str, config: str | None = None) -> Result:
    before = () if config is None else ("--config", config)
    return invoke(*before, "replay", str(docs.STORY), *arguments)


def kinds(result: Result) -> set[str]:
    assert result.exit_code == 0, result.stderr
    return {line.split()[1] for line in result.stdout.splitlines()}


# -- what counts


def test_the_command_line_counts_then_variables_then_the_file(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write('[common]\nutc = true\n[replay]\nevents = true\nkind = ["poison", "page"]\n')
    from_file = replay(config=path)
    assert kinds(from_file) == {"poison", "page"}
    assert all(line.split()[0].endswith("Z") for line in from_file.stdout.splitlines())
    monkeypatch.setenv("KVMTRACE_REPLAY_KIND", "exit")
    assert kinds(replay(config=path)) == {"exit"}
    assert kinds(replay("--kind", "sigbus", config=path)) == {"sigbus"}
    # The file of the variable is the same; the option's counts before it.
    monkeypatch.setenv("KVMTRACE_CONFIG", path)
    assert kinds(replay()) == {"exit"}
    monkeypatch.delenv("KVMTRACE_REPLAY_KIND")
    other = Path(path).with_name("other.toml")
    other.write_text("[replay]\njson = true\n")
    other.chmod(0o644)
    assert json.loads(replay(config=str(other)).stdout)["incidents"]


def test_a_command_s_own_section_counts_before_the_common_one(write: Write) -> None:
    result = invoke("config", "check", write('[common]\nsource="bpf"\n[top]\nsource="ftrace"\n'))
    assert sorted(result.stdout.splitlines()[1:]) == [
        'common.source = "bpf" (file)',
        'top.source = "ftrace" (file)',
    ]


def test_the_file_of_the_host(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write("[replay]\njson = true\n")
    monkeypatch.setattr(configuration, "PATH", path)
    assert not replay().stdout.startswith("{")  # the tests' variable is set and empty: no file
    monkeypatch.delenv("KVMTRACE_CONFIG")
    assert replay().stdout.startswith("{")
    monkeypatch.setattr(configuration, "PATH", path + "-gone")
    assert replay().exit_code == 0


def test_a_file_that_only_root_may_read_does_not_stop_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(path: str) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(configuration, "_read", refuse)
    monkeypatch.delenv("KVMTRACE_CONFIG")
    result = replay()
    assert result.exit_code == 0
    assert "Permission denied; its settings are not used" in result.stderr
    assert replay(config="/named").exit_code == 2


@pytest.mark.parametrize("key", ["max-vms", "max_vms"])
def test_keys_with_either_sign(key: str, write: Write) -> None:
    result = invoke("config", "check", write(f"[serve]\n{key} = 7\n"))
    assert result.stdout.splitlines()[1:] == ["serve.max_vms = 7 (file)"]


def test_a_point_in_an_option_is_an_underscore() -> None:
    option = click.Option(["--web.config.file", "web_config"])
    assert configuration.key_of(option) == "web_config_file"
    group = click.Group("g", {"serve": click.Command("serve", params=[option])})
    for written in ("web_config_file", "web.config-file"):
        found = configuration.Settings("f", {"serve": {written: "x"}})
        assert found.defaults(group, "serve") == {"web_config": "x"}
        assert found.value("serve", "web_config_file") == "x"


def test_help_is_there_whatever_the_file_has(write: Write) -> None:
    path = write("[[[")
    assert invoke("--config", path, "replay", "--help").exit_code == 0
    assert replay(config=path).exit_code == 2


def test_for_a_monitor_the_state_is_unknown_then(write: Write) -> None:
    result = invoke("--config", write("[check]\njson = 1\n"), "check")
    assert (result.exit_code, result.stderr) == (3, "")
    assert "check.json: is true or false" in result.stdout


# -- config check


def test_check_prints_what_is_not_the_default(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(
        '[common]\nsource = "bpf"\nutc = false\n'
        '[serve]\nhistory_days = 90\nallow_host = ["a", "b"]\nhook_timeout = 10\n'
    )
    monkeypatch.setenv("KVMTRACE_TOP_INTERVAL", "2s")
    monkeypatch.setenv("KVMTRACE_EVENTS_DURATION", "")
    result = invoke("config", "check", path)
    assert result.exit_code == 0, result.stderr
    first, *others = result.stdout.splitlines()
    assert first == f"ok: {path}"
    assert sorted(others) == [
        'common.source = "bpf" (file)',
        'serve.allow_host = ["a", "b"] (file)',
        "serve.hook_timeout = 10 (file)",
        "top.interval = 2s (KVMTRACE_TOP_INTERVAL)",
    ]
    assert invoke("--config", path, "config", "check").stdout == result.stdout


def test_check_reads_the_web_configuration_too(write: Write, tmp_path: Path) -> None:
    web = tmp_path / "web.yml"
    path = write(f'[serve]\nweb_config_file = "{web}"\n')
    web.write_text("tls_server_confg: {}\n")
    result = invoke("config", "check", path)
    assert result.exit_code == 2
    assert f"{web}: " in result.stderr
    web.write_text("http_server_config: {headers: {X-Frame-Options: deny}}\n")
    assert invoke("config", "check", path).exit_code == 0


def test_check_without_a_file() -> None:
    result = invoke("config", "check")
    assert (result.exit_code, result.stdout) == (
        0,
        "ok: no configuration file (/etc/kvmtrace/kvmtrace.toml)\n",
    )


def test_check_finds_variables_of_no_option(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVMTRACE_SERVE_MAXVMS", "7")
    result = invoke("config", "check")
    assert result.exit_code == 2
    assert "hint: did you mean KVMTRACE_SERVE_MAX_VMS?" in result.stderr


def test_check_finds_values_of_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVMTRACE_SERVE_MAX_VMS", "many")
    result = invoke("config", "check")
    assert result.exit_code == 2
    assert "KVMTRACE_SERVE_MAX_VMS in the environment has that value" in result.stderr


# -- what is refused


@pytest.mark.parametrize(
    ("text", "what", "hint"),
    [
        ("[serv]", "serv: there is no such section", "did you mean [serve]?"),
        ("[zzz]", "zzz: there is no such section", "sections: common, top"),
        ("max_vms = 1", "max_vms: stands in no section", "put it under [serve]"),
        ("utc = true", "utc: stands in no section", "put it under [common]"),
        ("[[serve]]", "serve: is a section, not a value", "write [serve]"),
        ("[serve]\nmax_vmz = 1", "serve.max_vmz: there is no such", "did you mean max_vms?"),
        ("[serve]\ninterval = 1", "serve.interval: there is no such", "put it under [top]"),
        ("[common]\nonce = true", "common.once: there is no such", "put it under [top]"),
        ("[top]\nversion = true", "top.version: there is no such", "settings: once"),
        ("[serve]\nmax-vms = 1\nmax_vms = 1", "serve.max_vms: is given twice", "the same"),
        ("[serve]\nmax_vms = 'x'", "serve.max_vms: 'x' is not a valid", "--max-vms takes"),
        ("[serve]\nmax_vms = 0", "serve.max_vms: 0 is not in the range", "--max-vms takes"),
        ("[serve]\nmax_vms = 1.5", "serve.max_vms: '1.5' is not a valid", "--max-vms takes"),
        ("[serve]\nmax_vms = true", "serve.max_vms: takes text or a number, not true", ""),
        ("[serve]\nmax_vms = [1]", "serve.max_vms: takes one value, not a list", "brackets"),
        ("[serve.max_vms]", "serve.max_vms: takes text or a number, not a section", ""),
        ("[serve]\nallow_host = [[]]", "serve.allow_host: takes text or a number, not", ""),
        ("[serve]\nhistory_days = nan", "serve.history_days: 'nan' is not a number of days", ""),
        ("[serve]\nhistory = 'a\\u0000'".replace("'", '"'), "serve.history: has a NUL", ""),
        ("[serve]\nsource = 'dtrace'", "serve.source: 'dtrace' is not one of", "--source takes"),
        ("[common]\nsource = 'dtrace'", "common.source: 'dtrace' is not one of", "takes"),
        ("[serve]\non_incident = 'page'", "serve.on_incident: 'page' does not begin", ""),
        ("[top]\nonce = 1", "top.once: is true or false", "once = true"),
        ("[top]\ninterval = 'soon'", "top.interval: 'soon' is not a duration", ""),
        ("[top]\ninterval = 0x" + "f" * 9999, "top.interval: is too large a number", ""),
        ("[serve", "Expected ']'", "TOML"),
        ("a = " + "[" * 9999, "", ""),
    ],
)
def test_one_line_and_a_hint(text: str, what: str, hint: str, write: Write) -> None:
    path = write(text)
    result = invoke("config", "check", path)
    assert result.exit_code == 2
    assert (result.stdout, len(result.stderr.splitlines())) == ("", 2)
    assert result.stderr.startswith(f"kvmtrace: {path}: {what}")
    assert hint in result.stderr.splitlines()[1]


def test_a_command_refuses_what_concerns_it(write: Write) -> None:
    path = write("[serve]\nmax_vmz = 1\n[replay]\nkind = 'zzz'\n")
    result = replay(config=path)
    assert result.exit_code == 2
    assert f"{path}: replay.kind: 'zzz' is no kind" in result.stderr
    assert "max_vmz" in invoke("--config", path, "serve").stderr
    assert replay(config=write("[serve]\nmax_vmz = 1\n")).exit_code == 0


def test_files_that_are_none(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    (tmp_path / "large").write_bytes(b"#" * (1 << 20) + b"\n")
    for name, what in {
        "gone": "No such file",
        "fifo": "is no regular file",
        ".": "Is a directory",
        "binary": "can't decode",
        "large": "is larger than 1 MiB",
    }.items():
        path = tmp_path / name
        if path.is_file():
            path.chmod(0o644)
        result = invoke("config", "check", str(path))
        assert result.exit_code == 2
        assert what in result.stderr


@as_root
def test_what_others_may_write_is_refused(write: Write, tmp_path: Path) -> None:
    path = write("[replay]\njson = true\n")
    os.chmod(path, 0o664)
    result = replay(config=path)
    assert result.exit_code == 2
    assert f"others than root may write to {path}" in result.stderr
    os.chmod(path, 0o644)
    tmp_path.chmod(0o777)
    assert f"may write to {tmp_path}\n" in replay(config=path).stderr
    tmp_path.chmod(0o1777)
    assert replay(config=path).exit_code == 0
    os.chown(path, 65534, -1)
    assert replay(config=path).exit_code == 2
    link = tmp_path / "link"
    link.symlink_to(path)
    assert f"may write to {path}\n" in replay(config=str(link)).stderr


# -- the file that is shipped

SHIPPED = (data_files.directory("assets") / "kvmtrace.toml").read_text()
SERVICE = (docs.ROOT / "docs/service.md").read_text()
# Without a default: the shipped file has examples.
EXAMPLES = {"history", "on_incident", "web_config_file"}


def test_the_shipped_file_changes_nothing(write: Write) -> None:
    assert set(tomllib.loads(SHIPPED)) == {COMMON, "serve"}
    result = invoke("config", "check", write(SHIPPED))
    assert (result.exit_code, len(result.stdout.splitlines())) == (0, 1)


def test_the_shipped_file_shows_each_setting_with_its_default(write: Write) -> None:
    """A new option of serve has its line in kvmtrace/assets/kvmtrace.toml."""
    active = re.sub(r"^#(?=\w+ = )", "", SHIPPED, flags=re.MULTILINE)
    tables = tomllib.loads(active)
    serve = keys_of(cli.cli.commands["serve"])
    assert set(tables[COMMON]) == set(FOR_ALL)
    assert set(tables["serve"]) == set(serve) - set(FOR_ALL)
    without = re.sub(rf"^(?=(?:{'|'.join(EXAMPLES)}) = )", "#", active, flags=re.MULTILINE)
    result = invoke("config", "check", write(without))
    assert result.exit_code == 0, result.stderr
    differing = {line.split()[0] for line in result.stdout.splitlines()[1:]}
    for place in differing:  # the command knows the default, not the option
        key = place.removeprefix("serve.")
        assert f"[default: {tables['serve'][key]}]" in (serve[key].help or "")
    assert differing <= {"serve.listen", "serve.max_vms"}


@pytest.mark.parametrize(
    "text", re.findall(r"^```toml\n(.*?)^```$", SERVICE, re.MULTILINE | re.DOTALL)
)
def test_what_the_documentation_shows_is_right(text: str, write: Write) -> None:
    result = invoke("config", "check", write(text.replace("/usr/local/bin/page-oncall", "/bin/sh")))
    assert result.exit_code == 0, result.stderr
    assert len(result.stdout.splitlines()) > 1


# -- any file

KEYS = [key for command in cli.cli.commands.values() for key in keys_of(command)]
SECTIONS = [COMMON, *cli.cli.commands]
WORDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
VALUES = st.recursive(
    st.one_of(
        st.booleans(),
        st.integers(-(2**70), 2**70),
        st.floats(),
        WORDS,
        st.sampled_from(["5m", "20:15", "auto", "poison", "/bin/true", "-", "'", "\0", "1e999"]),
        st.datetimes(),
        st.dates(),
        st.times(),
    ),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=4,
)
FILES = st.dictionaries(
    st.sampled_from(SECTIONS),
    st.dictionaries(st.one_of(st.sampled_from(KEYS), WORDS), VALUES, max_size=3),
    max_size=3,
)


def toml(value: Any) -> str:
    match value:
        case list():
            return f"[{', '.join(map(toml, value))}]"
        case bool():
            return str(value).lower()
        case str():
            return json.dumps(value).replace("\x7f", "\\u007f")
        case int() | float():
            return str(value)
    return str(value.isoformat())


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(FILES)
def test_any_file_is_right_or_refused_in_one_line(
    write: Write, tables: dict[str, dict[str, Any]]
) -> None:
    lines = []
    for section, table in tables.items():
        lines.append(f"[{section}]")
        lines += [f"{toml(key)} = {toml(value)}" for key, value in table.items()]
    path = write("\n".join(lines))
    result = invoke("config", "check", path)
    assert result.exit_code in (0, 2), result.stderr
    if result.exit_code:
        assert result.stderr.startswith(f"kvmtrace: {path}: ")
        assert [line[:5] for line in result.stderr.splitlines()] == ["kvmtr", "hint:"]
    else:
        assert result.stderr == ""


def test_options_without_values_are_not_needed(write: Write) -> None:
    """`bundle` must be given --output: a file without it is right, and one with it, too."""
    assert isinstance(keys_of(cli.cli.commands["bundle"])["output"], click.Option)
    path = write('[bundle]\noutput = "case.tar.gz"\n')
    result = invoke("config", "check", path)
    assert result.stdout.splitlines()[1:] == ['bundle.output = "case.tar.gz" (file)']
