"""An evaluation's part in its run's ``status.json`` and logs."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.errors import UserError
from pipeline.observation.rank_log import LOG, rank_log
from pipeline.observation.status import RunStatus, Task
from pipeline.process.exit_status import BAD_INPUT, FAILED, FINISHED
from pipeline.supervision.watch import Interrupted, watching


@contextmanager
def observed_evaluation(
    folder: Path | None, heartbeat_seconds: float, task: Callable[[], Task | None]
) -> Iterator[None]:
    """Context in which a run's status says that it is being evaluated, and how that ended.

    Args:
        folder: of the run; None, or one that cannot be written, for an adapter from elsewhere: nothing is written.
        heartbeat_seconds: between two writes of a thread.
        task: gives what is being computed.
    """
    if folder is None or not os.access(folder, os.W_OK):
        yield
        return
    status = RunStatus(folder, heartbeat_seconds, evaluates=True)
    status.task = task
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(heartbeat_seconds):
            status.write()

    thread = threading.Thread(target=beat, name="evaluation's heartbeat", daemon=True)
    with watching() as watch, rank_log(folder):
        watch.farewells.append(status.end)
        thread.start()
        LOG.info("evaluation begins")
        try:
            yield
        except Interrupted as error:
            status.end(error.status, str(error))
            raise
        except UserError as error:
            status.end(BAD_INPUT, f"in the evaluation: {error}")
            raise
        except Exception as error:
            status.end(FAILED, f"in the evaluation: {type(error).__name__}: {error}")
            raise
        else:
            status.end(FINISHED)
            LOG.info("evaluation ends")
        finally:
            ended.set()
            watch.farewells.remove(status.end)
            thread.join(timeout=5)
