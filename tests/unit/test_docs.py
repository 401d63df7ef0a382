"""README.md and docs/: commands run, output is current, links resolve, lists are complete."""

from __future__ import annotations

import gzip
import json
import os
import re
import shlex
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvmtrace import cli, model, sources
from kvmtrace.events import Event, Host, VmSeen
from kvmtrace.judgement.urgency import Urgency
from kvmtrace.linux import clock, host
from kvmtrace.model import Snapshot
from kvmtrace.probes import context_specs, specs
from kvmtrace.session.archive import Archive
from kvmtrace.sources.bpf import programs
from kvmtrace.sources.bpf.programs import Kept
from kvmtrace.sources.recording import RecordingSource
from kvmtrace.views.web import metrics
from kvmtrace.vmm import identity
from tests import docs
from tests.lab import readme
from tests.unit.command_line import invoke
from tests.unit.fake import FakeSource
from tests.unit.snapshots import HISTORY, small

README = docs.ROOT / "README.md"
TEXTS = {path.relative_to(docs.ROOT).as_posix(): path.read_text() for path in docs.PAGES}
LINES_OF_README = 180

# Commands that no unit test can run, and what runs them instead.
ELSEWHERE = {
    "kvmtrace top": "needs a terminal: tests/unit/test_top_pty.py; the pictures are drawn by it",
}
CHECK = "critical, as the story is; without a serve its state is unknown"
DOCTOR = "depends on this host: its status may be 1"


