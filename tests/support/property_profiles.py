"""How many examples a property test tries.

By default the same ones in every run, so that no run of CI fails by chance. For new ones:
`pytest tests/images/test_reader_properties.py --hypothesis-profile=fuzz`.
"""

from hypothesis import HealthCheck, settings

settings.register_profile(
    "suite",
    derandomize=True,
    max_examples=20,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("fuzz", max_examples=1000, deadline=None, print_blob=True)
settings.load_profile("suite")
