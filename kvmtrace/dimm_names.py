"""Names of memory: whether they name a DIMM, and if not, what."""

from __future__ import annotations

import re

from kvmtrace import sanitize

# What firmware has in place of a name (SMBIOS), and EDAC where it has none:
# edac_mc_handle_error (drivers/edac/edac_mc.c), ghes_edac.c.
_PLACEHOLDERS = (
    r"no(?: dimm| module)? (?:installed|present)",
    r"(?:any|unknown|no|not known) (?:memory|dimms?|module|label|slot|bank|location|name)",
    r"not (?:specified|available|applicable|provided|populated|present|installed|set|known|used)",
    r"no dimms?|tbd|other|unset|unlabell?ed",
    r"(?:un)?specified|undefined|unknown|unavailable|unpopulated|unassigned",
    r"(?:to be )?(?:fill(?:ed)?|defined)(?: by)?(?: o\.?e\.?m\.?)?|default string|o\.?e\.?m\.?",
    r"empty|none|null|nil|n/?a|n\.a\.|reserved|invalid|(?:device|bank) ?locator|system default",
    r"<?(?:bad index|out of spec)>?",
    # No names either: they are of a kind of part, not of one part.
    r"(?:so|u|r|lr)?[\W_]*dimms?|(?:system )?memory(?: module| device)?|ram|(?:lp)?ddr\d\w?",
    r"bank|channel|slot|location|x{2,}|0xf+|4294967295",
)
# Atomic groups: no text of firmware's takes long to match.
_WORDS = "|".join(_PLACEHOLDERS).replace(" ", r"[\W_]+")
_ONLY = re.compile(rf"(?>[\W_]*(?:{_WORDS})(?![^\W_]))*[\W_]*", re.IGNORECASE)
_AT_AN_END = re.compile(
    r"^[\[(<]?(?:not specified|unknown|undefined|none|n/a|default string|no dimm)[\])>]? (?=.*\w)"
    r"|(?<=\w) [\[(<]?(?:not specified|unknown|undefined|none|n/a|default string|no dimm)[\])>]?$",
    re.IGNORECASE,
)

_SOLDERED = re.compile(r"\b(?:system ?board|on[- ]?board) memory$|^on[- ]?board$", re.IGNORECASE)

_OR = " or "  # OTHER_LABEL, include/linux/edac.h

# EDAC's label of memory to which its driver gives no name: the controller and a number in each of
# its layers (edac_mc_alloc_dimms and edac_layer_name, edac_mc.c). The last layer is the kind.
_POSITION = re.compile(r"mc#\d+(?:(branch|channel|slot|csrow|memory)#\d+)*", re.IGNORECASE)
_CHIP_SELECT = re.compile(r"csrow[\W_]*\d", re.IGNORECASE)

# Slots as boards call them ("A1", "P1-DIMMA2", "Card01, ChnG, DIMM0"); "P1" is a processor, and
# "DIMM error 1" is none of them.
_A_SLOT = re.compile(
    r"dimm[\W_]*(?:(?:slot|socket|location|cpu|proc|node|ch\w{0,5})[\W_]*)?(?:[a-p]?\d|[a-p]\b)"
    r"|^[a-o]\d{1,2}$",
    re.IGNORECASE,
)


def label(text: str | None) -> str | None:
    """Return the name in ``text`` without placeholders; None if it names nothing.

    A name that occurs twice ("DIMM0 or DIMM0", two ranks of it) is returned once. All memory of a
    controller ("mc#0memory#0") is not a name.
    """
    if not text:
        return None
    names = []
    for name in sanitize.clean(text).split(_OR):
        before = None
        while name != before and not _ONLY.fullmatch(name):
            before, name = name, _AT_AN_END.sub("", name).strip()  # noqa: PLW2901
        if not _ONLY.fullmatch(name) and _layer(name) not in ("", "memory"):
            names.append(name)
    return _OR.join(dict.fromkeys(names)) or None


def of_fru(text: str | None) -> str | None:
    """Return ``text`` of a field-replaceable unit if it names a DIMM.

    Firmware also puts the kind of an error there ("CorrectedErr", "DIMM ????").
    """
    name = label(text)
    return name if name and "?" not in name and _A_SLOT.search(name) else None


def candidates(label: str) -> list[str]:
    """Return all names in a label: EDAC lists those that it cannot distinguish."""
    return label.split(_OR)


def names(label: str) -> str:
    """Return what a label names: "dimm"; "slot", "rank" or "channel" of a position; "candidates".

    A position ("mc#0channel#1slot#0") is not printed on a board; drivers that have chip selects
    name the rank ("mc#0csrow#2channel#1"). Memory in a processor's package ("…_HBMC#0_Chan#1",
    skx_common.c) or soldered to the board ("Slice#0_Chan#1", pnd2_edac.c; "System Board Memory",
    SMBIOS) is no DIMM.
    """
    if _OR in label:
        return "candidates"
    if _CHIP_SELECT.search(label):
        return "rank"
    if (layer := _layer(label)) is not None:
        return "slot" if layer == "slot" else "channel"
    if "_HBMC#" in label or label.startswith("Slice#") or _SOLDERED.search(label):
        return "channel"
    return "dimm"


def is_position(label: str) -> bool:
    """Whether a label is the place of a DIMM as EDAC counts them."""
    return _layer(label) is not None or bool(_CHIP_SELECT.search(label))


def _layer(label: str) -> str | None:
    """Return the last layer of a position, "" for a controller; None for another label."""
    position = _POSITION.fullmatch(label)
    return (position[1] or "").lower() if position else None
