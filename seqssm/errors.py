"""The one exception that a user, not a programmer, is meant to read."""


class UserError(Exception):
    """Bad input from outside: a file, a key, a value.

    The message is one line that names what is wrong and what to do about it. The command line prints it and exits
    with code 2; nothing half-written is left behind by whoever raises it.
    """
