"""Process-wide settings that must stand before the heavy libraries are imported."""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import sys
import warnings
from pathlib import Path

from pipeline.process.build_locks import clear_abandoned_build_locks
from pipeline.process.rank import adopt_slurm_task, launched


def prepare_environment() -> None:
    """Call first thing in a command, before importing transformers, trl or deepspeed.

    Values that the user has set are kept.
    """
    adopt_slurm_task()
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # trl pings the Hub whenever a trainer is built
    # a base without safetensors is refused; a bot's pull request with some, which transformers would take, is not it
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else every fork of a data loader warns
    # torch and bitsandbytes bring an OpenMP pool each; waiting threads of one must not spin on the other's cores
    # (measured: 9 min against 36 s for the same 12 steps on a busy 4-core machine)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # our stages announce themselves
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # libraries' bars would fill a log file with carriage returns
    # says at import that the Hub package kernels, which would fetch code from the network, is not installed
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # DeepSpeed compiles with the first ninja on the path. Ours lies beside python, even where the virtual environment
    # is not activated; with now one ninja and now another everything would be compiled anew at each start (40 s).
    scripts = str(Path(sys.executable).parent)
    if scripts not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join([scripts, os.environ.get("PATH", os.defpath)])
    # deepspeed's op builder and pkg_resources-era imports warn at import; nothing a user of ours can act on
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    if launched():
        clear_abandoned_build_locks()


def keep_freed_memory() -> None:
    """Where tensors are in the host's memory, under glibc: keep what they free, for the next ones.

    glibc maps what is larger than 32 MiB anew each time, and the kernel zeroes every page of it: 11 % of a step of
    8,192 tokens at width 1024, 3 % at 2,048. The process stays as large as it was at its largest, measured 0 to 30 %
    above what it takes without this.
    """
    if platform.libc_ver()[0] == "glibc":
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_MAX, 0)
        library.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""mallopt(3)'s numbers."""
