"""What an object is in SNOMED CT, as far as its name tells: from pydicom's own dictionary."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

from ..extras import require
from .segmentation import CodedTerm, SegmentedObject

TISSUE = CodedTerm("85756007", "SCT", "Tissue")
ANATOMY = CodedTerm("91723000", "SCT", "Anatomical Structure")
MORPHOLOGY = CodedTerm("49755003", "SCT", "Morphologically Abnormal Structure")
SIDES = {
    "left": CodedTerm("7771000", "SCT", "Left"),
    "right": CodedTerm("24028007", "SCT", "Right"),
}
_CONTEXTS = (("CID7192", ANATOMY), ("CID7194", MORPHOLOGY), ("CID7191", TISSUE))
"""DICOM's lists of what may be segmented → the category that its terms belong to."""
_SYNONYMS = {
    "urinarybladder": "bladder",
    "oesophagus": "esophagus",
    "oedema": "edema",
    "tumour": "neoplasm",
    "tumor": "neoplasm",
    "thyroidgland": "thyroid",
    "postcava": "inferiorvenacava",
    "ivc": "inferiorvenacava",
}
"""Names in common data sets → those of the dictionary."""


@dataclass(frozen=True)
class Property:
    """What a segment shows, as DICOM says it.

    Attributes:
        category: for example an anatomical structure.
        term: for example the kidney.
        side: left or right, where the name says it.
    """

    category: CodedTerm
    term: CodedTerm
    side: CodedTerm | None = None


def property_of(one: SegmentedObject) -> Property:
    """The code that a user gave, or that of a known name, or else tissue without more.

    >>> property_of(SegmentedObject(1, "left kidney")).term.meaning
    'Kidney'

    Raises:
        MissingError: pydicom is not installed.
    """
    words = re.findall(r"[a-z0-9]+", one.name.lower())
    side = next((SIDES[word] for word in words if word in SIDES), None)
    known = _known_terms()
    if one.code is not None:
        categories = {term.value: category for category, term in known.values()}
        return Property(categories.get(one.code.value, TISSUE), one.code, side)
    bare = "".join(word for word in words if word not in SIDES)
    for name in ("".join(words), bare, bare.removesuffix("s")):
        found = known.get(_SYNONYMS.get(name, name))
        if found is not None:
            return Property(*found, None if name == "".join(words) and name != bare else side)
    return Property(TISSUE, TISSUE)


@cache
def _known_terms() -> dict[str, tuple[CodedTerm, CodedTerm]]:
    """Name in small letters without blanks → category and term."""
    codes = require("pydicom.sr.codedict", extra="dicom", what_for="DICOM").codes
    known: dict[str, tuple[CodedTerm, CodedTerm]] = {}
    for context, category in _CONTEXTS:
        for name in getattr(codes, context).dir():
            code = getattr(getattr(codes, context), name)
            term = CodedTerm(code.value, code.scheme_designator, code.meaning)
            known.setdefault(name.lower(), (category, term))
    return known
