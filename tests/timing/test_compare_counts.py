"""`benchmarks/compare_counts.py`: what is timed, what is checked first, what is drawn."""

from dataclasses import replace

import compare_counts
import numpy as np
import pytest


@pytest.mark.parametrize(("kind", "count"), [("boxes", 3), ("images", 2)])
def test_masks_asked_alone_are_the_same_bit_for_bit(tiny_artefact, monkeypatch, kind, count):
    monkeypatch.setattr(compare_counts, "SIDE", 128)
    boxes = np.array([[8, 8, 60, 70], [8, 8, 61, 70], [9, 40, 99, 99]], np.float32)
    monkeypatch.setattr(compare_counts, "drawn_boxes", lambda number: boxes[:number])
    row = compare_counts.measure(tiny_artefact.folder, kind, count)
    assert row.count == count
    assert min(row.seconds, row.cpu_seconds, row.peak_mib) > 0
    asked = compare_counts.KINDS[kind]

    def spoilt(model, number):
        answer = asked.ask(model, number)
        answer.flat[-1] ^= 1
        return answer

    monkeypatch.setitem(compare_counts.KINDS, kind, replace(asked, ask=spoilt))
    with pytest.raises(AssertionError):
        compare_counts.measure(tiny_artefact.folder, kind, count)


@pytest.mark.parametrize("shape", [(40, 40), (3, 40, 40)])
def test_a_slice_without_the_drawn_object_is_refused(shape):
    y, x = np.mgrid[:40, :40] / 40 - 0.5
    answer = np.broadcast_to((x / 0.25) ** 2 + (y / 0.2) ** 2 <= 1, shape).astype(np.uint8)
    compare_counts.check_drawn(None, 3, answer)
    answer[..., :20] = 0
    with pytest.raises(SystemExit, match=r"Dice 0\.[5-7]\d+ with what was drawn"):
        compare_counts.check_drawn(None, 3, answer)


def test_the_picture_has_a_column_for_each_kind(tmp_path):
    rows = [compare_counts.Row(1, 0.1, 0.2, 100), compare_counts.Row(8, 0.8, 1.6, 200)]
    path = tmp_path / "growth.svg"
    compare_counts.draw({"boxes": {"fp16": rows}, "side": {"fp16": rows}}, path)
    text = path.read_text()
    assert "<svg" in text
    assert len([line for line in text.splitlines() if "axes_" in line]) == 4