def blocks(kind: str) -> Iterator[tuple[str, str]]:
    for page, text in TEXTS.items():
        for block in re.findall(rf"^```{kind}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            yield page, block


def commands() -> Iterator[tuple[str, str]]:
    """Yield page and command for each kvmtrace in blocks of shell, without pipes and comments."""
    for page, block in blocks("sh"):
        for line in block.splitlines():
            words = list(shlex.shlex(line, posix=True, punctuation_chars="|>"))
            if "kvmtrace" in words:
                yield page, _of_kvmtrace(line)


def _of_kvmtrace(line: str) -> str:
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|>")
    lexer.whitespace_split = True
    parts: list[list[str]] = [[]]
    for word in lexer:
        if word in ("|", ">"):
            parts.append([])
        else:
            parts[-1].append(word)
    return shlex.join(next(part for part in parts if part[:1] == ["kvmtrace"]))


EXAMPLES = [("--help", one) for examples in cli.cli.examples.values() for one in examples]
COMMANDS = list(dict.fromkeys([*commands(), *EXAMPLES]))


# -- commands


class Story(FakeSource):
    """The recording as what has just happened on this host; then a signal if ``ends``."""

    def __init__(self, *, ends: bool) -> None:
        self._ends = ends
        recorded = RecordingSource(str(docs.STORY))
        events: list[Event] = []
        while not recorded.done:
            events += recorded.poll(0)
        recorded.close()
        shift = clock.now_ns() - events[-1].ts
        super().__init__([replace(event, ts=event.ts + shift) for event in events])

    def poll(self, timeout: float) -> list[Event]:
        is_over = not self._batches and not self.drained.is_set()
        events = super().poll(timeout)
        if is_over and self._ends:
            os.kill(os.getpid(), signal.SIGTERM)
        return events


@pytest.fixture
def story(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SimpleNamespace:
    """A directory with the recordings that commands name, and a host where the story happens."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    (tmp_path / "tests").symlink_to(docs.ROOT / "tests")
    recording = docs.STORY.read_bytes()
    (tmp_path / "sick.jsonl").write_bytes(recording)
    (tmp_path / "sick.jsonl.gz").write_bytes(gzip.compress(recording))
    (tmp_path / "case.tar.gz").write_bytes(gzip.compress(recording))
    (tmp_path / "case.jsonl").write_bytes(recording)
    (tmp_path / "web.yml").write_text("http_server_config: {headers: {X-Frame-Options: deny}}")
    (tmp_path / "kvmtrace.toml").write_text("[serve]\nmax_vms = 1000\n")
    monkeypatch.setenv("KVMTRACE_HISTORY", str(tmp_path / "history.db"))
    monkeypatch.setattr(identity, "vm_processes", lambda: {})
    monkeypatch.setattr(host, "privilege", lambda: host.Privilege(0, (1 << 41) - 1))
    monkeypatch.setattr(host, "kvm", lambda: host.Kvm(True, "kvm_intel", True, 1))
    monkeypatch.setattr(programs, "kept", lambda: Kept("/var/cache/kvmtrace", "0.31.0", None))
    ends = SimpleNamespace(by_signal=False)
    monkeypatch.setattr(sources, "open_source", lambda kind: Story(ends=ends.by_signal))
    return ends


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=str)
def test_commands_run(page: str, command: str, story: SimpleNamespace) -> None:
    if command in ELSEWHERE:
        pytest.skip(ELSEWHERE[command])
    arguments = shlex.split(command)[1:]
    name = arguments[0]
    arguments = ["sick.jsonl" if one == "-" else one for one in arguments]
    if name in ("record", "bundle", "assets"):
        arguments.append("--force")
    is_past = bool({"--since", "--at"} & {*arguments}) and "--from" not in arguments
    if is_past:
        _serve_has_kept_the_story()
    if name in ("explain", "bundle") and "--from" not in arguments and not is_past:
        arguments.append("--duration=0.2")
    if name == "serve" and "--listen" not in arguments:
        arguments.append("--listen=127.0.0.1:0")
    story.by_signal = name in ("serve", "events", "record")
    result = invoke(*arguments)
    if name == "doctor":
        assert result.exit_code in (0, 1), DOCTOR
        return
    if name == "check":
        assert result.exit_code in (2, 3), CHECK
        return
    assert result.exit_code == 0, result.stderr
    _keeps_its_promise(name, arguments, result.stdout)


def _serve_has_kept_the_story() -> None:
    archive = Archive(os.environ["KVMTRACE_HISTORY"], Host("hv-1", "6.18.15", "bpf"), print)
    archive.begin()
    events = Story(ends=False).poll(0)
    days = 2 * 86_400 * 10**9
    archive.add(replace(one, ts=one.ts - days) for one in events if isinstance(one, VmSeen))
    archive.add(events)
    archive.start()
    while archive.waits:
        time.sleep(0.01)
    archive.close()


def _keeps_its_promise(name: str, arguments: list[str], output: str) -> None:
    """Output is what the text around these commands says of it."""
    as_json = "--json" in arguments
    match name:
        case "top" if as_json:
            states = [one["state"] for one in json.loads(output)["incidents"]]
            assert states == ["looping", "delivered", "latent"]
        case "top" | "replay" if "--events" not in arguments:
            assert re.search(r"^looping +web-1 .* stop and start the VM", output, re.MULTILINE)
        case "explain" if "--at" in arguments:  # before it happened
            assert output.startswith("OK  web-1 has no poisoned page ")
        case "explain":
            assert output.startswith("LOOPING ")
            assert "\nDo\n" in output
        case "events" | "replay" if as_json:
            assert all({"ts", "kind"} <= set(json.loads(line)) for line in output.splitlines())
        case "bundle":
            assert Path("case.tar.gz").stat().st_size > 0
        case "record":
            (written,) = (one for one in arguments if one.endswith(".jsonl"))
            assert '"kind":"poison"' in Path(written).read_text()


def test_few_commands_are_left_out() -> None:
    assert set(ELSEWHERE) <= {command for _, command in COMMANDS}
    assert len(COMMANDS) > 20 * len(ELSEWHERE)


def test_every_command_is_shown() -> None:
    assert {shlex.split(command)[1] for _, command in COMMANDS} == set(cli.cli.commands)


# -- what is shown


@pytest.mark.parametrize("page", [name for name, text in TEXTS.items() if "```console" in text])
def test_shown_output_is_current(page: str) -> None:
    """If it is not: `make readme`."""
    assert docs.with_output(TEXTS[page]) == TEXTS[page]


@pytest.mark.parametrize("path", docs.PICTURES, ids=lambda path: path.name)
def test_the_pictures_are_current(path: Path) -> None:
    """If they are not: `make picture`."""
    size = docs.PICTURES[path]
    assert docs.words(docs.picture(*size)) == docs.words(path.read_text())


def test_the_readme_is_short() -> None:
    assert len(TEXTS["README.md"].splitlines()) <= LINES_OF_README


# -- links


def anchors(text: str) -> set[str]:
    """As GitHub makes them of headings."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", one.lower()).replace(" ", "-") for one in headings}


