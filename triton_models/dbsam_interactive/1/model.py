"""The work is in `dbsam_runtime`, which the export copies beside this file."""

import triton_python_backend_utils as pb_utils
from dbsam_runtime.front import TritonFront


class TritonPythonModel(TritonFront):
    triton = pb_utils
