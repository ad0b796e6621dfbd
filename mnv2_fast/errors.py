"""Errors a user can cause."""


class UserError(ValueError):
    """Something the caller can mend. The message is one line and names the cure.

    The command line prints it without a traceback and exits with 2.
    """
