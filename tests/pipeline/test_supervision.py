"""Launchers, whereabouts, files of ranks, and bad steps, each by itself."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from waiting import wait_until

from pipeline.recipe import schema
from pipeline.supervision.bad_steps import StepGuard
from pipeline.supervision.launcher import is_gone, is_launcher
from pipeline.supervision.pulse import Pulse
from pipeline.supervision.ranks import BAD_STEPS_FILE, Failure, Ranks, clear_ranks
from pipeline.supervision.supervisor import supervised
from pipeline.supervision.watch import Stop, Watch, watching
from pipeline.supervision.whereabouts import current_call

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("/venv/bin/python /venv/bin/deepspeed --num_gpus 2 launch/sft.py r.yaml", True),
        ("/venv/bin/python -u -m deepspeed.launcher.launch --world_info=abc launch/sft.py", True),
        ("/venv/bin/python /venv/bin/torchrun --standalone launch/sft.py", True),
        ("python3 -m torch.distributed.run launch/sft.py", True),
        ("python /venv/bin/accelerate launch --cpu launch/sft.py", True),
        ("torchrun launch/sft.py", True),
        ("python launch/sft.py torchrun", False),
        ("python -u launch/sft.py deepspeed", False),
        ("python -m pytest torchrun", False),
        ("bash sweep.sh torchrun", False),
        ("slurmstepd: [12.0]", False),
        ("", False),
    ],
)
def test_launchers_are_told_by_their_command_lines(words: str, expected: bool) -> None:
    assert is_launcher(words.split()) is expected


def test_a_process_that_nobody_has_waited_for_is_gone() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        process = psutil.Process(child.pid)
        assert not is_gone(process)
        child.kill()
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        assert is_gone(process)
    assert is_gone(process)


def test_the_main_threads_call_is_seen_from_another_thread() -> None:
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(current_call()))
    thread.start()
    thread.join()
    assert found[0].startswith("threading.") and "called from tests/pipeline/test_supervision.py" in found[0]


def test_the_first_failure_stands(tmp_path: Path) -> None:
    clear_ranks(tmp_path)
    ranks = Ranks(tmp_path)
    assert ranks.first_failure() is None
    first = Failure(3, 2, "failed: disk full")
    assert ranks.fail(first, "the stack") == first
    assert ranks.fail(Failure(0, 1, "failed: connection closed")) == first == ranks.first_failure()
    assert (tmp_path / "ranks" / "rank-0.failed").read_text() == "the stack"
    clear_ranks(tmp_path)
    assert ranks.first_failure() is None and not list((tmp_path / "ranks").iterdir())


def test_a_folder_that_cannot_be_written_costs_one_warning(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A full disk is a beat that raises, and a folder that is gone."""
    beats: list[str] = []

    def beat(pulse: Pulse) -> None:
        beats.append(pulse.phase)
        raise OSError(28, "No space left on device")

    with supervised(tmp_path, schema.Supervision(heartbeat_seconds=0.05), [beat]) as supervisor:
        supervisor.pulse.progress("training", 1, 10)
        wait_until(lambda: len(beats) > 3)
    assert len(beats) > 3 and beats[-1] == "ended"
    assert capfd.readouterr().err.count("no sign of life can be written") == 1
    told = json.loads((tmp_path / "ranks" / "rank-0.json").read_text())
    assert (told["phase"], told["step"], told["steps"], told["exit_status"], told["pid"]) == (
        "ended",
        1,
        10,
        0,
        os.getpid(),
    )


def test_a_watch_within_another_is_the_same() -> None:
    with watching() as outer, watching() as inner:
        assert inner is outer


def test_a_forked_child_ends_by_sigterm_and_its_parent_goes_on() -> None:
    """As workers do that tokenise; pytest's own process is the parent."""
    with watching() as watch, watch.deferring():
        heard, said = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(said, b".")  # what is to be done after a fork is done
            time.sleep(60)
            os._exit(0)
        assert os.read(heard, 1) == b"."
        os.kill(child, signal.SIGTERM)
        _, status = os.waitpid(child, 0)
        time.sleep(0.7)  # the watch's thread has looked
        assert os.waitstatus_to_exitcode(status) == -signal.SIGTERM
        assert watch.stop is None


def test_sigterm_after_an_early_warning_is_in_more_of_a_hurry() -> None:
    """SIGUSR1 waits for twice the slowest step; SIGTERM is followed by SIGKILL in 30 s."""
    watch = Watch()
    watch.slowest_step = 100.0
    with watch.deferring():
        watch.handler(signal.SIGUSR1, None)
        assert watch.stop is not None and (watch.stop.cause, watch.stop.patience) == ("SIGUSR1", 200.0)
        watch.handler(signal.SIGTERM, None)
        assert (watch.stop.cause, watch.stop.patience, watch.stop.status) == ("SIGTERM", 25.0, 75)
        watch.handler(signal.SIGINT, None)
        assert watch.stop == Stop("SIGTERM", 75, watch.stop.at, 25.0)


