"""The pages of `serve`: the landing page, and one for each incident."""

from __future__ import annotations

import http.client
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from kvmtrace.events import Owner
from kvmtrace.judgement.actions import actions
from kvmtrace.judgement.urgency import Level, Urgency, urgency_of
from kvmtrace.model import (
    MAX_INCIDENTS,
    ErrorHistory,
    Incident,
    IncidentStatus,
    Origin,
    PageClass,
    Snapshot,
    VmIdentity,
)
from kvmtrace.probes import Probe
from kvmtrace.views.explain import explain_text, sentence
from kvmtrace.views.format import plain
from kvmtrace.views.tables.summary import summary_spans
from kvmtrace.views.web import document, incident_page, landing
from kvmtrace.views.web.server import Server
from tests import browser, docs, page_pictures, png
from tests.unit import serving
from tests.unit.snapshots import HOST, NOW, PROBES, many, odd, small, vm

DOCS = docs.ROOT / "docs"
HOSTILE = "<script>alert(1)</script>&\"'" + "x" * 90 + "\N{HEBREW LETTER ALEF}"
needs_browser = pytest.mark.skipif(browser.missing() is not None, reason=str(browser.missing()))


@pytest.fixture(autouse=True)
def utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The host's zone, in which pages have their times."""
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


