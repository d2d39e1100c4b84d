"""The two ways a verb ends badly: the user's input is wrong (exit code 2), or the run failed (exit code 1)."""


def kind_of(value: object) -> str:
    """What an error says was found where a value is of the wrong type."""
    return "nothing" if value is None else type(value).__name__


class InputError(ValueError):
    """Bad input: one line that names the config key, file or row, what was found and what was expected."""


class RunError(RuntimeError):
    """A run that had good input but could not finish, such as NaN in the loss or a full disk."""


class TrainingError(RunError):
    """One training came to numbers that are none; others may do better."""
