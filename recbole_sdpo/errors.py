"""What a user can mend: the only errors that are printed without a traceback."""

from __future__ import annotations


class UserError(ValueError):
    """A setting, a file or a row is wrong.

    Its message is one sentence that names the setting, file or row, its value, and what it must be.
    Everything else that is raised is a fault of ours, or of the machine, and shows its traceback.
    """
