"""Bookkeeping of recordings, with one that runs the function again instead of a CUDA graph."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from dbsam_deploy.sessions.cuda_graphs import CudaGraphRecorder, RecordedFunction, Recording

CPU = torch.device("cpu")


class Rerun:
    """Records by keeping the function, and counts."""

    def __init__(self) -> None:
        self.recorded: list[tuple[torch.Size, ...]] = []
        self.replays = 0

    def __call__(self, function, inputs) -> Recording:
        self.recorded.append(tuple(tensor.shape for tensor in inputs))
        buffers = tuple(torch.full_like(tensor, torch.nan) for tensor in inputs)
        outputs = tuple(torch.full_like(tensor, torch.nan) for tensor in function(*inputs))

        def replay() -> None:
            self.replays += 1
            for buffer, value in zip(outputs, function(*buffers), strict=True):
                buffer.copy_(value)

        return Recording(buffers, outputs, replay)


def work(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x + y, x * y


def test_each_set_of_shapes_is_recorded_once():
    recorder = Rerun()
    recorded = RecordedFunction(work, recorder, device=CPU)
    for rows in (1, 2, 1, 2, 2):
        x, y = torch.randn(rows, 3), torch.randn(rows, 3)
        for found, expected in zip(recorded(x, y), work(x, y), strict=True):
            assert torch.equal(found, expected)
    assert recorder.recorded == [((1, 3), (1, 3)), ((2, 3), (2, 3))]
    assert recorder.replays == 5


def test_another_dtype_is_another_recording():
    recorder = Rerun()
    recorded = RecordedFunction(work, recorder, device=CPU)
    for dtype in (torch.float32, torch.float64):
        x = torch.randn(2, dtype=dtype)
        assert torch.equal(recorded(x, x)[0], x + x)
    assert len(recorder.recorded) == 2


def test_the_recording_used_longest_ago_goes_first():
    recorder = Rerun()
    recorded = RecordedFunction(work, recorder, device=CPU, limit=2)
    for rows in (1, 2, 1, 3, 1, 2):
        recorded(torch.ones(rows), torch.ones(rows))
    assert [shapes[0][0] for shapes in recorder.recorded] == [1, 2, 3, 2]


def test_outputs_are_the_recordings_own():
    recorded = RecordedFunction(work, Rerun(), device=CPU)
    first = recorded(torch.ones(2), torch.ones(2))
    second = recorded(torch.zeros(2), torch.zeros(2))
    assert first[0] is second[0]
    assert torch.equal(first[0], torch.zeros(2))


def test_inputs_that_cannot_be_copied_are_an_error():
    recorded = RecordedFunction(work, Rerun(), device=CPU)
    with pytest.raises(TypeError):
        recorded(torch.ones(2))


def test_other_threads_may_use_cuda_while_one_records(monkeypatch):
    """PyTorch's default mode is ended by any thread's allocation."""
    modes = []

    class Played(contextlib.nullcontext):
        def __init__(self, *arguments, capture_error_mode="global", **named):
            super().__init__()
            modes.append(capture_error_mode)

    stream = SimpleNamespace(wait_stream=lambda other: None)
    played = {
        **{"graph_pool_handle": lambda: (0, 1), "stream": contextlib.nullcontext},
        **{"Stream": lambda: stream, "current_stream": lambda: stream},
        **{"CUDAGraph": lambda: SimpleNamespace(replay=None), "graph": Played},
    }
    for name, value in played.items():
        monkeypatch.setattr(torch.cuda, name, value)
    recording = CudaGraphRecorder()(work, (torch.ones(2), torch.ones(2)))
    assert torch.equal(recording.outputs[0], torch.full((2,), 2.0))
    assert modes == ["thread_local"]
