"""The one exception for mistakes a user can mend: bad configuration, missing or damaged input, an unreachable
server."""


class UserError(Exception):
    """One line that names the file or key and says what to do. Commands print it without a traceback and exit with
    2."""
