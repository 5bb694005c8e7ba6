"""What signals and the end of parents do to a run: the table of docs/design/fault-tolerance.md.

The ranks are stubs that ask StopRequest as the loop does, and "save" its reason.
"""

import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.commands import ROOT, TIMEOUT_SECONDS, wait_until

SIGNALS = ("HUP", "INT", "QUIT", "TERM", "USR1", "USR2")
# torchrun's plugin knows training by the name of its script
STUB = """
import os, sys, time
from pathlib import Path
from core.launcher import launcher_pid
from train.resilience.stop_request import StopRequest

folder, rank = Path(sys.argv[1]), os.environ.get("RANK", "0")
stop_request = StopRequest(None, 0.0, launcher_pid())
stop_request.install()
(folder / f"pid-{rank}.part").write_text(str(os.getpid()))
(folder / f"pid-{rank}.part").rename(folder / f"pid-{rank}")
while (why := stop_request.reason()) is None and not (folder / "finish").exists():
    time.sleep(0.02)
(folder / f"saved-{rank}").write_text(why or "finished")
sys.exit(75 if why else 0)
"""


class Stub:
    """A stub of training, started in one of the ways of the table."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.script = folder / "train" / "pretrain.py"
        self.script.parent.mkdir()
        self.script.write_text(STUB)
        self.plain = [sys.executable, str(self.script), str(folder)]
        torchrun = str(Path(sys.executable).parent / "torchrun")
        self.torchrun = [torchrun, "--standalone", "--nproc-per-node", "2", *self.plain[1:]]
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, command: list[str], ranks: int = 1, **options: Any) -> None:
        """Start a command, wait until its ranks handle signals."""
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        environment = {key: value for key, value in environment.items() if key != "RANK"}
        environment |= options.pop("env", {})
        with (self.folder / "log").open("wb") as log:
            options = {"stdout": log, "stderr": log, **options}
            self.process = subprocess.Popen(command, cwd=self.folder, env=environment, **options)
        wait_until(lambda: len(list(self.folder.glob("pid-?"))) == ranks, self.log)

    def log(self) -> str:
        return (self.folder / "log").read_text()

    def saved(self, rank: int = 0) -> str:
        """Why a rank saved and left, once it has."""
        path = self.folder / f"saved-{rank}"
        wait_until(lambda: path.exists() and path.read_text(), self.log)
        return path.read_text()

    def goes_on(self) -> bool:
        """Whether the run is not impressed, and finishes."""
        time.sleep(0.5)
        (self.folder / "finish").touch()
        return self.saved() == "finished"

    def pid(self, rank: int = 0) -> int:
        return int((self.folder / f"pid-{rank}").read_text())


@pytest.fixture
def stub(tmp_path: Path) -> Iterator[Stub]:
    stub = Stub(tmp_path)
    yield stub
    (tmp_path / "finish").touch()
    if stub.process is not None:
        stub.process.wait(TIMEOUT_SECONDS)


def name_of(signal_name: str) -> str:
    return "stopped by Ctrl-C" if signal_name == "INT" else f"stopped by SIG{signal_name}"


@pytest.mark.fault("HUP, INT, QUIT, TERM, USR1, USR2 to a process", "saves, leaves with 75")
@pytest.mark.parametrize("name", SIGNALS)
def test_plain_python_saves_and_leaves(stub: Stub, name: str) -> None:
    stub.start(stub.plain)
    assert stub.process is not None
    stub.process.send_signal(getattr(signal, f"SIG{name}"))
    assert stub.process.wait(TIMEOUT_SECONDS) == 75 and stub.saved() == name_of(name)


@pytest.mark.fault("nohup: HUP, and the end of the shell at a logout", "goes on; TERM still stops")
def test_nohup_goes_on(stub: Stub) -> None:
    stub.start(["sh", "-c", 'nohup "$@" & read line', "sh", *stub.plain], stdin=subprocess.PIPE)
    os.kill(stub.pid(), signal.SIGHUP)
    assert stub.process is not None
    stub.process.kill()  # the shell
    stub.process.wait(TIMEOUT_SECONDS)
    time.sleep(0.5)
    assert not (stub.folder / "saved-0").exists()
    os.kill(stub.pid(), signal.SIGTERM)
    assert stub.saved() == "stopped by SIGTERM"


def test_the_end_of_a_parent_that_is_no_launcher_is_no_matter(stub: Stub) -> None:
    """Setsid, a shell's background, a wrapper: without RANK nobody else looks after the run."""
    stub.start(["sh", "-c", 'setsid "$@" & read line', "sh", *stub.plain], stdin=subprocess.PIPE)
    assert stub.process is not None
    stub.process.kill()
    stub.process.wait(TIMEOUT_SECONDS)
    assert stub.goes_on()


