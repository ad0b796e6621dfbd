"""Errors a user can cause."""


class UserError(ValueError):
    """Something the caller can mend. The message is one line and names the cure.

    The command line prints it without a traceback and exits with 2.
    """


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, after what was done has been saved.

    Args:
        message: one line that says how to go on.
        signal: its number.
    """

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal
