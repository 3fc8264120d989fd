"""What `tests/support/run_order.py` does once everything is loaded."""

import gc


def test_cyclic_garbage_is_searched_while_tests_run_but_not_in_what_is_loaded() -> None:
    assert gc.isenabled()
    assert gc.get_freeze_count() > 100_000