class Twin:
    """Two copies of random weights under AdamW with weight decay; one is guarded."""

    def __init__(self, settings: schema.Supervision, float16: bool = False) -> None:
        generator = torch.Generator().manual_seed(int.from_bytes(os.urandom(4)))
        self.weight = torch.nn.Parameter(torch.randn(5, 3, generator=generator))
        self.plain = torch.nn.Parameter(self.weight.detach().clone())
        self.guard = StepGuard(settings, float16)
        self.optimizer = torch.optim.AdamW([self.weight], lr=0.1, weight_decay=0.1)
        self.plain_optimizer = torch.optim.AdamW([self.plain], lr=0.1, weight_decay=0.1)
        self.guard.watch(self.optimizer)
        self.generator = generator
        self.number = 0

    def step(self, factor: float = 1.0, updates_plain: bool = True) -> str:
        """A step whose loss is multiplied; the fault found."""
        self.number += 1
        x = torch.randn(4, 5, generator=self.generator)
        losses = []
        for weight, optimizer in ((self.weight, self.optimizer), (self.plain, self.plain_optimizer)):
            loss = (x @ weight).square().mean()
            if weight is self.weight:
                loss = loss * factor
                self.guard.loss(loss)
            optimizer.zero_grad()
            loss.backward()
            losses.append(loss)
        self.guard.rows([2 * self.number, 2 * self.number + 1])
        self.optimizer.step()
        if updates_plain:
            self.plain_optimizer.step()
        return self.guard.close(self.number, CPU, None).fault


@pytest.mark.parametrize(
    ("factor", "fault"), [(float("nan"), "loss nan"), (float("inf"), "loss inf"), (0.0, "loss exactly 0")]
)
def test_skip_leaves_no_trace_of_a_bad_step(factor: float, fault: str) -> None:
    """Weights, moments and step count are those of a run without it, bit for bit."""
    twin = Twin(schema.Supervision(on_bad_step="skip"))
    for factor_now in (1.0, 1.0, factor, 1.0, factor, factor, 1.0):
        found = twin.step(factor_now, updates_plain=factor_now == 1.0)
        assert found == ("" if factor_now == 1.0 else fault)
        assert torch.equal(twin.weight, twin.plain)
    for key, value in twin.plain_optimizer.state[twin.plain].items():
        assert torch.equal(twin.optimizer.state[twin.weight][key], value)
    assert twin.guard.bad == 3 and not twin.guard.streak


def test_stop_updates_as_ever_and_counts_bad_steps_in_a_row(tmp_path: Path) -> None:
    twin = Twin(schema.Supervision(bad_steps=2))
    assert not twin.step() and not twin.step()
    assert torch.equal(twin.weight, twin.plain)
    assert twin.step(float("nan")) == "loss nan" and not twin.guard.too_many() and twin.guard.spoilt()
    assert twin.step() == "loss nan" and twin.guard.too_many()  # the weights are spoilt
    error = twin.guard.error(tmp_path, "The newest is good.")
    assert "2 bad steps in a row" in str(error) and "step 3: loss nan; step 4: loss nan" in str(error)
    assert "counted from 1: 7, 8, 9, 10;" in str(error) and "The newest is good." in str(error)
    lines = [json.loads(line) for line in (tmp_path / BAD_STEPS_FILE).read_text().splitlines()]
    assert [(line["step"], line["rank"], line["rows"]) for line in lines] == [(3, 0, [7, 8]), (4, 0, [9, 10])]


def test_a_gradient_that_is_not_finite_is_seen_where_the_engine_does_not_tell() -> None:
    twin = Twin(schema.Supervision())
    twin.guard.loss(torch.tensor(1.0))
    twin.weight.grad = torch.full_like(twin.weight, float("inf"))
    twin.optimizer.step()
    assert twin.guard.close(1, CPU, None).fault == "gradient norm inf"


def test_fp16_overflow_is_no_bad_step() -> None:
    guard = StepGuard(schema.Supervision(), float16=True)
    guard.loss(torch.tensor(2.0))
    guard.gradient(float("inf"))
    assert guard.close(1, CPU, None).fault == ""
    guard.loss(torch.tensor(float("nan")))
    assert guard.close(2, CPU, None).fault == "loss nan"


def test_a_micro_batch_without_a_trained_token_is_no_bad_step() -> None:
    guard = StepGuard(schema.Supervision())
    for share in (0.0, 0.25, 0.0):
        guard.loss(torch.tensor(share))
    assert guard.close(1, CPU, None).fault == ""
