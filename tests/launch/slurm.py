"""A real Slurm on this machine: ten virtual nodes, a controller and munge, without systemd.

Needs root. Installs Debian's slurm-wlm and munge if they are absent.
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

from tests.commands import TIMEOUT_SECONDS, wait_until

NODES = 10  # for all jobs of the tests at once, which are mostly idle
PACKAGES = ("slurm-wlm", "munge")
CONF = """
ClusterName=here
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# a requeued job waits until its first credential expires, by default two minutes
AuthInfo=socket={root}/munge/socket,cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
# no cgroups and no database, which a container lacks
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
# long timeouts: a slow daemon on a busy machine is not down; lose_node sets a node down
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


def install_slurm() -> str | None:
    """Install Slurm if it is missing; return why that is impossible, or None."""
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
    """A cluster that runs within its context."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.environment = {**os.environ, "SLURM_CONF": str(root / "slurm.conf")}

    def __enter__(self) -> "Slurm":
        munge = self.root / "munge"
        for folder in (
            self.root,
            munge,
            self.root / "state",
            *(self.root / f"spool-n{i + 1}" for i in range(NODES)),
        ):
            folder.mkdir(exist_ok=True)
            folder.chmod(0o755)  # munged refuses a folder that others can write
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
            host=host, root=self.root, port=port, nodes=NODES, first=port + 1, last=port + NODES
        )
        (self.root / "slurm.conf").write_text(text)
        self.run("slurmctld", "-i")
        for number in range(NODES):
            self.start_node(f"n{number + 1}")
        self.wait_until(
            lambda: self.run("sinfo", "-h", "-t", "idle", "-o", "%D").strip() == str(NODES)
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.run("scancel", "--user=root", check=False)
        self.wait_until(lambda: not self.run("squeue", "-h", check=False).strip())
        for path in [
            *self.root.glob("slurmd-*.pid"),
            self.root / "slurmctld.pid",
            self.root / "munge" / "pid",
        ]:
            if path.is_file():
                with suppress(ProcessLookupError):
                    os.kill(int(path.read_text()), signal.SIGKILL)

    def run(self, *command: str, check: bool = True) -> str:
        """Run a command with this cluster's configuration and return its output."""
        result = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=TIMEOUT_SECONDS
        )
        assert not check or result.returncode == 0, f"{command}: {result.stdout}{result.stderr}"
        return result.stdout

    def start_node(self, name: str) -> None:
        """Start the daemon of a virtual node."""
        self.run("slurmd", "-N", name)

    def lose_node(self, name: str) -> None:
        """Kill a node's processes as a power failure would, and set the node down.

        The daemons die first, so that they report nothing; the controller would notice the loss
        only after SlurmdTimeout.
        """
        variables = [
            f"SLURMD_NODENAME={name}".encode(),
            f"SLURM_CONF={self.environment['SLURM_CONF']}".encode(),
        ]
        tasks = []
        daemons = {(self.root / f"slurmd-{name}.pid").read_text().strip()}
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if not set(variables) <= set((path / "environ").read_bytes().split(b"\0")):
                    continue
                tasks.append(path.name)
                parent = (path / "stat").read_text().rpartition(")")[2].split()[1]
                if Path("/proc", parent, "comm").read_text().strip() == "slurmstepd":
                    daemons.add(parent)
            except OSError:  # the process ended meanwhile
                continue
        for process in [*daemons, *tasks]:
            with suppress(ProcessLookupError):
                os.kill(int(process), signal.SIGKILL)
        self.run("scontrol", "update", f"NodeName={name}", "State=DOWN", "Reason=lost")

    def job(self, number: str) -> dict[str, str]:
        """Fields of `scontrol show job`."""
        fields = self.run("scontrol", "show", "job", "-o", number).split()
        return dict(field.split("=", 1) for field in fields if "=" in field)

    def state(self, number: str) -> str:
        """State of a job: PENDING, RUNNING, COMPLETED, ..."""
        return self.job(number)["JobState"]

    def wait_until(self, condition: Callable[[], object]) -> None:
        """Wait until a condition is true."""
        wait_until(condition, lambda: self.run("scontrol", "show", "job", check=False), pause=0.2)


def free_port() -> int:
    """The first of NODES + 1 consecutive free ports."""
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
