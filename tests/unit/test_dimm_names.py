"""Names of memory modules: which are placeholders, and which name a DIMM."""

from __future__ import annotations

import pytest

from kvmtrace import dimm_names
from kvmtrace.views.format import dimm_of


@pytest.mark.parametrize(
    ("text", "label"),
    [
        # EDAC: edac_mc.c, ghes_edac.c
        ("any memory", None),
        ("unknown memory", None),
        ("", None),
        (None, None),
        ("CPU_SrcID#0_MC#2_Chan#0_DIMM#0", "CPU_SrcID#0_MC#2_Chan#0_DIMM#0"),
        ("CPU#0Channel#1_DIMM#0", "CPU#0Channel#1_DIMM#0"),
        ("mc#0channel#1slot#0", "mc#0channel#1slot#0"),
        ("mc#0channel#1", "mc#0channel#1"),
        ("mc#0memory#3", None),
        ("mc#12", None),
        ("mc#0memory#0 or A1", "A1"),
        ("CPU_SrcID#0_Ha#0_Chan#1_DIMM#0", "CPU_SrcID#0_Ha#0_Chan#1_DIMM#0"),
        ("DIMM A3", "DIMM A3"),
        ("DIMM0 or DIMM0", "DIMM0"),
        ("A or unknown memory", "A"),
        # SMBIOS
        ("Not Specified", None),
        ("NO DIMM", None),
        ("Unknown", None),
        ("[Empty]", None),
        ("N/A", None),
        ("<OUT OF SPEC>", None),
        ("To Be Filled By O.E.M.", None),
        ("Default string Default string", None),
        ("Unknown Not Specified", None),
        ("????", None),
        ("DIMM", None),
        ("XXXX", None),
        ("No DIMM Installed", None),
        ("No DIMMs", None),
        ("DIMM Slot", None),
        ("x" * 120 + "1", "x" * 120 + "1"),
        ("no dimm " * 15 + "1", "1"),
        ("Not Specified DIMM_A1", "DIMM_A1"),
        ("DIMM_A1 Unknown", "DIMM_A1"),
        ("BANK 0", "BANK 0"),
        ("NODE 3 CPU0_DIMM_G1", "NODE 3 CPU0_DIMM_G1"),
        ("A1", "A1"),
        ("Node0_Dimm1", "Node0_Dimm1"),
        ("Unknown1", "Unknown1"),
    ],
)
def test_placeholders_are_no_labels(text: str | None, label: str | None) -> None:
    assert dimm_names.label(text) == label


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Card01, ChnG, DIMM0", "Card01, ChnG, DIMM0"),
        ("B1", "B1"),
        ("P1-DIMMA2", "P1-DIMMA2"),
        ("DIMM_A", "DIMM_A"),
        ("CorrectedErr", None),
        ("MemoryError", None),
        ("DIMM ????", None),
        ("Unknown", None),
        ("CPU1", None),
        ("P0", None),
        ("PROC 1 DIMM 3", "PROC 1 DIMM 3"),
        ("DIMM Slot 12", "DIMM Slot 12"),
        ("DIMM_P0_A0", "DIMM_P0_A0"),
        ("DIMM ECC error 64", None),
        ("DIMM Unknown 0", None),
        (None, None),
    ],
)
def test_fru_text_is_not_always_a_dimm(text: str | None, name: str | None) -> None:
    assert dimm_names.of_fru(text) == name


@pytest.mark.parametrize(
    ("label", "names", "shown"),
    [
        ("A1", "dimm", "DIMM A1"),
        # by drivers of their own
        ("CPU_SrcID#0_Ha#0_Chan#1_DIMM#0", "dimm", "CPU_SrcID#0_Ha#0_Chan#1_DIMM#0"),
        ("CPU#0Channel#1_DIMM#0", "dimm", "CPU#0Channel#1_DIMM#0"),
        ("MC#0Channel#0_DIMM#0", "dimm", "MC#0Channel#0_DIMM#0"),
        ("MC#0_Chan#0_DIMM#1", "dimm", "MC#0_Chan#0_DIMM#1"),
        ("Chan#0_DIMM#1", "dimm", "Chan#0_DIMM#1"),
        ("DIMM A0", "dimm", "DIMM A0"),
        # where a driver has none (edac_mc_alloc_dimms): a position
        ("mc#0channel#1slot#0", "slot", "slot mc#0channel#1slot#0"),
        ("mc#1branch#0channel#1slot#2", "slot", "slot mc#1branch#0channel#1slot#2"),
        ("mc#0slot#11", "slot", "slot mc#0slot#11"),
        ("mc#0channel#1", "channel", "channel mc#0channel#1"),
        ("mc#0csrow#2channel#1", "rank", "rank mc#0csrow#2channel#1"),
        ("mc#0csrow#2", "rank", "rank mc#0csrow#2"),
        ("csrow0channel1", "rank", "rank csrow0channel1"),
        ("csrow:0 channel:1", "rank", "rank csrow:0 channel:1"),
        (
            "mc#0branch#0channel#0slot#1 or mc#0branch#0channel#1slot#1",
            "candidates",
            "one of slot mc#0branch#0channel#0slot#1, slot mc#0branch#0channel#1slot#1",
        ),
        ("DIMM1 or DIMM2", "candidates", "one of DIMM1, DIMM2"),
        (
            "mc#0csrow#2channel#0 or mc#0csrow#2channel#1",
            "candidates",
            "one of rank mc#0csrow#2channel#0, rank mc#0csrow#2channel#1",
        ),
        ("CPU_SrcID#0_HBMC#1_Chan#0", "channel", "channel CPU_SrcID#0_HBMC#1_Chan#0"),
        ("Slice#0_Chan#1", "channel", "channel Slice#0_Chan#1"),
    ],
)
def test_what_a_label_names(label: str, names: str, shown: str) -> None:
    assert dimm_names.names(label) == names
    assert dimm_of(label) == shown


@pytest.mark.parametrize(
    "text",
    "Fill By OEM;Not Used;TBD;NO_DIMM;Other;Unset;OEM;to be defined by O.E.M;unlabeled;SO-DIMM;"
    "RAM;DDR4;System Memory;0xffff;4294967295;unknown DIMM location".split(";"),
)
def test_more_words_that_name_nothing(text: str) -> None:
    assert dimm_names.label(text) is None


@pytest.mark.parametrize(
    "text", ["DDR4_A1", "RAM1", "OtherBoard A", "SYSTEM BOARD DIMM1", "SO-DIMM A"]
)
def test_words_like_them_within_a_name(text: str) -> None:
    assert dimm_names.label(text) == text
    assert dimm_names.names(text) == "dimm"


@pytest.mark.parametrize("text", ["System Board Memory", "On Board Memory", "onboard"])
def test_soldered_memory_is_no_dimm(text: str) -> None:
    assert dimm_names.names(dimm_names.label(text) or "") == "channel"
