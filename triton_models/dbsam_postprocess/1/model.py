"""The work is in `dbsam_runtime`, which the export copies beside this file."""

import triton_python_backend_utils as pb_utils
from dbsam_runtime.steps import TritonStep, postprocess_boxes


class TritonPythonModel(TritonStep):
    step = staticmethod(postprocess_boxes)
    triton = pb_utils
