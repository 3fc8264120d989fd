"""What tests of the commands share."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from dbsam_deploy.cli import run
from dbsam_deploy.machine.child_process import run_python


def loaded(names: Iterable[str], code: str, *, absent: Iterable[str] = ()) -> set[str]:
    """Which of these modules a fresh Python has loaded after `code`.

    Args:
        names: modules that are looked for.
        code: what it runs.
        absent: modules that cannot be imported in it.
    """
    ended = run_python(
        [
            "-c",
            f"import sys; sys.modules |= dict.fromkeys({list(absent)!r})\n{code}\n"
            f"print('loaded:', *(set({list(names)!r}) & set(sys.modules)))",
        ]
    )
    assert ended.status == 0, ended.log
    return set(ended.output.splitlines()[-1].split()[1:])


def refused(main: Callable[..., int], arguments: list[str], capsys) -> str:
    """What a command says on stderr about a user's mistake: one line, status 2, nothing printed."""
    assert run(main, arguments) == 2
    captured = capsys.readouterr()
    error = captured.err.strip()
    assert error.startswith("error: ")
    assert "\n" not in error
    assert captured.out == ""
    return error
