"""Choice of kernel packages, from real package lists of 23 November 2026."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.lab.errors import LabError
from tests.lab.resolve import Package, Resolved, numbers, parse, resolve

LISTINGS = Path(__file__).with_name("lab_listings")


def listing(suite: str) -> list[Package]:
    return list(parse((LISTINGS / f"{suite}.txt").read_text()))


def chosen(suite: str, version: str, flavour: str = "amd64") -> Resolved:
    return resolve(listing(suite), flavour, version, suite)


def names(found: Resolved) -> set[str]:
    return {package.name for package in found.packages}


@pytest.mark.parametrize(
    ("suite", "version", "flavour", "release"),
    [
        ("bookworm", "", "amd64", "6.1.0-50-amd64"),
        ("bookworm-backports", "6.12", "amd64", "6.12.95+deb12-amd64"),
        ("trixie", "6.12", "amd64", "6.12.117+deb13-amd64"),
        ("trixie", "6.12", "cloud-amd64", "6.12.117+deb13-cloud-amd64"),
        ("trixie-backports", "6.18", "amd64", "6.18.15+deb13-amd64"),
        ("trixie-backports", "", "amd64", "7.3.4+deb13-amd64"),
        ("sid", "", "amd64", "7.2.13+deb14-amd64"),
    ],
)
def test_the_newest_that_is_wanted(suite: str, version: str, flavour: str, release: str) -> None:
    found = chosen(suite, version, flavour)
    assert found.release == release
    assert found.note == ""
    assert found.size > 30_000_000


def test_one_package_holds_older_kernels() -> None:
    assert names(chosen("trixie", "6.12")) == {"linux-image-6.12.117+deb13-amd64"}


def test_newer_kernels_are_split_and_all_parts_are_taken() -> None:
    assert names(chosen("trixie-backports", "")) == {
        f"linux-{part}-7.3.4+deb13-amd64" for part in ("image", "binary", "modules", "base")
    }


def test_the_config_package_may_be_gone() -> None:
    assert names(chosen("trixie-backports", "6.18")) == {"linux-image-6.18.15+deb13-amd64"}


def test_a_version_that_vanished_gives_the_nearest_and_says_so() -> None:
    found = chosen("trixie-backports", "6.18.14")
    assert found.release == "6.18.15+deb13-amd64"
    assert "no kernel 6.18.14 any more: taking the nearest, 6.18.15+deb13" in found.note


def test_of_two_as_near_the_newer_is_taken() -> None:
    assert chosen("trixie-backports", "7.2.10").release == "7.2.11+deb13-amd64"


def test_a_series_that_vanished_gives_the_nearest_series_that_is_whole() -> None:
    # 6.19's images are still listed here, their modules are not.
    left = [package for package in listing("trixie-backports") if "-6.18." not in package.name]
    found = resolve(left, "amd64", "6.18", "trixie-backports")
    assert found.release == "6.17.13+deb13-amd64"
    assert "no kernel 6.18 any more" in found.note


def test_a_kernel_with_a_part_missing_is_passed_over() -> None:
    left = [one for one in listing("trixie-backports") if "modules-7.3.4" not in one.name]
    assert resolve(left, "amd64", "", "trixie-backports").release == "7.2.12+deb13-amd64"


def test_a_kernel_whose_modules_are_gone_may_do() -> None:
    left = listing("trixie-backports")
    found = resolve(left, "amd64", "6.19", "trixie-backports", modules=False)
    assert found.release.startswith("6.19.")
    assert found.note == ""
    release = found.release
    assert names(found) == {f"linux-image-{release}", f"linux-binary-{release}"}
    left = [one for one in left if one.name != f"linux-binary-{release}"]
    other = resolve(left, "amd64", "6.19", "trixie-backports", modules=False)
    assert other.release != release


def test_debug_unsigned_and_other_flavours_are_not_taken() -> None:
    for suite in ("bookworm", "trixie", "trixie-backports", "sid"):
        for name in names(chosen(suite, "")):
            assert not name.endswith(("-dbg", "-unsigned"))
            assert "cloud" not in name
            assert "-rt-" not in name


def test_nothing_at_all_is_one_clear_line() -> None:
    with pytest.raises(LabError, match=r"^no linux-image-\*-amd64 in nowhere$"):
        resolve([], "amd64", "6.18", "nowhere")


def test_versions_compare_as_numbers() -> None:
    assert numbers("6.12.90+deb12.1") > numbers("6.12.90+deb12")
    assert numbers("6.12.107+deb13") > numbers("6.12.95+deb13")
    assert numbers("6.1.0-50") > numbers("6.1.0-9")
