"""One real volume has the same figures as NIfTI, as DICOM with SEG, and as the npz of either."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from support.labelled_sets import write_nifti, write_seg, write_series

from dbsam_deploy import convert
from dbsam_deploy.artefact import Artefact
from dbsam_deploy.evaluation import build_protocol, evaluate, find_cases, read_cases
from dbsam_deploy.prediction.predictor import Predictor
from dbsam_deploy.sessions.onnxruntime_session import OnnxRuntimeSession

pytest.importorskip("nibabel")
pytest.importorskip("SimpleITK")
pytest.importorskip("highdicom")
SPACING = (2.5, 0.7, 0.8)
SLICES = slice(5, 17)


@pytest.mark.data
def test_one_volume_in_every_layout(
    test_set: Path, tmp_path: Path, tiny_artefact: Artefact
) -> None:
    with np.load(test_set / "CT_abdomen_3D" / "totalseg_example_ct.npz") as content:
        values = np.rint(content["imgs"][SLICES] * (400 / 255) - 160).astype(np.int16)  # as HU
        labels = (content["gts"][SLICES] % 3).astype(np.uint8)  # three kinds are enough
    nifti, dicom = tmp_path / "nifti" / "liver", tmp_path / "dicom" / "liver"
    place = {"spacing": SPACING[::-1], "origin": (0.0, 0.0, 0.0)}
    write_nifti(nifti / "imagesTr" / "case_0000.nii.gz", values, **place)
    write_nifti(nifti / "labelsTr" / "case.nii.gz", labels, **place)
    names = {"background": 0, "liver": 1, "spleen": 2}
    about = {"channel_names": {"0": "CT"}, "labels": names, "file_ending": ".nii.gz"}
    (nifti / "dataset.json").write_text(json.dumps(about))
    files = write_series(
        dicom / "case" / "ct", values.astype(int), spacing_mm=SPACING, origin_mm=(0.0, 0.0, 0.0)
    )
    order = np.argsort(np.sin(np.arange(len(files))))  # neither that of the series nor of the files
    write_seg(dicom / "case" / "seg.dcm", [files[z] for z in order], labels[order])
    folders = [nifti, dicom]
    for folder in (nifti, dicom):
        folders.append(tmp_path / "npz" / folder.parent.name)
        assert convert.main([str(folder), str(folders[-1])]) == 0
    predictor = Predictor(OnnxRuntimeSession(tiny_artefact), tiny_artefact.preprocessing)
    for name in ("objects", "cvpr24"):  # the latter compares surfaces in mm
        found = [
            evaluate(
                predictor,
                read_cases(find_cases(folder)),
                build_protocol(name),
                max_slices=2,
                intervals=False,
            )
            for folder in folders
        ]
        assert found[0].object_mean > 0
        for other in found[1:]:
            assert asdict(other.summary) == asdict(found[0].summary)
            figures = [
                [(one.score, one.box, one.label_name) for one in result.objects]
                for result in (found[0], other)
            ]
            assert figures[0] == figures[1]
        assert "soft-tissue" in found[1].intensities["case"]
