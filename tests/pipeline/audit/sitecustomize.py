"""On PYTHONPATH: notes in AUDIT_LOG what a process does to files, the network and pickles, a JSON line for each."""

import json
import os
import sys

_log = os.open(os.environ["AUDIT_LOG"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_PATHS = {"os.mkdir": 0, "os.rename": 1, "os.symlink": 1, "os.link": 1, "shutil.rmtree": 0, "os.chmod": 0}
"""Which argument is the path that is written."""


def _note(event: str, arguments: tuple[object, ...]) -> None:
    if event == "open":
        path, _, flags = arguments
        if isinstance(path, int) or not (flags or 0) & _WRITES:
            return
        what = os.path.abspath(os.fsdecode(path))
    elif event in _PATHS:
        what = os.path.abspath(os.fsdecode(arguments[_PATHS[event]]))
    elif event in ("socket.connect", "socket.sendto", "pickle.find_class"):
        what = repr(arguments)
    else:
        return
    os.write(_log, (json.dumps([event, what]) + "\n").encode())


sys.addaudithook(_note)
