"""A real Slurm with two nodes on this machine, in a folder of its own: munged, slurmctld and two slurmd, as root."""

import os
import shutil
import signal
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel", "munged")
PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
CONF = """
ClusterName=test
SlurmctldHost=localhost
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=6
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2
ReturnToService=2
JobRequeue=1
MpiDefault=none
KillWait=30
SlurmdParameters=config_overrides
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={port_1} CPUs=4 RealMemory=1000
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={port_2} CPUs=4 RealMemory=1000
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def why_not() -> str | None:
    """Why there can be no Slurm here, after trying to install it; None if there can."""
    if os.getuid() != 0:
        return "Slurm's daemons need root"
    if any(shutil.which(name) is None for name in PROGRAMS):
        if shutil.which("apt-get") is None:
            return "Slurm is not installed and there is no apt-get"
        environ = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        for words in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", *PACKAGES]):
            done = subprocess.run(["apt-get", *words], env=environ, capture_output=True, text=True)
            if done.returncode:
                return f"Slurm cannot be installed: {done.stderr.strip().splitlines()[-1:]}"
    return None


class Cluster:
    """Nodes n1 and n2 with four CPUs each, which this machine pretends to have."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._daemons: list[subprocess.Popen[bytes]] = []
        (folder / "munge").mkdir()
        (folder / "state").mkdir()
        key = folder / "munge" / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        ports = [_free_port() for _ in range(3)]
        conf = folder / "slurm.conf"
        conf.write_text(CONF.format(folder=folder, port=ports[0], port_1=ports[1], port_2=ports[2]))
        self.environ = os.environ | {"SLURM_CONF": str(conf)}
        try:
            self._begin(key)
        except BaseException:
            self._end()
            raise

    def _begin(self, key: Path) -> None:
        """Start the daemons one after the other, each once it can find the former."""
        places = {name: self.folder / "munge" / name for name in ("socket", "log", "pid", "seed")}
        options = [f"--{name}-file={places[name]}" for name in ("log", "pid", "seed")]
        self._start("munged", "--foreground", "--force", f"--key-file={key}", f"--socket={places['socket']}", *options)
        _until(places["socket"].exists, "munged has a socket")
        self._start("slurmctld", "-D")
        _until(lambda: self.answer("scontrol", "ping").count("is UP") == 1, "slurmctld answers")
        self._start("slurmd", "-D", "-N", "n1")
        self._start("slurmd", "-D", "-N", "n2")
        _until(lambda: self.answer("sinfo", "-h", "-N", "-o", "%T").split() == ["idle"] * 2, "both nodes are idle")

    def _start(self, *command: str) -> None:
        log = (self.folder / f"{command[0]}-{len(self._daemons)}.out").open("wb")
        self._daemons.append(subprocess.Popen(command, env=self.environ, stdout=log, stderr=log))

    def answer(self, *command: str) -> str:
        """What a command of Slurm says; nothing if it fails."""
        done = subprocess.run(command, env=self.environ, capture_output=True, text=True)
        return done.stdout if done.returncode == 0 else ""

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` knows: JobState, Restarts, ExitCode and so on."""
        words = self.answer("scontrol", "-o", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def state(self, number: str) -> str:
        """PENDING, RUNNING, COMPLETED, FAILED, CANCELLED and so on; empty if there is no such job."""
        return self.job(number).get("JobState", "")

    def wait_for(self, number: str, *states: str, patience_s: float = 240.0) -> dict[str, str]:
        """Until a job is in one of these states."""
        _until(lambda: self.state(number) in states, f"job {number} is {states}", patience_s)
        return self.job(number)

    def stop(self) -> None:
        """Cancel all jobs and end the daemons, the last started first."""
        self.answer("scancel", "--full", "--signal=KILL", "--user=root")
        self.answer("scancel", "--user=root")
        with suppress(AssertionError):
            _until(lambda: not self.answer("squeue", "-h", "-t", "RUNNING,COMPLETING"), "no job runs", 45)
        self._end()

    def _end(self) -> None:
        for daemon in reversed(self._daemons):
            daemon.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                daemon.wait(15)
            daemon.kill()
            daemon.wait()


def _until(holds: object, what: str, patience_s: float = 60.0) -> None:
    deadline = time.monotonic() + patience_s
    while not holds():  # pyright: ignore[reportCallIssue]
        assert time.monotonic() < deadline, f"not in {patience_s:.0f} s: {what}"
        time.sleep(0.2)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
