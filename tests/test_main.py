"""`dbsam`: one command for all doors, named as it was called, and completed by a shell."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import shtab
from support.commands import loaded

from dbsam_deploy import __main__ as command
from dbsam_deploy import __version__, cli, completion
from dbsam_deploy.cli import DOORS

PACKAGE = Path(cli.__file__).parent


@pytest.fixture(scope="module")
def dbsam(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The script that pip makes of `[project.scripts]`."""
    script = tmp_path_factory.mktemp("bin") / "dbsam"
    script.write_text(
        f"#!{sys.executable}\nimport sys\nfrom dbsam_deploy.__main__ import main\n"
        "sys.exit(main())\n"
    )
    script.chmod(0o755)
    return script


def call(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in words],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=PACKAGE.parent,
        env={"PYTHONPATH": str(PACKAGE.parent), "PATH": "/usr/bin:/bin"},
    )


def test_every_door_is_a_command() -> None:
    runnable = {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        for path in PACKAGE.rglob("*.py")
        if re.search(r"^    sys.exit\((cli\.)?run\(main\)\)", path.read_text(), re.M)
    }
    internal = {
        *("machine.hardware", "engines.worker", "quantization.modelopt_worker"),
        "api.served_graphs",
    }
    assert {door.module for door in DOORS.values()} == runnable - internal


def test_help_lists_every_command_with_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        command.main(["--help"])
    text = capsys.readouterr().out
    for name, door in DOORS.items():
        assert f"  {name:{max(map(len, DOORS))}}  {door.about}\n" in text
    assert max(map(len, text.splitlines())) <= 100


def test_help_imports_no_door() -> None:
    program = (
        "import sys, contextlib\nfrom dbsam_deploy.__main__ import main\n"
        "with contextlib.suppress(SystemExit): main(['--help'])\n"
        "slow = {'torch', 'onnx', 'onnxruntime', 'numpy', 'shtab', 'PIL'}\n"
        "print(sorted(slow & set(sys.modules)), file=sys.stderr)\n"
    )
    assert call(sys.executable, "-c", program).stderr.strip() == "[]"


