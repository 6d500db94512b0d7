"""Ranks from what SLURM tells its tasks."""

from __future__ import annotations

import os
import pty
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.process import rank as processes
from pipeline.process.rendezvous import check_port
from tests.ports import free_port

TASK = {
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_ID": "4711",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_STEP_NODELIST": "gpu[007-008,012],login",
    "SLURM_NTASKS": "64",  # of the job
}
ADOPTED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
SHOW = (
    f"from pipeline.process.rank import *; import os; adopt_slurm_task(); print([os.environ.get(k) for k in {ADOPTED}])"
)


def adopted(**environment: str) -> list[str | None]:
    """What a process without a terminal makes of it."""
    done = subprocess.run(
        [sys.executable, "-c", SHOW],
        env={"PATH": os.environ["PATH"], **environment},
        capture_output=True,
        text=True,
        check=True,
        start_new_session=True,
    )
    return list(eval(done.stdout))


def test_a_task_is_a_rank_of_its_step() -> None:
    assert adopted(**TASK) == ["3", "1", "5", "2", "gpu007", "24711"]
    assert adopted(**TASK, MASTER_ADDR="10.0.0.1", MASTER_PORT="29500")[4:] == ["10.0.0.1", "29500"]


def test_a_launcher_within_a_step_comes_first_and_a_batch_script_is_no_task() -> None:
    assert adopted(**TASK, RANK="0", WORLD_SIZE="2")[:3] == ["0", None, "2"]
    assert adopted(**{name: value for name, value in TASK.items() if name != "SLURM_STEP_ID"}) == [None] * 6


def test_a_command_at_a_terminal_is_one_process() -> None:
    process, terminal = pty.fork()
    if process == 0:
        os.execve(sys.executable, [sys.executable, "-c", SHOW], {"PATH": os.environ["PATH"], **TASK})
    said = os.read(terminal, 4096).decode()
    os.waitpid(process, 0)
    assert said.strip() == str([None] * 6)


def test_a_port_that_is_taken_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCHELASTIC_USE_AGENT_STORE", *ADOPTED):
        monkeypatch.delenv(name, raising=False)
    with socket.create_server(("127.0.0.1", int(free_port()))) as taken:
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        check_port()  # plain python meets nobody
        monkeypatch.setenv("RANK", "1")
        monkeypatch.setenv("WORLD_SIZE", "2")
        check_port()  # listens nowhere
        monkeypatch.setenv("RANK", "0")
        with pytest.raises(UserError, match=rf"(?s)MASTER_PORT: {taken.getsockname()[1]}, .* --master_port 29501"):
            check_port()
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
        check_port()  # torchrun's agent it is that listens
        monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE")
        caller = socket.create_connection(taken.getsockname())
        taken.accept()[0].close()  # whoever closes first keeps the port waiting for a minute
    check_port()
    caller.close()


@pytest.mark.parametrize("port", [None, "", "http", "0", "65536"])
def test_ranks_without_a_port_to_meet_at_are_refused(monkeypatch: pytest.MonkeyPatch, port: str | None) -> None:
    for name in ("TORCHELASTIC_USE_AGENT_STORE", *ADOPTED):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": port}.items():
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"MASTER_PORT: {port or 'not set'}, expected a port from 1 to 65535"):
        check_port()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may listen anywhere")
def test_a_port_that_is_roots_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "80"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"MASTER_PORT: 80, .* is reserved for root"):
        check_port()


@pytest.mark.parametrize(
    ("command", "processes", "first_word"),
    [("sft", 1, "MASTER_PORT"), ("evaluate", 2, "MASTER_PORT"), ("evaluate", 1, "outputs/r")],  # which meets nobody
)
def test_commands_look_before_anything_is_loaded(
    repository: Path, tmp_path: Path, command: str, processes: int, first_word: str
) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("{name: r, base: {model: ./none}, data: {train: [{path: ./none}]}, eval: {tasks: [none]}}")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        meeting = {"RANK": "0", "WORLD_SIZE": str(processes), "LOCAL_RANK": "0"}
        meeting["MASTER_PORT"] = str(taken.getsockname()[1])
        done = subprocess.run(
            [sys.executable, str(repository / "launch" / f"{command}.py"), str(recipe)],
            cwd=tmp_path,
            env={**os.environ, **meeting},
            capture_output=True,
            text=True,
        )
    assert done.returncode == 2
    assert f"error: {first_word}: " in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("hosts", "first"),
    [("n1", "n1"), ("n[1-2]", "n1"), ("a,b[2-3]", "a"), ("c[01,3]n[2-4],d", "c01n2"), ("10.0.0.[9-12]", "10.0.0.9")],
)
def test_rank_0_is_on_the_first_host(hosts: str, first: str) -> None:
    assert processes._first_host(hosts) == first


@given(st.lists(st.tuples(st.integers(1, 99), st.integers(1, 9)), min_size=1))
def test_tasks_per_node(runs: list[tuple[int, int]]) -> None:
    text = ",".join(str(tasks) if times == 1 else f"{tasks}(x{times})" for tasks, times in runs)
    assert processes._tasks_per_node(text) == [tasks for tasks, times in runs for _ in range(times)]


@given(st.integers(1, 2**26), st.integers(-999, 999), st.integers(0, 11), st.integers(0, 11))
def test_steps_on_one_host_have_ports_of_their_own(job: int, apart: int, step: int, other: int) -> None:
    mine, theirs = processes._port(job, step), processes._port(job + apart, other)
    assert 20000 <= mine < 32768
    assert (mine == theirs) == ((apart, step) == (0, other))
