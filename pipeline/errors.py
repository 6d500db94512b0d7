"""The one error that is shown to the user without a traceback."""


class UserError(Exception):
    """Bad input. The message says where (file, line, key or row), what was found, what was expected and how to fix it.

    Commands in ``launch/`` print it and exit with status 2, before any expensive work has started.

    Args:
        message: what in it is not text (halves of characters in names of files or in JSON) is written as an escape, so
            that it can be printed and logged anywhere.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.encode(errors="backslashreplace").decode())
