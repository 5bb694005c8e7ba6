"""A real Slurm on this machine: ten virtual nodes, a controller, munge with a key of its own, and
no systemd.

Needs root and Debian's slurm-wlm and munge, which it installs where they are absent.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tests.commands import PATIENCE, until

NODES = 10  # for all jobs of the tests at once, which mostly wait
PACKAGES = ("slurm-wlm", "munge")
CONF = """
ClusterName=here
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# a requeued job waits until its first credential has expired, by default two minutes
AuthInfo=socket={home}/munge/socket,cred_expire=5
StateSaveLocation={home}/state
SlurmdSpoolDir={home}/spool-%n
SlurmctldPidFile={home}/slurmctld.pid
SlurmdPidFile={home}/slurmd-%n.pid
SlurmctldLogFile={home}/slurmctld.log
SlurmdLogFile={home}/slurmd-%n.log
# neither cgroups nor a database: a container has them not
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
# a daemon or a job that is slow on a busy machine is not lost; lose_node says what is
SlurmdTimeout=3600
MessageTimeout=100
BatchStartTimeout=600
UnkillableStepTimeout=600
MinJobAge=86400
KillWait=30
InactiveLimit=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n[1-{nodes}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] \\
  CPUs=2 RealMemory=2000
PartitionName=main Nodes=n[1-{nodes}] Default=YES State=UP PriorityTier=1 GraceTime=300
PartitionName=urgent Nodes=n[1-{nodes}] State=UP PriorityTier=10 PreemptMode=OFF
"""


def installed() -> str | None:
    """Install what is missing; returns why there can be no Slurm here, or None."""
    if os.geteuid() != 0:
        return "Slurm's daemons need root here"
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    if shutil.which("slurmctld") and shutil.which("munged"):
        return None
    apt = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (
        ["update", "-qq"],
        ["install", "-y", "-qq", "--no-install-recommends", *PACKAGES],
    ):
        subprocess.run(["apt-get", *command], env=apt, check=True, stdout=sys.stderr)
    return None


class Slurm:
    """The cluster; as a context it is up."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.environment = {**os.environ, "SLURM_CONF": str(home / "slurm.conf")}

    def __enter__(self) -> "Slurm":
        munge = self.home / "munge"
        for folder in (
            self.home,
            munge,
            self.home / "state",
            *(self.home / f"spool-n{i + 1}" for i in range(NODES)),
        ):
            folder.mkdir(exist_ok=True)
            folder.chmod(0o755)  # munged wants that nobody else can write there
        (munge / "key").write_bytes(os.urandom(1024))
        (munge / "key").chmod(0o400)
        options = {
            "key-file": "key",
            "socket": "socket",
            "pid-file": "pid",
            "log-file": "log",
            "seed-file": "seed",
        }
        subprocess.run(
            ["munged", *(f"--{name}={munge / file}" for name, file in options.items())], check=True
        )
        port = free_port()
        host = socket.gethostname().split(".")[0]
        text = CONF.format(
            host=host, home=self.home, port=port, nodes=NODES, first=port + 1, last=port + NODES
        )
        (self.home / "slurm.conf").write_text(text)
        self.run("slurmctld", "-i")
        for number in range(NODES):
            self.start_node(f"n{number + 1}")
        self.until(lambda: self.run("sinfo", "-h", "-t", "idle", "-o", "%D").strip() == str(NODES))
        return self

    def __exit__(self, *_: object) -> None:
        self.run("scancel", "--user=root", check=False)
        self.until(lambda: not self.run("squeue", "-h", check=False).strip())
        for path in [
            *self.home.glob("slurmd-*.pid"),
            self.home / "slurmctld.pid",
            self.home / "munge" / "pid",
        ]:
            if path.is_file():
                with suppress(ProcessLookupError):
                    os.kill(int(path.read_text()), signal.SIGKILL)

    def run(self, *command: str, check: bool = True) -> str:
        """Output of a command that finds this cluster."""
        result = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=PATIENCE
        )
        assert not check or result.returncode == 0, f"{command}: {result.stdout}{result.stderr}"
        return result.stdout

    def start_node(self, name: str) -> None:
        """A daemon that stands for a machine."""
        self.run("slurmd", "-N", name)

    def lose_node(self, name: str) -> None:
        """Kill what runs there, as a machine dies: first who could still tell the controller, then
        the ranks. The controller is told what it would find out by its SlurmdTimeout.
        """
        here = [
            f"SLURMD_NODENAME={name}".encode(),
            f"SLURM_CONF={self.environment['SLURM_CONF']}".encode(),
        ]
        tasks, managers = [], {(self.home / f"slurmd-{name}.pid").read_text().strip()}
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if not set(here) <= set((path / "environ").read_bytes().split(b"\0")):
                    continue
                tasks.append(path.name)
                parent = (path / "stat").read_text().rpartition(")")[2].split()[1]
                managers |= (
                    {parent}
                    if Path("/proc", parent, "comm").read_text().strip() == "slurmstepd"
                    else set()
                )
            except OSError:  # it ended meanwhile
                continue
        for process in [*managers, *tasks]:
            with suppress(ProcessLookupError):
                os.kill(int(process), signal.SIGKILL)
        self.run("scontrol", "update", f"NodeName={name}", "State=DOWN", "Reason=lost")

    def job(self, number: str) -> dict[str, str]:
        """What Slurm knows of a job."""
        words = self.run("scontrol", "show", "job", "-o", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def state(self, number: str) -> str:
        """PENDING, RUNNING, COMPLETED, ..."""
        return self.job(number)["JobState"]

    def until(self, condition: Callable[[], object]) -> None:
        """Wait for something."""
        until(condition, lambda: self.run("scontrol", "show", "job", check=False), pause=0.2)


def free_port() -> int:
    """The first of NODES + 1 ports in a row that are free."""
    for port in range(26800, 32000, NODES + 1):
        probes = []
        try:
            probes = [socket.create_server(("127.0.0.1", port + i)) for i in range(NODES + 1)]
            return port
        except OSError:
            continue
        finally:
            for probe in probes:
                probe.close()
    raise AssertionError
