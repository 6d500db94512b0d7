"""A real SLURM cluster of two nodes on this machine, from Debian's slurm-wlm and munge, all of it in one folder.

The nodes are called by addresses of the loopback interface, so that their names resolve as they do on a cluster.
Each offers 64 cores and 16 graphics cards, which are only counted: jobs of several ranks fit on any machine.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

NODES = ("127.0.0.1", "127.0.0.2")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
SEARCHED = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"

CONFIGURATION = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
# ports of jobs come from their numbers: two clusters on one machine must not have the same
FirstJobId={first_job}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
# a test does not wait for the next half minute
SchedulerParameters=bf_interval=1,sched_interval=2,batch_sched_delay=0,requeue_delay=1
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ReturnToService=2
SlurmdParameters=config_overrides
KillWait={kill_wait}
MinJobAge=3600
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
NodeName={nodes[0]} NodeHostname={host} NodeAddr={nodes[0]} Port={ports[1]} CPUs=64 RealMemory=1000 Gres=gpu:16
NodeName={nodes[1]} NodeHostname={host} NodeAddr={nodes[1]} Port={ports[2]} CPUs=64 RealMemory=1000 Gres=gpu:16
PartitionName=cheap Nodes={nodes[0]},{nodes[1]} Default=YES State=UP PriorityTier=1 GraceTime=30
PartitionName=urgent Nodes={nodes[0]},{nodes[1]} State=UP PriorityTier=9
"""


def missing() -> str:
    """Why no cluster can be started here, in words; empty where one can."""
    absent = [program for program in PROGRAMS if shutil.which(program, path=SEARCHED) is None]
    if absent:
        return f"no {', '.join(absent)}: apt-get install slurm-wlm munge"
    return "" if os.geteuid() == 0 else "slurmd needs root"


@dataclass(frozen=True)
class Cluster:
    """A running controller; its commands find it by ``SLURM_CONF``."""

    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        """For a user's commands: nothing of a job in which the tests themselves may run."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        return {**kept, "SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": SEARCHED}

    def run(self, *command: str, cwd: Path | None = None, environment: Mapping[str, str] | None = None) -> str:
        """What a command of SLURM's prints; it must succeed."""
        given = self.environment if environment is None else environment
        done = subprocess.run(command, env=given, cwd=cwd, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """What the controller knows of a job: JobState, Reason, ExitCode, Restarts, StdOut ..."""
        shown = self.run("scontrol", "show", "job", number, "--oneliner").splitlines()[0]
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)

    def wait(self, number: str, *states: str, seconds: float = 120) -> dict[str, str]:
        """The job, once it is in one of these states, or has ended."""
        deadline = time.monotonic() + seconds
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
        while True:
            job = self.job(number)
            if job["JobState"] in (*states, *ended):
                return job
            assert time.monotonic() < deadline, f"{job}\n{self.logs()}"
            time.sleep(0.3)

    def logs(self) -> str:
        """The end of each daemon's log."""
        return "\n".join(f"== {file.name}\n{file.read_text()[-1500:]}" for file in sorted(self.folder.glob("*.log")))


def _free_ports(count: int) -> list[int]:
    """Ports nobody listens on, all different."""
    listeners = [socket.socket() for _ in range(count)]
    for listener in listeners:
        listener.bind(("127.0.0.1", 0))
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports


@contextmanager
def started_cluster(folder: Path, kill_wait: int = 30) -> Iterator[Cluster]:
    """Context with a cluster whose nodes are idle; its daemons end with it, those of no other.

    Args:
        folder: for keys, sockets, state and logs. Its path must be short: a socket's has at most 107 bytes.
        kill_wait: seconds between SIGTERM and SIGKILL.
    """
    (folder / "state").mkdir(parents=True)
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)
    folder.chmod(0o755)  # munged refuses a socket in a folder that others may write to, or may not enter
    values = {"host": socket.gethostname(), "nodes": NODES, "ports": _free_ports(3), "folder": folder}
    first_job = 1 + secrets.randbelow(12000)  # libraries seed `random`, alike in two suites that run at once
    (folder / "slurm.conf").write_text(CONFIGURATION.format(**values, kill_wait=kill_wait, first_job=first_job))
    (folder / "gres.conf").write_text("Name=gpu File=/dev/tty[0-15]\n")
    cluster = Cluster(folder)
    munged = ["munged", "--foreground", "--force", "--key-file", key, "--socket", folder / "munge.socket"]
    munged += ["--pid-file", folder / "munged.pid", "--log-file", folder / "munged.log", "--seed-file", folder / "seed"]
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        for command in (munged, ["slurmctld", "-D"], *(["slurmd", "-D", "-N", node] for node in NODES)):
            with (folder / f"{command[0]}-{len(daemons)}.log").open("w") as log:
                daemons.append(
                    subprocess.Popen(command, env=cluster.environment, stdout=log, stderr=log, start_new_session=True)
                )
            if command is munged:
                _wait_for(folder / "munge.socket")
        _wait_until_idle(cluster, daemons)
        yield cluster
    finally:
        _end(cluster, daemons)


def _end(cluster: Cluster, daemons: list[subprocess.Popen[bytes]]) -> None:
    """End the jobs, the daemons, last first, and what is left that belongs to this cluster's folder."""
    for options in (["--signal=KILL", "--full"], []):
        subprocess.run(["scancel", "--user=root", *options], env=cluster.environment, capture_output=True)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and _shown(cluster, "squeue", "--noheader", "--states=RUNNING,COMPLETING"):
        time.sleep(0.2)
    for daemon in reversed(daemons):
        daemon.terminate()
        try:
            daemon.wait(timeout=20)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()
    for process in psutil.process_iter():
        try:
            opened = [Path(file.path) for file in process.open_files()]  # slurmstepd clears its environment
            if process.environ().get("SLURM_CONF") == cluster.environment["SLURM_CONF"] or any(
                file.is_relative_to(cluster.folder) for file in opened
            ):
                process.kill()
        except psutil.Error:  # it has ended
            continue


def _shown(cluster: Cluster, *command: str) -> str:
    """What a command prints; nothing where no controller answers."""
    done = subprocess.run(command, env=cluster.environment, capture_output=True, text=True)
    return done.stdout.strip()


def _wait_for(file: Path) -> None:
    deadline = time.monotonic() + 20
    while not file.exists():
        assert time.monotonic() < deadline, f"no {file}"
        time.sleep(0.05)


def _wait_until_idle(cluster: Cluster, daemons: list[subprocess.Popen[bytes]]) -> None:
    """Both nodes answer, and nothing runs on them."""
    deadline = time.monotonic() + 60
    while True:
        shown = _shown(cluster, "sinfo", "--noheader", "--partition=cheap", "--Node", "--format=%T")
        if shown.split() == ["idle", "idle"]:
            return
        assert all(daemon.poll() is None for daemon in daemons), cluster.logs()
        assert time.monotonic() < deadline, shown + cluster.logs()
        time.sleep(0.2)
