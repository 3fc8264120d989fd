"""The process that runs nvidia-modelopt, in the Python that has it.

`modelopt_tool` starts it by its path; by hand it repeats a job. It imports nothing of this library:
that Python needs modelopt only, and modelopt replaces functions inside ONNX Runtime's tools, which
must not happen in a process that goes on using them.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

DESCRIPTION = """\
Place Q/DQ around chosen layers of an ONNX graph with nvidia-modelopt, calibrated on images; an
export whose recipe has tool = "modelopt" runs this in a process of its own.

example:
  repeat a job
    python -m dbsam_deploy.quantization.modelopt_worker --job job.json --answer answer.json
"""


class _UsageError(Exception):
    """A user's mistake, for one line."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise _UsageError(f"{message}; see `{self.prog} --help`")


class _Images:
    """What modelopt reads calibration data from: one file for each image, read one at a time."""

    def __init__(self, folder: Path) -> None:
        self._files = sorted(folder.glob("*.npz"))
        self._next = 0

    def get_next(self) -> dict[str, Any] | None:
        if self._next == len(self._files):
            return None
        self._next += 1
        return self._read(self._files[self._next - 1])

    def get_first(self) -> dict[str, Any]:
        return self._read(self._files[0])

    def rewind(self) -> None:
        self._next = 0

    @staticmethod
    def _read(path: Path) -> dict[str, Any]:
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)


def quantize(job: dict[str, Any]) -> dict[str, Any]:
    """Run modelopt on a job, see `modelopt_tool.ModelOptJob`.

    Returns:
        `version` of modelopt and `seconds`.

    Raises:
        ImportError: modelopt or one of its packages is not installed.
    """
    import modelopt
    from modelopt.onnx.quantization import quantize as run

    start = time.monotonic()
    run(
        job["graph"],
        quantize_mode=job["format"],
        calibration_data_reader=_Images(Path(job["images"])),
        calibration_method=job["calibrator"],
        calibration_eps=["cpu"],
        nodes_to_quantize=job["nodes"],
        op_types_to_quantize=job["operators"],
        output_path=job["output"],
        dq_only=True,  # weights as codes, not as floats that are rounded when the graph is loaded
        high_precision_dtype="fp32",  # everything else stays as it is; the default is fp16
        passes=[],  # no common range for all that enters a Concat
        disable_mha_qdq=True,
        enable_gemv_detection_for_trt=False,  # the caller's choice of layers is final
        log_level="WARNING",
    )
    return {"version": modelopt.__version__, "seconds": time.monotonic() - start}


def main(argv: list[str] | None = None) -> int:
    """Run the job; returns the exit status."""
    parser = _Parser(
        prog="python -m dbsam_deploy.quantization.modelopt_worker",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--job", type=Path, required=True, help="JSON of a `modelopt_tool.ModelOptJob`"
    )
    parser.add_argument("--answer", type=Path, required=True, help="JSON file to write")
    try:
        args = parser.parse_args(argv)
        try:
            job = json.loads(args.job.read_text())
        except (OSError, ValueError) as error:
            raise _UsageError(f"{args.job} is no job of this library: {error}") from error
        answer = quantize(job)
    except (_UsageError, ImportError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    args.answer.write_text(json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main())