@pytest.mark.fault("a launcher is killed", "its ranks save and leave")
def test_the_end_of_a_launcher_stops_its_ranks(stub: Stub) -> None:
    command = ["sh", "-c", '"$@" & read line', "sh", *stub.plain]
    stub.start(command, stdin=subprocess.PIPE, env={"RANK": "0"})
    assert stub.process is not None
    stub.process.kill()
    assert stub.saved() == "stopped because its launcher ended"


@pytest.mark.fault("a terminal is closed", "saves and leaves, with no terminal to write to")
def test_a_closed_terminal_saves_and_leaves(stub: Stub) -> None:
    master, terminal = pty.openpty()

    def take_terminal() -> None:
        os.setsid()
        os.close(os.open(os.ttyname(terminal), os.O_RDWR))  # becomes the controlling one

    streams = {"stdin": terminal, "stdout": terminal, "stderr": terminal}
    stub.start(stub.plain, preexec_fn=take_terminal, **streams)
    os.close(terminal)
    os.close(master)
    assert stub.saved() == "stopped by SIGHUP"


@pytest.mark.parametrize("name", ["HUP", "INT", "TERM"])
def test_local_jobs_get_signals_once(stub: Stub, name: str) -> None:
    """`launch/submit.py --local` waits for the save and stops."""
    call = f"from launch.jobs import local; print(local.wait({stub.plain!r}))"
    stub.start([sys.executable, "-c", call])
    assert stub.process is not None
    stub.process.send_signal(getattr(signal, f"SIG{name}"))
    assert stub.process.wait(TIMEOUT_SECONDS) == 0
    assert stub.saved() == name_of(name) and stub.log() == "(75, True)\n"


@pytest.mark.fault("HUP, INT, QUIT, TERM, USR1, USR2 to torchrun", "ranks save; 75, no traceback")
@pytest.mark.parametrize("name", SIGNALS)
def test_torchrun_saves_and_leaves(stub: Stub, name: str) -> None:
    stub.start(stub.torchrun, ranks=2)
    assert stub.process is not None
    stub.process.send_signal(getattr(signal, f"SIG{name}"))
    assert stub.process.wait(TIMEOUT_SECONDS) == 75, stub.log()
    assert [stub.saved(rank) for rank in range(2)] == [name_of(name)] * 2
    assert "Traceback" not in stub.log()


@pytest.mark.fault("nohup torchrun: HUP", "goes on")
def test_torchrun_under_nohup_goes_on(stub: Stub) -> None:
    stub.start(["nohup", *stub.torchrun], ranks=2)
    assert stub.process is not None
    stub.process.send_signal(signal.SIGHUP)
    assert stub.goes_on()
    assert stub.process.wait(TIMEOUT_SECONDS) == 0, stub.log()


@pytest.mark.fault("torchrun without our plugin: USR1 kills it, HUP under nohup", "ranks save")
@pytest.mark.parametrize("name", ["HUP", "USR1"])
def test_torchrun_without_the_plugin(stub: Stub, name: str) -> None:
    """The plugin's defaults are overridden by torchrun's own."""
    options = {"env": {"PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT"}}
    stub.start(["nohup", *stub.torchrun], ranks=2, **options)
    assert stub.process is not None
    stub.process.send_signal(getattr(signal, f"SIG{name}"))
    why = "stopped because its launcher ended" if name == "USR1" else name_of(name)
    assert [stub.saved(rank) for rank in range(2)] == [why] * 2
