"""A Slurm of one machine, to try ``--executor slurm`` or to test it: a controller and some node daemons.

``python -m tools.slurm start DIR`` starts it, ``python -m tools.slurm stop DIR`` ends it. Everything that it writes is
in DIR. It needs the programs of Debian's slurmctld, slurmd, slurm-client and munge, and nothing of their settings.
"""

from __future__ import annotations

import argparse
import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "scancel")
SECONDS = 30.0  # until every node has answered
CONF = """ClusterName=here
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1,requeue_delay=1
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout=5
KillWait=20
JobRequeue=1
MpiDefault=none
"""


def missing_programs() -> list[str]:
    """The programs that this machine lacks."""
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    return [name for name in PROGRAMS if shutil.which(name, path=path) is None]


class LocalSlurm:
    """A controller and node daemons, each of which claims some of this machine's cores."""

    def __init__(self, folder: Path, nodes: int = 2, cpus: int = 1, memory_mb: int = 6000) -> None:
        self.folder = Path(folder).resolve()
        self.nodes = [f"node{index + 1}" for index in range(nodes)]
        self.cpus, self.memory_mb = cpus, memory_mb

    @property
    def environment(self) -> dict[str, str]:
        """That of a process that uses this Slurm."""
        path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
        return {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": path}

    def start(self) -> None:
        """Start everything and wait until all nodes answer.

        Raises:
            RuntimeError: they do not.
        """
        self._write()
        self._run("munged", "--force", f"--key-file={self.folder}/munge.key", f"--socket={self.folder}/munge.socket",
                  f"--pid-file={self.folder}/munged.pid", f"--log-file={self.folder}/munged.log",
                  f"--seed-file={self.folder}/munge.seed")  # fmt: skip
        self._run("slurmctld")
        for node in self.nodes:
            self.start_node(node)
        end = time.monotonic() + SECONDS
        while self._idle() < len(self.nodes):
            if time.monotonic() > end:
                raise RuntimeError(f"The nodes do not answer; see the logs in {self.folder}.")
            time.sleep(0.2)

    def _write(self) -> None:
        """Write the key and the settings."""
        for name in ("state", "spool"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(1024))
        host = socket.gethostname().partition(".")[0]
        first = _free_ports(len(self.nodes) + 1)
        text = CONF.format(host=host, port=first[0], user=getpass.getuser(), folder=self.folder)
        for node, port in zip(self.nodes, first[1:], strict=True):
            text += (
                f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={self.cpus} "
                f"RealMemory={self.memory_mb} State=UNKNOWN\n"
            )
        text += f"PartitionName=main Nodes={','.join(self.nodes)} Default=YES MaxTime=INFINITE State=UP\n"
        (self.folder / "slurm.conf").write_text(text)

    def start_node(self, node: str) -> None:
        """Start a node's daemon."""
        self._run("slurmd", "-N", node)

    def kill_node(self, node: str) -> None:
        """Kill a node: its daemon and every process of its jobs, as a loss of power does."""
        daemon = int((self.folder / f"slurmd-{node}.pid").read_text())
        tasks = [pid for pid in _pids() if _node_of(pid) == node]
        # The step daemons go before their tasks, whose end they would report.
        above = {_parent(pid) for pid in tasks} - set(tasks) - {1}
        for pid in (daemon, *above, *tasks):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        # The controller notices the loss after SlurmdTimeout; an administrator would not wait either.
        self._run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=lost")

    def revive_node(self, node: str) -> None:
        """Start a killed node again."""
        self.start_node(node)
        with suppress(subprocess.CalledProcessError):  # it may be back already
            self._run("scontrol", "update", f"NodeName={node}", "State=RESUME")

    def stop(self) -> None:
        """End everything, jobs included."""
        with suppress(OSError, subprocess.SubprocessError):
            self._run("scancel", "--user", getpass.getuser())
        for file in (*self.folder.glob("slurmd-*.pid"), self.folder / "slurmctld.pid", self.folder / "munged.pid"):
            with suppress(OSError, ValueError):
                os.kill(int(file.read_text()), signal.SIGTERM)

    def _idle(self) -> int:
        out = self._run("sinfo", "--noheader", "--Node", "--format=%T")
        return out.split().count("idle")

    def _run(self, *command: str) -> str:
        # Daemons keep their parent's output open, which therefore is a file.
        log = self.folder / "commands.log"
        with log.open("ab") as file:
            start = file.tell()
            subprocess.run(command, env=self.environment, stdout=file, stderr=file, check=True, timeout=60)
        return log.read_bytes()[start:].decode(errors="replace")


def _pids() -> list[int]:
    """The processes of this machine."""
    return [int(folder.name) for folder in Path("/proc").iterdir() if folder.name.isdecimal()]


def _parent(pid: int) -> int:
    """The process that started another one."""
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 1


def _node_of(pid: int) -> str:
    """The node that a process of a job runs on."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            if line.startswith(b"SLURMD_NODENAME="):
                return line.partition(b"=")[2].decode()
    return ""


def _free_ports(count: int) -> list[int]:
    """Free ports of this machine."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def main() -> None:
    """Start or stop one."""
    parser = argparse.ArgumentParser(prog="python -m tools.slurm", description=__doc__)
    parser.add_argument("action", choices=["start", "stop"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--cpus", type=int, default=1, help="of each node")
    arguments = parser.parse_args()
    if missing := missing_programs():
        sys.exit(f"Missing: {', '.join(missing)}. On Debian: apt install slurmctld slurmd slurm-client munge.")
    cluster = LocalSlurm(arguments.folder, arguments.nodes, arguments.cpus)
    if arguments.action == "stop":
        cluster.stop()
        return
    cluster.start()
    sys.stdout.write(f"export SLURM_CONF={cluster.folder}/slurm.conf\n")


if __name__ == "__main__":
    main()