LINKS = [
    (page, target)
    for page, text in TEXTS.items()
    for target in re.findall(r"\]\(([^)\s]+)\)", text)
    if "://" not in target
]


@pytest.mark.parametrize(("page", "target"), LINKS)
def test_links_lead_somewhere(page: str, target: str) -> None:
    name, _, anchor = target.partition("#")
    path = (docs.ROOT / page).parent / name if name else docs.ROOT / page
    assert path.exists()
    if anchor:
        assert anchor in anchors(path.read_text())


# -- lists are whole


def codes(text: str) -> set[str]:
    """What stands between backticks, outside of blocks; of `{…}` also the words in it."""
    return set(re.findall(r"`([^`\n]+)`", text))


def section(page: str, heading: str) -> str:
    text = TEXTS[page]
    begin = text.index(f"\n{heading}\n") + 1
    level = heading.split(maxsplit=1)[0]
    end = re.search(rf"^#{{1,{len(level)}}} ", text[begin + len(heading) :], re.MULTILINE)
    return text[begin : begin + len(heading) + end.start()] if end else text[begin:]


# The tables state x verdict -> what to do.
TABLES = [
    ("README.md", "## An alert brought you here"),
    ("docs/runbook.md", "## What to do, by state and verdict"),
]
PAGE_CLASSES = {"vm", "kernel", "process", "handled"}


def labels(family: str, label: str) -> set[str]:
    """The values of a label that are exported from the start."""
    (found,) = [one for one in metrics.Exporter(Snapshot).collect() if one.name == family]
    return {sample.labels[label] for sample in found.samples}


def test_words_of_the_contract() -> None:
    states = labels("kvmtrace_incidents", "state")
    verdicts = labels("kvmtrace_incident_verdicts", "verdict")
    words = section("docs/json.md", "## Words")
    rows = set(re.findall(r"^\| `([^`]+)` \|", words, re.MULTILINE))
    assert rows == {*model.CAUSES, *states, *verdicts, *PAGE_CLASSES, *Urgency}
    for page, heading in TABLES:
        assert {*states, *verdicts, "kernel", "undelivered"} <= codes(section(page, heading))


@pytest.mark.parametrize(("page", "heading"), TABLES)
def test_what_to_do_is_what_explain_advises(page: str, heading: str) -> None:
    """The first step of each incident of the story begins as its row of the table does."""
    cells = [line.strip("| ").split("|") for line in section(page, heading).splitlines()]
    rows = [[cell.strip() for cell in row] for row in cells if len(row) > 2]
    for vm in ("web-1", "db-1", "cache-1"):
        output = invoke("explain", vm, "--from", str(docs.STORY), "--json").stdout
        (incident,) = json.loads(output)
        states = [row for row in rows if f"`{incident['state']}`" in row[0]]
        (row,) = [row for row in states if row[1].strip("`") == incident.get("verdict", "")]
        assert row[-1].split()[0] == incident["next"][0].split()[0]