class Page(HTMLParser):
    """Text, tags, and links of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._text: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._text.append("" if tag in ("a", "span") else "\n")

    def handle_data(self, data: str) -> None:
        if self.tags[-1][0] != "style":
            self._text.append(data)

    @property
    def text(self) -> str:
        return "".join(self._text)

    @property
    def links(self) -> list[str]:
        return [attrs["href"] or "" for tag, attrs in self.tags if tag == "a"]


def of(snapshot: Snapshot) -> Page:
    return Page(landing.render(snapshot, NOW))


def named(name: str, *incidents: Incident) -> Snapshot:
    """Incidents of one VM with that name."""
    identity = VmIdentity(1, 4001, name, "5b2f0001-1c2d-4e5f-8a9b-0123456789ab", "qemu")
    label = "CPU_SrcID#0_MC#0_Chan#1_DIMM#0" * 4
    origin = Origin(("mc_event",), ErrorHistory(3, 3, NOW, NOW), "corrected", label=label)
    return replace(
        small(),
        vms={1: vm(1, name, exits={("EHWPOISON", "hwpoison"): 10**12}, last_ts=NOW)},
        incidents=tuple(
            replace(one, owners=(Owner(1, 8),), vm_identities={1: identity}, origin=origin)
            for one in incidents
        ),
    )


# -- the landing page


def test_what_to_do_comes_first() -> None:
    snapshot = small()
    page = of(snapshot)
    (worst,) = [one for one in snapshot.incidents if one.state == IncidentStatus.LOOPING]
    first = plain(summary_spans(snapshot, NOW))
    assert first.startswith("web-1 ")
    text = page.text
    assert text.index("db-host-17") < text.index(first) < text.index("What is watched")
    assert "as of 2026-09-21 14:13:20 UTC" in text
    assert page.links[0] == f"/incident/{worst.id}"


def test_times_have_the_zone_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "XYZ-2")  # two hours east of UTC
    time.tzset()
    assert "as of 2026-09-21 16:13:20 UTC+02:00" in of(small()).text


def test_incidents_come_by_urgency_and_what_is_over_last() -> None:
    page = of(small())
    found = [link.removeprefix("/incident/") for link in page.links if "/incident/" in link]
    by_id = {one.id: one for one in small().incidents}
    shown = [urgency_of(by_id[one]) for one in found[1:]]
    assert len(shown) == len(by_id)
    assert shown == sorted(shown, key=lambda urgency: urgency.rank)
    assert shown[-1] == Urgency.CLOSED
    # Those that are closed are folded away.
    html = landing.render(small(), NOW)
    assert html.index("<summary>Closed: 1</summary>") < html.index('href="/incident/g77-1"')


def test_an_incident_has_its_urgency_action_verdict_and_dimm() -> None:
    snapshot = named("web-1", small().incidents[1])
    (incident,) = snapshot.incidents
    text = of(snapshot).text
    for part in (
        urgency_of(incident),
        "web-1",
        actions(incident, snapshot)[0].brief,
        "200,002×",
        "103275-1",
        incident.origin.label if incident.origin else "",
    ):
        assert part
        assert part in text


def test_the_title_is_the_host_and_what_is_open() -> None:
    assert "<title>db-host-17: 1 looping, " in landing.render(small(), NOW)
    empty = replace(small(), incidents=(), lost={}, probes=PROBES[:2])
    assert "<title>db-host-17: nothing to do</title>" in landing.render(empty, NOW)
    assert "Nothing to do: no poisoned page is open." in of(empty).text
    assert "May be incomplete" not in of(empty).text
    assert "<title>kvmtrace: " in landing.render(replace(empty, host=None), NOW)


def test_an_empty_page_is_not_calm_about_a_page_of_the_kernel() -> None:
    """Its incident had no room, or is forgotten; the count stays."""
    text = of(replace(small(), incidents=(), kernel_pages=2)).text
    assert "Nothing to do" not in text
    assert "Move the VMs away and reboot this host: the kernel uses 2 poisoned pages" in text


def test_what_may_be_missing_stands_beside_the_answer() -> None:
    text = of(small()).text
    doubt = "May be incomplete: 7 lost (ring buffer); mce not attached"
    assert text.index(doubt) < text.index("VMs: ")


def test_nobody_owns_it() -> None:
    kernel = Incident(
        "1-1", IncidentStatus.UNOWNED, 1, "x", "Ignored", NOW, (), page_class=PageClass.KERNEL
    )
    assert "the kernel itself" in of(replace(small(), incidents=(kernel,))).text
    free = replace(kernel, page_class=PageClass.HANDLED)
    assert "no VM" in of(replace(small(), incidents=(free,))).text


def test_many_owners_are_counted() -> None:
    shared = replace(small().incidents[1], owners=tuple(Owner(key, 8) for key in range(1, 9)))
    snapshot = replace(many(9), incidents=(shared,))
    assert "vm-001 +7" in of(snapshot).text


@pytest.mark.parametrize("render", ["landing", "incident"])
def test_what_tenants_choose_is_text(render: str) -> None:
    snapshot = named(HOSTILE, *small().incidents)
    for incident in snapshot.incidents:
        if render == "landing":
            html = landing.render(snapshot, NOW)
        else:
            html = incident_page.render(incident, snapshot, NOW)
        page = Page(html)
        assert not {tag for tag, _ in page.tags} & {"script", "img", "iframe", "link", "form"}
        for _, attrs in page.tags:
            assert not any(name.startswith("on") or name in ("style", "src") for name in attrs)
            assert not any("alert" in (value or "") for value in attrs.values())
        assert HOSTILE in page.text.replace("\n", "")
        assert all(link.startswith("/") and not link.startswith("//") for link in page.links)


def test_an_odd_id_cannot_leave_its_attribute() -> None:
    odd_id = "\"><script>/../x?y#z'"
    snapshot = named("web-1", replace(small().incidents[1], id=odd_id))
    (path,) = {link for link in of(snapshot).links if "incident" in link}
    assert re.fullmatch(r"/incident/[\w%.-]+", path)


def test_a_full_model_makes_a_page_of_bounded_size() -> None:
    long = "n" * 128
    looping = small().incidents[1]
    snapshot = named(long, *(replace(looping, id=f"a-{n}") for n in range(MAX_INCIDENTS)))
    snapshot = replace(snapshot, vms={key: vm(key, long) for key in range(5000)})
    html = landing.render(snapshot, NOW)
    assert len(html) < 500_000
    assert f"{MAX_INCIDENTS} looping" in html
    assert f"… and {MAX_INCIDENTS - landing.MAX_ROWS} more" in html
    assert "… and 4,800 more" in html
    # Nobody scrolls past 5000 VMs.
    assert "<details><summary>VMs: 5000</summary>" in html
    assert "<details open><summary>VMs: 4</summary>" in landing.render(small(), NOW)


@pytest.mark.parametrize("snapshot", [Snapshot(), odd(), many(), small()])
def test_any_snapshot_has_a_page(snapshot: Snapshot) -> None:
    page = of(snapshot)
    assert page.text
    for incident in snapshot.incidents:
        assert Page(incident_page.render(incident, snapshot, NOW)).text


# -- the page of an incident


def test_an_incident_page_has_what_to_do_with_commands_and_the_story() -> None:
    snapshot = named("web-1", small().incidents[1])
    (incident,) = snapshot.incidents
    html = incident_page.render(incident, snapshot, NOW)
    text = Page(html).text
    todo = actions(incident, snapshot)
    assert "<title>looping: web-1 on db-host-17</title>" in html
    commands = [command for action in todo for command in action.commands]
    assert commands
    for shown in (
        *(sentence(action.text) for action in todo),
        *commands,
        *(sentence(one) for action in todo for one in action.never),
        explain_text(incident, snapshot, incident_page.WIDE),
        explain_text(incident, snapshot, incident_page.NARROW),
    ):
        assert shown in text
    assert text.index(commands[0]) < text.index("The whole story")


@pytest.fixture
def server() -> Iterator[Server]:
    class Session:
        def snapshot(self) -> Snapshot:
            return small()

    running = serving.serve("127.0.0.1:0", Session(), now=lambda: NOW)
    yield running
    running.close()


def ask(server: Server, path: str, method: str = "GET") -> tuple[http.client.HTTPResponse, str]:
    connection = http.client.HTTPConnection(*server.address, timeout=20)
    try:
        connection.request(method, path)
        response = connection.getresponse()
        return response, response.read().decode()
    finally:
        connection.close()


def test_every_link_of_the_pages_is_answered(server: Server) -> None:
    _, html = ask(server, "/")
    for link in set(Page(html).links):
        response, body = ask(server, link)
        assert response.status == 200, link
        if "/incident/" in link:
            assert response.getheader("Content-Type") == "text/html; charset=utf-8"
            assert "The whole story" in body
            assert set(Page(body).links) >= {"/", "/metrics"}


@pytest.mark.parametrize(
    "name",
    ["", "0-0", "%3Cscript%3E", "<script>alert(1)", "x" * 4000, "a%00b"],
)
def test_an_unknown_incident_is_not_found(server: Server, name: str) -> None:
    response, body = ask(server, f"/incident/{name}")
    assert response.status == 404
    assert response.getheader("Content-Type") == "text/html; charset=utf-8"
    assert "No such incident" in body
    assert "<script" not in body
    assert len(body) < len(document.STYLE) + 3000
    assert Page(body).links[0] == "/"


def test_pages_have_the_headers_that_keep_them_harmless(server: Server) -> None:
    for path in ("/", "/incident/103275-1", "/incident/unknown"):
        response, body = ask(server, path, "HEAD")
        assert body == ""
        assert response.getheader("X-Content-Type-Options") == "nosniff"
        policy = "default-src 'none'; style-src 'unsafe-inline'"
        assert response.getheader("Content-Security-Policy") == policy
        assert ask(server, path, "POST")[0].status == 405


def test_when_nothing_is_watched_no_page_pretends() -> None:
    class Ended:
        def snapshot(self) -> Snapshot:
            raise OSError("the source <ended>")

    running = serving.serve("127.0.0.1:0", Ended())
    try:
        for path in ("/", "/incident/103275-1"):
            response, body = ask(running, path)
            assert response.status == 503
            assert "Not watching: OSError: the source &lt;ended&gt;" in body
    finally:
        running.close()


# -- how they look


@pytest.mark.parametrize("picture", page_pictures.PICTURES, ids=lambda one: one.path.stem)
def test_the_pictures_are_current_and_small(picture: page_pictures.Picture) -> None:
    """If one is not: `make page-pictures`."""
    taken = picture.path.read_bytes()
    assert png.about_of(taken) == picture.about()
    assert len(taken) < 64 << 10


def test_no_picture_is_left_over() -> None:
    found = {path for kind in ("page", "incident") for path in DOCS.glob(f"{kind}-*.png")}
    assert found == {picture.path for picture in page_pictures.PICTURES}
    using = (DOCS / "using.md").read_text(encoding="utf-8")
    assert all(f"({picture.path.name})" in using for picture in page_pictures.PICTURES)


def _light(color: str) -> float:
    """Relative luminance (WCAG 2)."""
    parts = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_colour_can_be_read(scheme: str) -> None:
    """At least 4.5 to 1, as WCAG 2 asks for text of this size."""
    light, dark = document.STYLE.split("@media (prefers-color-scheme: dark)")
    found = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", light))
    if scheme == "dark":
        found |= dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", dark))
    assert {*Level, *(f"{level}-back" for level in Level)} <= found.keys()
    pairs = [(one, back) for one in (*Level, "text", "dim", "link") for back in ("back", "card")]
    pairs += [(one, f"{level}-back") for level in Level for one in (level, "text", "link")]
    for one, back in pairs:
        low, high = sorted((_light(found[one]), _light(found[back])))
        assert (high + 0.05) / (low + 0.05) >= 4.5, (one, back)


def _hard_to_lay_out() -> dict[str, str]:
    """Pages with all that is long and cannot be broken."""
    long = named("n" * 128, *small().incidents)
    wide = named("数据库" * 42, *small().incidents)
    probes = (*PROBES, Probe("p" * 40, False, why="w" * 300))
    host = replace(HOST, name="h" * 64, kernel="k" * 64, source_why="y" * 200)
    long = replace(long, probes=probes, host=host, lost={"l" * 64: 10**15})
    return {
        "odd": landing.render(odd(), NOW),
        "long": landing.render(long, NOW),
        "wide": landing.render(wide, NOW),
        "incident": incident_page.render(long.incidents[1], long, NOW),
        "unknown": incident_page.render_unknown("u" * 1000),
    }


@needs_browser
def test_nothing_needs_sideways_scrolling() -> None:
    """Not on a phone, and not with any name; also with all that is folded opened."""
    wider = "[...document.querySelectorAll('*')].filter(one => one.scrollWidth > innerWidth).length"
    opened = "document.querySelectorAll('details').forEach(one => one.open = true)"
    with browser.browser() as chromium:
        for name, html in _hard_to_lay_out().items():
            for width in (320, 360, 800, 1217):
                chromium.show(html, width)
                chromium.measure(opened)
                assert chromium.measure("innerWidth") == width, name
                assert chromium.measure("document.documentElement.scrollWidth") == width, name
                assert chromium.measure(wider) == 0, name


@needs_browser
def test_the_phone_gets_cards_and_the_scheme_is_the_readers() -> None:
    back = "getComputedStyle(document.body).backgroundColor"
    head = "getComputedStyle(document.querySelector('thead')).display"
    with browser.browser() as chromium:
        shown = set()
        for width, dark in ((360, False), (360, True), (1400, False)):
            chromium.show(landing.render(small(), NOW), width, dark=dark)
            shown.add((width, chromium.measure(back), chromium.measure(head)))
    assert shown == {
        (360, "rgb(255, 255, 255)", "none"),
        (360, "rgb(15, 19, 23)", "none"),
        (1400, "rgb(255, 255, 255)", "table-header-group"),
    }
