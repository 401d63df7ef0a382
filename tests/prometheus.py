"""A real Prometheus on loopback for tests, and a real Alertmanager that notifies a webhook.

Prometheus scrapes a target every second, and takes queries. Needs only the standard library and
Debian's packages ``prometheus`` and ``prometheus-alertmanager``, so lab tests use it as well.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self

JOB = "kvmtrace"
PACKAGES = {
    "prometheus": "prometheus",
    "promtool": "prometheus",
    "prometheus-alertmanager": "prometheus-alertmanager",
}
SCRAPE_SECONDS = 1
SCRAPES_FAIL_SECONDS = 30  # how long a query waits for a successful scrape

_CONFIG = """
global: {{scrape_interval: {interval}s, scrape_timeout: {interval}s, evaluation_interval: 1s}}
rule_files: {rules}
scrape_configs:
  - job_name: {job}{options}
    static_configs: [{{targets: ["{target}"], labels: {{instance: "{instance}"}}}}]
alerting:
  alertmanagers:
    - static_configs: [{{targets: {alertmanagers}}}]
"""

INHIBITION = """inhibit_rules:
  - source_matchers: ['severity = critical', 'vm != ""']
    target_matchers: ['severity = warning', 'vm != ""']
    equal: [job, instance, vm]
"""

# As short as they can be: a person would be notified far less often.
_ROUTE = """
route:
  receiver: webhook
  group_by: [alertname, job, instance, vm]
  group_wait: 1s
  group_interval: 1s
receivers:
  - name: webhook
    webhook_configs: [{{url: "{url}"}}]