def test_every_json_field_is_described() -> None:
    described = codes(TEXTS["docs/json.md"])
    for arguments in (("--json",), ("--events", "--json")):
        output = invoke("replay", str(docs.STORY), *arguments).stdout
        for line in output.splitlines():
            assert fields(json.loads(line)) <= described
    explained = invoke("explain", "web-1", "--from", str(docs.STORY), "--json").stdout
    assert fields(json.loads(explained)) <= described
    assert fields(json.loads(invoke("doctor", "--json").stdout)) <= described


# Keys that are values: names of errnos, of codes and causes, of where something was lost.
_BY_NAME = ("exits", "causes", "sigbus", "lost", "at_start", "now")


def fields(value: Any) -> set[str]:
    if isinstance(value, list):
        return set().union(*map(fields, value))
    if not isinstance(value, dict):
        return set()
    inner = [fields(one) for name, one in value.items() if name not in _BY_NAME]
    return set(value).union(*inner)


def test_every_metric_is_described() -> None:
    snapshot = replace(small(), history=HISTORY)
    exported = {family.name for family in metrics.Exporter(lambda: snapshot).collect()}
    named = {name for name in codes(TEXTS["docs/metrics.md"]) if name.startswith("kvmtrace_")}
    plain = {re.sub("_(total|info)$", "", name) for name in named}
    assert exported <= plain
    # What serve adds of itself.
    assert plain - exported == {
        "kvmtrace_hook_dropped",
        "kvmtrace_hook_runs",
        "kvmtrace_http_connections_dropped",
        "kvmtrace_last_poll_timestamp_seconds",
        "kvmtrace_privileges",
    }


def test_every_place_of_loss_is_described() -> None:
    assert labels("kvmtrace_events_lost", "where") <= codes(
        section("docs/runbook.md", "## KvmtraceEventsLost")
    )


def test_every_probe_is_described() -> None:
    rows = re.findall(r"^\| (`.*?) \|", section("docs/how-it-works.md", "## Probes"), re.MULTILINE)
    named = {name for row in rows for name in codes(row)}
    probes = [*specs("x86_64"), *specs("aarch64"), *context_specs()]
    assert named == {probe.name for probe in probes}


def test_every_alert_is_in_the_runbook() -> None:
    alerts = re.findall(r"- alert: (\w+)", (docs.ROOT / "dashboards/alerts.yml").read_text())
    headings = re.findall(r"^## (Kvmtrace\w+)$", TEXTS["docs/runbook.md"], re.MULTILINE)
    assert headings == alerts


@pytest.mark.parametrize("what", readme.PAGES)
def test_tables_are_kept_where_they_stand(
    what: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    page = tmp_path / readme.PAGES[what]
    page.parent.mkdir()
    page.write_text((docs.ROOT / readme.PAGES[what]).read_text())
    monkeypatch.chdir(tmp_path)
    readme.save(what, "| new |\n\n")
    readme.main()
    text = page.read_text()
    assert f"<!-- {what} -->\n| new |\n<!-- /{what} -->\n" in text
    before, after = text.split(f"<!-- {what} -->\n| new |\n<!-- /{what} -->\n")
    old = TEXTS[readme.PAGES[what].as_posix()]
    assert old.startswith(before)
    assert old.endswith(after)


# -- files that are named


_FILE = re.compile(r"[\w.{},-]+(/[\w.{},-]+)*(/|\.(py|c|h|md|yml|toml))")


def files_named() -> list[str]:
    """Files and directories that CONTRIBUTING.md names between backticks."""
    return sorted(name for name in codes(TEXTS["CONTRIBUTING.md"]) if _FILE.fullmatch(name))


@pytest.mark.parametrize("name", files_named())
def test_files_that_are_named_exist(name: str) -> None:
    assert (docs.ROOT / name).exists() or (docs.ROOT / "kvmtrace" / name).exists()


def test_where_to_change_what_names_files() -> None:
    rows = section("CONTRIBUTING.md", "## Where do I change what").split("|---|---|\n")[1]
    for row in filter(None, rows.splitlines()):
        assert any(_FILE.fullmatch(name) for name in codes(row)), row