def test_the_version_and_the_name(dbsam: Path) -> None:
    assert call(dbsam, "--help").stdout.startswith("usage: dbsam COMMAND ...\n")
    assert call(dbsam, "--version").stdout == f"dbsam-deploy {__version__}\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["predct", "x.png"], "'predct' is not a command: did you mean predict? See "),
        (["xyz"], "'xyz' is not a command: expected one of export, predict, serve"),
        ([], "name a command: export, predict, serve"),
        (["--what"], "unrecognized arguments: --what"),
        (["export", "--precision", "fp13"], "invalid choice: 'fp13'"),
        (["train"], "the following arguments are required: --recipe"),
        (["completion", "cmd"], "invalid choice: 'cmd'"),
        (["predict", "missing.png", "--box", "1", "2", "3", "4"], "missing.png"),
        (["repository", "--artefact", "missing"], "no manifest.json in missing"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(words) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("error: ")
    assert message in err


MISTAKES = (
    ("--checkpoint", "missing.pth"),
    ("--variant", "db_sam_huge"),
    ("--image-size", "100"),
    ("--budget", "2"),
)
TRAINING_FILES = ("data", "split", "unlabelled", "checkpoint", "decoder-weights", "teacher-weights")


def test_a_mistake_needs_no_pytorch() -> None:
    mistakes = [
        *((word, "--no-such-option") for word in ("export", "train", "sensitivity", "engine")),
        *((word, "--no-such-option") for word in ("evaluate", "predict", "serve")),
        *(("export", "--precision", "fp16", *words) for words in MISTAKES),
        *(("sensitivity", "--calibration", ".", *words) for words in MISTAKES),
        ("export", "--precision", "int8"),
        ("export", "--precision", "fp16", "--calibration", "."),
        ("sensitivity", "--calibration", "missing"),
        ("sensitivity",),
        ("train", "--recipe", "missing"),
        ("train", "--recipe", "missing.toml"),
        *(("train", "--recipe", "db_sam", f"--{name}", "missing") for name in TRAINING_FILES),
        ("evaluate", "--data", "missing"),
        ("evaluate", "--data", ".", "--artefact", "missing"),
        ("evaluate", "--data", ".", "--backend", "pytorch", "--checkpoint", "missing.pth"),
        ("engine", "verify", "--checkpoint", "missing.pth"),
        ("engine", "build", "--artefact", "missing"),
    ]
    program = (
        "from dbsam_deploy.__main__ import main\n"
        f"for words in {mistakes}:\n"
        "    assert main(words) == 2, words\n"
    )
    assert loaded({"torch", "monai", "scipy"}, program) == set()


@pytest.mark.parametrize("way", ["script", "package", "module"])
def test_a_door_is_named_as_it_was_called(dbsam: Path, way: str) -> None:
    start = {
        "script": ([dbsam, "repository"], "dbsam repository"),
        "package": ([sys.executable, "-m", "dbsam_deploy", "repository"], None),
        "module": ([sys.executable, "-m", "dbsam_deploy.serving.repository"], None),
    }[way]
    words, name = start[0], start[1] or "python " + " ".join(start[0][1:])
    text = call(*words, "--help").stdout
    assert text.startswith(f"usage: {name} [-h]")
    assert f"\n    {name} --artefact build/fp16\n" in text
    assert call(*words, "--what").stderr.endswith(f"see `{name} --help`\n")
    advice = call(*words, "--artefact", "missing").stderr
    assert f"run `{name.replace('repository', 'export').replace('.serving', '')} --prec" in advice


def test_only_our_commands_are_renamed(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "python -m dbsam_deploy; python -m dbsam_deploy.export. "
    text += "python -m dbsam_deploy.machine.hardware; python -m pip"
    assert cli.as_called(text) == text
    monkeypatch.setattr(sys, "argv", ["/usr/bin/dbsam", "doctor"])
    renamed = "dbsam; dbsam export. python -m dbsam_deploy.machine.hardware; python -m pip"
    assert cli.as_called(text) == renamed


def test_command_lines_need_the_base_install_alone() -> None:
    """So that `--help` and `completion` work whatever extras are there."""
    extras = ["torch", "onnx", "onnxruntime", "openvino", "tritonclient", "monai", "scipy"]
    extras += ["matplotlib", "accelerate", "safetensors", "segment_anything", "nibabel"]
    program = (
        "from dbsam_deploy.completion import whole_parser\n"
        "assert 'predict' in whole_parser().format_usage()\n"
    )
    assert loaded([], program, absent=extras) == set()


COMPLETE = """\
source "$1"; shift
declare -a spec=($(complete -p dbsam)); COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
for index in "${!spec[@]}"; do [ "${spec[index]}" = -F ] && function=${spec[index + 1]}; done
"$function" dbsam "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `dbsam completion bash` prints."""
    path = tmp_path_factory.mktemp("completion") / "dbsam.bash"
    path.write_text(shtab.complete(completion.whole_parser(), "bash"))
    return path


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("dbsam pre", {"predict"}),
        ("dbsam ", set(DOORS)),
        ("dbsam export --prec", {"--precision"}),
        ("dbsam export --precision fp1", {"fp16"}),
        ("dbsam engine ver", {"verify"}),
        ("dbsam engine verify --art", {"--artefact"}),
        ("dbsam predict --backend open", {"openvino"}),
        ("dbsam completion z", {"zsh"}),
        ("dbsam predict skin", {"skin.png"}),
        ("dbsam predict skin.png --art", {"--artefact"}),
        ("dbsam predict skin.png --artefact bui", {"build"}),
    ],
)
def test_bash_completes(script: Path, tmp_path: Path, words: str, expected: set[str]) -> None:
    (tmp_path / "skin.png").touch()
    (tmp_path / "build").mkdir()
    command = ["bash", "--norc", "-c", COMPLETE, "complete", str(script), *words.split(" ")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=tmp_path)
    assert result.stderr == ""
    found = set(result.stdout.split())
    assert expected <= found
    assert all(one.startswith(words.split(" ")[-1]) for one in found)


def test_the_shells_are_those_of_shtab() -> None:
    assert set(completion.SHELLS) == set(shtab.SUPPORTED_SHELLS)


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_every_shell_gets_a_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["completion", shell]) == 0
    text = capsys.readouterr().out
    assert "sensitivity" in text
    assert "--precision" in text or "precision" in text
