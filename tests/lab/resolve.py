"""Choose kernel packages from a suite's package list. Pure: no network, no files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from tests.lab.errors import LabError

IMAGE = re.compile(r"linux-image-(?P<abi>\d[\w.+]*?(?:-\d+)?)-(?P<flavour>[a-z][a-z0-9-]*)$")


@dataclass(frozen=True)
class Package:
    """One stanza of a suite's package list."""

    name: str
    version: str
    size: int
    depends: tuple[str, ...]


@dataclass(frozen=True)
class Resolved:
    """The chosen kernel: its release and its packages."""

    release: str
    packages: tuple[Package, ...]
    note: str = ""

    @property
    def size(self) -> int:
        """Bytes to download."""
        return sum(package.size for package in self.packages)


def parse(text: str) -> Iterator[Package]:
    """Parse the output of `apt-cache show`, or a Packages file."""
    for stanza in text.split("\n\n"):
        fields = dict(re.findall(r"^([A-Za-z-]+): (.*)$", stanza, re.MULTILINE))
        if "Package" in fields:
            wanted = fields.get("Depends", "")
            depends = re.findall(r"(?:^|[,|])\s*([a-z0-9][a-z0-9+.-]*)", wanted)
            size = int(fields.get("Size", 0))
            yield Package(fields["Package"], fields.get("Version", ""), size, tuple(depends))


def numbers(version: str) -> tuple[int, ...]:
    """The numbers of a version, for comparing: "6.12.90+deb12.1" → (6, 12, 90, 12, 1)."""
    return tuple(int(number) for number in re.findall(r"\d+", version))


def _distance(abi: str, wanted: tuple[int, ...]) -> tuple[int, int, bool]:
    """Distance of a kernel from the wanted version; of two equally near, the newer is nearer."""
    have = numbers(abi)
    for index, number in enumerate(wanted):
        other = have[index] if index < len(have) else 0
        if other != number:
            return (len(wanted) - index, abs(other - number), other < number)
    return (0, 0, False)


def _parts(
    image: Package, abi: str, listed: dict[str, Package], may_lack: tuple[str, ...]
) -> tuple[Package, ...] | None:
    """The image's package and its dependencies of the same kernel; None if one is missing.

    ``may_lack``: prefixes of the names of packages that may be missing.
    """
    found = {image.name: image}
    pending = [image]
    while pending:
        for name in pending.pop().depends:
            if name.startswith("linux-") and f"-{abi}-" in name and name not in found:
                if name in listed:
                    found[name] = listed[name]
                    pending.append(listed[name])
                elif not name.startswith(may_lack):
                    return None
    return tuple(found.values())


def resolve(
    packages: Iterable[Package], flavour: str, version: str, where: str, *, modules: bool = True
) -> Resolved:
    """Choose the newest kernel of `flavour` and `version`, else the nearest one; LabError if none.

    linux-base-* may be missing: it holds the config, and the mirror drops it before the image.
    Without ``modules``, linux-modules-* may be missing too.
    """
    may_lack = ("linux-base-",) if modules else ("linux-base-", "linux-modules-")
    listed: dict[str, Package] = {}
    for package in packages:
        known = listed.get(package.name)
        if known is None or numbers(package.version) > numbers(known.version):
            listed[package.name] = package
    wanted = numbers(version)
    candidates = []
    for package in listed.values():
        match = IMAGE.fullmatch(package.name)
        if match is None or match["flavour"] != flavour:
            continue
        parts = _parts(package, match["abi"], listed, may_lack)
        if parts is not None:
            candidates.append((match["abi"], parts))
    if not candidates:
        raise LabError(f"no linux-image-*-{flavour} in {where}")
    candidates.sort(key=lambda candidate: numbers(candidate[0]), reverse=True)
    abi, parts = min(candidates, key=lambda candidate: _distance(candidate[0], wanted))
    note = ""
    if _distance(abi, wanted)[0]:
        note = f"{where} has no kernel {version} any more: taking the nearest, {abi}"
    return Resolved(f"{abi}-{flavour}", parts, note)
