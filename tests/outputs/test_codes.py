"""Names of objects → SNOMED CT."""

import pytest

from dbsam_deploy.outputs.codes import property_of
from dbsam_deploy.outputs.segmentation import CodedTerm, SegmentedObject

pytest.importorskip("pydicom")


@pytest.mark.parametrize(
    ("name", "category", "value", "side"),
    [
        ("Liver", "Anatomical Structure", "10200004", None),
        ("left kidney", "Anatomical Structure", "64033007", "Left"),
        ("kidney_right", "Anatomical Structure", "64033007", "Right"),
        ("lungs", "Anatomical Structure", "39607008", None),
        ("Left ventricle", "Anatomical Structure", "87878005", None),
        ("tumour", "Morphologically Abnormal Structure", "108369006", None),
        ("Oesophagus", "Anatomical Structure", "32849002", None),
        ("box3d 0 0 1 4 4 3", "Tissue", "85756007", None),
        ("", "Tissue", "85756007", None),
    ],
)
def test_a_name_is_looked_up(name: str, category: str, value: str, side: str | None) -> None:
    found = property_of(SegmentedObject(1, name))
    assert (found.category.meaning, found.term.value, found.term.scheme) == (category, value, "SCT")
    assert (found.side and found.side.meaning) == side


def test_a_users_code_goes_first() -> None:
    own = CodedTerm("123", "99MINE", "my structure")
    found = property_of(SegmentedObject(1, "liver", code=own))
    assert (found.term, found.category.meaning) == (own, "Tissue")
