"""The one exception for mistakes a user can mend: bad configuration, missing or damaged input, an unreachable
server."""


class UserError(Exception):
    """What is wrong, naming the file or key, and what to do. Commands print it without a traceback and exit with 2.

    UserError("one line"), or several findings at once: UserError("first", "second"). Each argument is printed as one
    line, whatever it holds: control characters in it are shown, not obeyed (see reading.shown).
    """

    @property
    def lines(self) -> tuple[str, ...]:
        """Each finding on one line."""
        return tuple(str(line) for line in self.args)

    def __str__(self) -> str:
        return "\n".join(self.lines)
