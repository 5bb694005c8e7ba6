"""A launcher's variables, the locale, closed streams and Ctrl-C: one line, or no matter."""

import os
import signal
import subprocess
import sys

import pytest

from core.errors import InputError
from core.launcher import check_launcher, check_text
from tests.commands import ROOT, TIMEOUT_SECONDS
from train import distributed

TWO = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "::1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE is 'abc' in the environment: set a number"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE is ''"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is 0"),
        ({"WORLD_SIZE": "2"}, "RANK is not set"),
        ({"WORLD_SIZE": "٣"}, "WORLD_SIZE is '٣'"),
        ({**TWO, "RANK": "x"}, "RANK is 'x'"),
        ({**TWO, "RANK": "-1"}, "RANK is '-1'"),
        ({**TWO, "RANK": "2"}, "RANK is 2 in the environment, WORLD_SIZE is 2"),
        ({**TWO, "LOCAL_RANK": ""}, "LOCAL_RANK is ''"),
        ({**TWO, "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2"}, "LOCAL_RANK is 2"),
        ({**TWO, "MASTER_PORT": "abc"}, "MASTER_PORT is 'abc'"),
        ({**TWO, "MASTER_PORT": "70000"}, "set a port of 1 to 65535"),
        ({**TWO, "MASTER_PORT": "9" * 400}, "MASTER_PORT is '999"),
        ({"RANK": "0", "WORLD_SIZE": "1"}, "MASTER_ADDR and MASTER_PORT not"),
        ({"TORCHELASTIC_RESTART_COUNT": "1.5"}, "TORCHELASTIC_RESTART_COUNT is '1.5'"),
    ],
)
def test_wrong_variables_are_one_line(environment: dict[str, str], message: str) -> None:
    with pytest.raises(InputError) as raised:
        check_launcher(environment)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_right_variables_pass() -> None:
    for environment in ({}, TWO, {"LOCAL_RANK": "1"}, {"WORLD_SIZE": "1"}, {"SLURM_JOB_ID": "x"}):
        check_launcher(environment)


def run(code: str, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python code at the root of the checkout."""
    return subprocess.run(
        [*words, sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
    )


PRINTS = "from core import log; log.init_logger(); import logging; logging.getLogger('core')"


def test_a_narrow_encoding_shows_escapes() -> None:
    result = run(f"{PRINTS}.info('na\\xefve')", PYTHONIOENCODING="ascii:strict")
    assert (result.returncode, result.stdout, result.stderr) == (0, "na\\xefve\n", "")


def test_closed_streams_are_no_files_of_a_run() -> None:
    code = f"{PRINTS}.info('x'); logging.getLogger('core').error('x'); print('x'); "
    code += "import os; fd = os.open('/dev/zero', 0); os.execlp('sh', 'sh', '-c', f'exit {fd}')"
    result = run(code, "sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh")
    assert result.returncode > 2  # the number of the next file


def test_a_locale_without_utf8_reads_utf8() -> None:
    """Of arguments and of files, which torch reads with the locale's encoding."""
    code = "from core.entry import explain_missing_extras; explain_missing_extras(); import sys; "
    code += "print(ascii(sys.argv[1]), open('README.md').encoding.lower())"
    result = subprocess.run(
        [sys.executable, "-c", code, "ï"],
        cwd=ROOT,
        env={**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
    )
    assert result.stdout == "'\\xef' utf-8\n", result.stderr


def test_arguments_that_are_no_text_are_one_line() -> None:
    with pytest.raises(InputError, match=r"^run.name=na\\udcefve is not UTF-8: write it in UTF-8"):
        check_text(["run.name=na\udcefve"])


def test_ctrl_c_before_a_command_handles_it_is_one_line() -> None:
    result = run(
        # as in a terminal: a background job of a shell ignores Ctrl-C
        "import os, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from core.entry import explain_missing_extras; explain_missing_extras(); "
        "os.kill(os.getpid(), 2)"
    )
    assert result.stderr == "error: stopped by Ctrl-C\n"
    assert result.returncode == -signal.SIGINT


def test_a_name_that_does_not_resolve(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun sets the name of its machine, which small networks do not know."""
    monkeypatch.setattr(distributed, "RESOLVE_SECONDS", 0.0)
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    for address in ("127.0.0.1", "::1", "localhost"):
        monkeypatch.setenv("MASTER_ADDR", address)
        distributed.resolve_master_address()
        assert os.environ["MASTER_ADDR"] == address
    monkeypatch.setenv("MASTER_ADDR", "no-such-host.invalid")
    monkeypatch.setenv("WORLD_SIZE", "4")  # the first rank is on another machine
    with pytest.raises(InputError, match="MASTER_ADDR no-such-host.invalid does not resolve"):
        distributed.resolve_master_address()
    monkeypatch.setenv("WORLD_SIZE", "2")
    distributed.resolve_master_address()
    assert os.environ["MASTER_ADDR"] == "localhost"


def test_a_wrong_local_rank_does_not_hide_the_error() -> None:
    code = "from core.errors import exit_with_error; exit_with_error('why')"
    for rank in ("", "abc", "0"):
        result = run(code, LOCAL_RANK=rank)
        assert (result.returncode, result.stderr) == (2, "error: why\n")
