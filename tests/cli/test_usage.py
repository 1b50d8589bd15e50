"""Every command that is listed exists, explains itself and has the options that the design promises."""

import subprocess
import sys
from pathlib import Path

import pytest

from deepspan.scripts.cli import COMMANDS

SAMPLING = ["--max-new-tokens", "--temperature", "--top-p", "--top-k", "--seed"]
OPTIONS = {
    "demo": [],
    "generate": ["RUN", "--set", "--prompt", "--input-file", "--raw", "--json", *SAMPLING],
    "chat": ["RUN", "--set", "/exit", "/clear", "/system", *SAMPLING],
    "logits": ["RUN", "--set", "--prompt-ids", "--prompt", "--output"],
    "compare": ["A.npz", "B.npz", "--rtol"],
    "eval": ["RUN", "--set", "--task", "--limit", "--json"],
    "inspect": ["PATH", "--json"],
    "bench": ["RUN", "--set", "--batch", "--context", "--steps", "--prefill", "--json"],
    "doctor": [],
}


@pytest.mark.parametrize("command", OPTIONS)
def test_help_names_every_option(deepspan, command):
    result = deepspan(command, "--help")
    assert result.code == 0
    for option in [*OPTIONS[command], "--debug"]:
        assert option in result.out, option


def test_help_lists_every_command(deepspan):
    result = deepspan("--help")
    assert result.code == 0
    assert set(OPTIONS) <= set(COMMANDS)
    assert all(command in result.out for command in COMMANDS)


def test_version(deepspan):
    assert deepspan("--version").out.startswith("deepspan ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "no command"),
        (("--versoin",), "unrecognized arguments: --versoin: deepspan: "),
        (("generat",), "invalid choice: 'generat'"),
        (("generate",), "RUN"),
        (("generate", "demo_reference", "--promt", "x"), "unrecognized arguments: --promt x: deepspan generate: "),
        (("generate", "demo_reference", "--prompt", "x", "--top-k", "many"), "--top-k: invalid int value: 'many'"),
        (("logits", "demo_reference", "--prompt-ids", "1"), "--output"),
        (("logits", "demo_reference", "--output", "x.npz"), "--prompt-ids"),
    ],
)
def test_bad_usage_is_one_line_and_exit_2(deepspan, arguments, message):
    result = deepspan(*arguments)
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("error: ") and result.err.count("\n") == 1
    assert message in result.err


def test_debug_shows_where_it_happened(deepspan):
    plain, debug = (deepspan("inspect", "nothing", *more) for more in ((), ("--debug",)))
    assert "Traceback" not in plain.err
    assert "Traceback" in debug.err and debug.err.endswith(plain.err)
    assert plain.code == debug.code == 2


def test_a_fault_of_ours_is_one_line_and_exit_1(deepspan, monkeypatch):
    def fail(options):
        raise RuntimeError("two\nlines")

    monkeypatch.setattr("deepspan.scripts.commands.doctor.run", fail)
    result = deepspan("doctor")
    assert result.code == 1
    assert result.err == "error: RuntimeError: two lines: run it again with --debug to see where\n"


def test_a_file_that_cannot_be_used_is_named(deepspan, monkeypatch):
    def fail(options):
        Path("/nowhere/file").read_bytes()

    monkeypatch.setattr("deepspan.scripts.commands.doctor.run", fail)
    result = deepspan("doctor")
    assert result.code == 1
    assert result.err.startswith("error: No such file or directory: /nowhere/file: check the path")


def command(*arguments, cwd, **options):
    line = [sys.executable, "-m", "deepspan.scripts.cli", *arguments]
    return subprocess.run(line, cwd=cwd, capture_output=True, text=True, timeout=60, **options)


def test_results_and_messages_go_to_their_own_streams(tmp_path):
    result = command("generate", "demo_reference", input="12 + 30 =\n\nHello\n", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "> 12 + 30 =\n42\n\n> Hello\nHello! How can I help you today?\n\n"
    assert result.stderr == "note: standard input: 1 blank line skipped\n"


def test_a_reader_that_goes_away_is_no_error(tmp_path):
    line = f"{sys.executable} -m deepspan.scripts.cli generate demo_reference --prompt Hello | true"
    result = subprocess.run(line, shell=True, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("shell", "code", "messages"),
    [
        ("{} inspect demo > /dev/full", 1, "error: No space left on device: a file or standard output: check "),
        ("{} inspect demo >&-", 0, ""),
        ("{} generate demo_reference <&-", 2, "error: no prompts: standard input: write one prompt a line\n"),
        (
            "PYTHONIOENCODING=ascii {} generate demo_reference --prompt 你好",
            1,
            "error: cannot write '\\u4f60' in ascii: output: set PYTHONIOENCODING=utf-8\n",
        ),
    ],
)
def test_streams_that_take_or_give_nothing(tmp_path, shell, code, messages):
    line = shell.format(f"{sys.executable} -m deepspan.scripts.cli")
    result = subprocess.run(line, shell=True, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert result.returncode == code
    assert result.stderr.startswith(messages) and result.stderr.count("\n") == bool(messages)


def test_an_error_leaves_by_the_exit_code(tmp_path):
    result = command("generate", "nowhere", "--prompt", "x", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: no such run: nowhere: ")
