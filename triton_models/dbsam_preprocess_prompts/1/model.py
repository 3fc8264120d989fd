"""The work is in `dbsam_runtime`, which the export copies beside this file."""

import triton_python_backend_utils as pb_utils
from dbsam_runtime.steps import TritonStep, preprocess_prompts


class TritonPythonModel(TritonStep):
    step = staticmethod(preprocess_prompts)
    triton = pb_utils