"""

Sample = tuple[dict[str, str], float]
Notification = dict[str, Any]


def required() -> bool:
    """Whether tests that need Prometheus must not be skipped (CI and lab runs)."""
    return os.environ.get("CI") == "true" or os.environ.get("KVMTRACE_LAB") == "1"


def missing(*tools: str) -> str | None:
    """Reason why tests with ``tools`` (``PACKAGES``) cannot run; None if they can."""
    absent = [tool for tool in tools if shutil.which(tool) is None]
    if not absent:
        return None
    packages = " ".join(dict.fromkeys(PACKAGES[tool] for tool in absent))
    return f"{' and '.join(absent)} not installed (apt install {packages})"


class Queries(ABC):
    """Queries to a Prometheus, however it is reached."""

    @abstractmethod
    def query(self, expr: str) -> list[Sample]:
        """Run an instant query: [(labels, value)]; AssertionError with its error if refused."""

    def log(self) -> str:
        """The end of its log, "" if unknown."""
        return ""

    def value(self, expr: str) -> float | None:
        """The value of a query with at most one sample; None if there is none."""
        samples = self.query(expr)
        assert len(samples) <= 1, f"{expr}: {samples}"
        return samples[0][1] if samples else None

    def alerts(self) -> set[str]:
        """Names of the alerts that are firing."""
        return {labels["alertname"] for labels, _ in self.query('ALERTS{alertstate="firing"}')}

    def wait(self, what: Callable[[], object], seconds: float = 60) -> None:
        """Wait until ``what`` is true; AssertionError after ``seconds``."""
        deadline = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < deadline, f"not within {seconds} s; Prometheus: {self.log()}"
            time.sleep(SCRAPE_SECONDS / 5)

    def wait_for_scrapes(self, count: int, seconds: float = 60) -> None:
        """Wait for ``count`` more successful scrapes."""
        seen = f"count_over_time(up{{job='{JOB}'}}[1h])"
        start = self.value(seen) or 0
        self.wait(lambda: (self.value(seen) or 0) >= start + count, seconds)


class _Daemon:
    """A program that listens on a free port of loopback; it ends with the block.

    Its data and its log are in a temporary directory, ``root``.
    """

    name: str

    def __init__(self) -> None:
        self._dir = tempfile.TemporaryDirectory(prefix="kvmtrace-")
        self._process: subprocess.Popen[bytes] | None = None
        self.root = Path(self._dir.name)
        self.address = ""

    def command(self, address: str) -> list[str]:
        """The command line that listens on ``address``."""
        raise NotImplementedError

    @property
    def url(self) -> str:
        return f"http://{self.address}"

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def log(self) -> str:
        """The end of its log."""
        return self._log.read_text(errors="replace")[-2000:] if self._log.exists() else ""

    def stop(self) -> None:
        """End it and remove its data; may be called twice."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        self._dir.cleanup()

    @property
    def _log(self) -> Path:
        return self.root / "log"

    def _start(self) -> None:
        # Another process may take the free port before this one binds it.
        for _ in range(5):
            self.address = f"127.0.0.1:{_free_port()}"
            with self._log.open("wb") as log:
                self._process = subprocess.Popen(
                    self.command(self.address),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            if self._ready():
                return
        raise AssertionError(f"{self.name} does not start: {self.log()}")

    def _ready(self) -> bool:
        assert self._process is not None
        deadline = time.monotonic() + 60
        while self._process.poll() is None and time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(f"{self.url}/-/ready", timeout=5):
                    return True
            except OSError:
                time.sleep(0.1)
        return False


class Prometheus(_Daemon, Queries):
    """``with Prometheus("127.0.0.1:9750") as p: p.query("up")``; it ends with the block.

    ``rules``: rule files to evaluate. ``instance``: the target's label, default: its address.
    ``alertmanager``: address of the Alertmanager that it sends alerts to. ``interval``: seconds
    from one scrape to the next, and within which each has to be answered. ``options``: further ones
    of the scrape job.
    """

    name = "Prometheus"

    def __init__(
        self,
        target: str,
        *rules: Path,
        instance: str | None = None,
        alertmanager: str | None = None,
        interval: int = SCRAPE_SECONDS,
        options: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__()
        self._interval = interval
        self._config = _CONFIG.format(
            interval=interval,
            rules=json.dumps([str(path.resolve()) for path in rules]),
            job=JOB,
            options="".join(f"\n    {name}: {json.dumps(one)}" for name, one in options.items())
            if options
            else "",
            target=target,
            instance=instance or target,
            alertmanagers=json.dumps([alertmanager] if alertmanager else []),
        )

    def command(self, address: str) -> list[str]:
        config = self.root / "prometheus.yml"
        config.write_text(self._config)
        return [
            "prometheus",
            f"--config.file={config}",
            f"--storage.tsdb.path={self.root / 'data'}",
            f"--web.listen-address={address}",
            "--log.level=warn",
        ]

    def query(self, expr: str, at: float | None = None) -> list[Sample]:
        """As ``Queries.query``; ``at``: a time of earlier, from the query ``time()``."""
        when = self._time_of_scrape() if at is None else f"{at:.3f}"
        answer = self._get("query", query=expr, time=when)["data"]
        if answer["resultType"] == "scalar":
            return [({}, float(answer["result"][1]))]
        return [(one["metric"], float(one["value"][1])) for one in answer["result"]]

    def _time_of_scrape(self) -> str:
        """Wait for a time at which the last scrape was successful; give up after a while.

        A failed scrape, as on a busy machine, makes all series stale until the next one: from its
        beginning on, and that is known at its end only. So the time is one before those that may
        still be in progress.
        """
        deadline = time.monotonic() + SCRAPES_FAIL_SECONDS
        while True:
            now = f"{time.time() - 2 * self._interval:.3f}"
            up = self._get("query", query="min(up)", time=now)["data"]["result"]
            if not up or float(up[0]["value"][1]) or time.monotonic() > deadline:
                return now
            time.sleep(SCRAPE_SECONDS / 5)

    def _get(self, what: str, **params: str) -> dict[str, Any]:
        url = f"{self.url}/api/v1/{what}?{urllib.parse.urlencode(params)}"
        try:
            with urllib.request.urlopen(url, timeout=30) as response:
                answer: dict[str, Any] = json.load(response)
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{params}: {error.read().decode(errors='replace')}") from None
        assert answer["status"] == "success", answer
        return answer


class Alertmanager(_Daemon):
    """``with Alertmanager(webhook.url) as a: a.address``; it notifies the webhook at once.

    Unless it ``inhibits``, of all alerts: also of those of a VM that has a worse one.
    """

    name = "Alertmanager"

    def __init__(self, webhook: str, *, inhibits: bool = True) -> None:
        super().__init__()
        self._config = _ROUTE.format(url=webhook) + (INHIBITION if inhibits else "")

    def command(self, address: str) -> list[str]:
        config = self.root / "alertmanager.yml"
        config.write_text(self._config)
        return [
            "prometheus-alertmanager",
            f"--config.file={config}",
            f"--storage.path={self.root / 'data'}",
            f"--web.listen-address={address}",
            "--cluster.listen-address=",
            "--log.level=warn",
        ]


class Webhook:
    """``with Webhook() as w: w.notifications()``: an HTTP server that keeps what it is sent."""

    def __init__(self) -> None:
        bodies: list[bytes] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                """Log nothing."""

        self._bodies = bodies
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def notifications(self) -> list[Notification]:
        """The alerts of all bodies, in order: {"status", "labels", "annotations", …}."""
        return [alert for body in list(self._bodies) for alert in json.loads(body)["alerts"]]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
