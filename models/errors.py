"""The two ways a command fails: the user's input is wrong (exit 2) or the run broke (exit 1)."""


class DeepspanError(Exception):
    """A failure that is reported as one line, ``error: WHAT: WHERE: what to do``.

    ``what`` names the fault, ``where`` the file, tensor, key or rank, ``todo`` the next step for the user.
    """

    exit_code = 1

    def __init__(self, what: str, where: str, todo: str):
        super().__init__(f"{what}: {where}: {todo}")
        self.what = what
        self.where = where
        self.todo = todo


class InputError(DeepspanError):
    """Bad usage, configuration, checkpoint or request; nothing was started."""

    exit_code = 2
