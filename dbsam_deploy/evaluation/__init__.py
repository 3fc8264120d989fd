"""Evaluation: protocols, metrics and reports (`python -m dbsam_deploy.evaluate`)."""

from ..datasets.cases import LabelledCase, read_case, read_cases
from ..datasets.finding import find_cases
from .evaluator import evaluate
from .protocols import PROTOCOLS, EvaluationProtocol, build_protocol
from .results import EvaluationResult

__all__ = [
    "PROTOCOLS",
    "EvaluationProtocol",
    "EvaluationResult",
    "LabelledCase",
    "build_protocol",
    "evaluate",
    "find_cases",
    "read_case",
    "read_cases",
]
