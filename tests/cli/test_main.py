import os
import signal
import subprocess
import sys
import time

import pytest

import onnxslim_passes.cli as cli

COMMANDS = ["compare", "compress", "explain", "inspect", "passes"]


def test_help_lists_the_commands_and_exit_codes(run):
    result = run("--help")
    assert result.code == 0
    assert result.err == ""
    for command in COMMANDS:
        assert command in result.out
    assert "Exit codes" in result.out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(run, command):
    result = run(command, "--help")
    assert result.code == 0
    assert f"onnxslim-passes {command}" in result.out


def test_version_is_the_package_s(run):
    result = run("--version")
    assert result.code == 0
    assert result.out.strip()[0].isdigit()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["compres", "a.onnx"], 'Did you mean "compress"?'),
        (["inspect"], "model"),
        (["inspect", "a.onnx", "--tpo", "3"], "--tpo"),
        (["inspect", "a.onnx", "--top", "three"], "three"),
        (["passes", "prune-magnitud"], "Did you mean 'prune-magnitude'?"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(run, argv, message):
    result = run(*argv)
    assert result.code == 2
    assert result.out == ""
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1
    assert message.lower() in result.err.lower()


@pytest.mark.parametrize("content", [b"", b"not an ONNX file", b"\x08\x07\x12\x04onnx"])
def test_a_broken_model_is_one_line_and_exit_code_3(run, tmp_path, content):
    path = tmp_path / "broken.onnx"
    path.write_bytes(content)
    result = run("inspect", path)
    assert result.code == 3
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1
    assert "broken.onnx" in result.err


def test_a_missing_model_is_named(run, tmp_path):
    result = run("inspect", tmp_path / "absent.onnx")
    assert result.code in (2, 3)
    assert "absent.onnx" in result.err


def test_a_folder_instead_of_a_model_is_refused(run, tmp_path):
    result = run("inspect", tmp_path)
    assert result.code in (2, 3)
    assert result.err.startswith("error: ")


def test_an_unforeseen_failure_is_one_line_that_asks_for_a_report(run, monkeypatch):
    def fail():
        raise LookupError("something\nodd")

    monkeypatch.setattr(cli, "_app", fail)
    monkeypatch.delenv(cli.DEBUG_VARIABLE, raising=False)
    result = run("passes")
    assert result.code == 1
    assert result.err.startswith("error: LookupError: something odd (a defect of onnxslim-passes")
    assert result.err.count("\n") == 1


def test_the_traceback_is_shown_when_asked_for(run, monkeypatch):
    monkeypatch.setenv(cli.DEBUG_VARIABLE, "1")
    result = run("passes", "prune-magnitud")
    assert result.code == 2
    assert "Traceback" in result.err
    assert result.err.splitlines()[-1].startswith("error: Unknown pass")


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError(), 3, "out of memory"),
        (PermissionError(13, "Permission denied", "x.npz"), 3, "x.npz: Permission denied"),
    ],
)
def test_interrupts_and_the_system_s_errors_have_their_exit_codes(
    run, monkeypatch, error, code, message
):
    def fail():
        raise error

    monkeypatch.setattr(cli, "_app", fail)
    result = run("passes")
    assert result.code == code
    assert message in result.err


def test_a_reader_that_goes_away_is_no_error():
    command = [sys.executable, "-c", "import sys; from onnxslim_passes.cli import main; main()"]
    shell = subprocess.run(
        ["bash", "-c", '"$@" | true', "bash", *command, "passes", "--json"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        check=False,
    )
    assert shell.stderr == ""


def test_the_installed_command_sets_the_exit_code(tmp_path):
    code = "import sys; from onnxslim_passes.cli import main; sys.exit(main())"
    process = subprocess.run(
        [sys.executable, "-c", code, "inspect", str(tmp_path / "absent.onnx")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode in (2, 3)
    assert process.stderr.startswith("error: ")
    assert process.stdout == ""


def test_ctrl_c_in_the_middle_leaves_no_file(model, tmp_path):
    (tmp_path / "slow.py").write_text(
        "import pathlib, time\n"
        "def feeds():\n"
        "    pathlib.Path(__file__).with_name('begun').touch()\n"
        "    time.sleep(60)\n"
        "    yield {}\n"
    )
    code = "import sys; from onnxslim_passes.cli import main; sys.exit(main())"
    argv = ["compress", "net.onnx", "-o", "out.onnx", "--pass", "quantize-static"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *argv, "--calibration", "slow.py:feeds"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Jobs in the background of a shell ignore the signal, and so do their children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    begun = tmp_path / "begun"
    while not begun.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert out == ""
    assert err == "error: interrupted; nothing was written\n"
    assert not (tmp_path / "out.onnx").exists()
