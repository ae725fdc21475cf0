"""What goes wrong with checkpoints, by what can be done about it."""


class CheckpointError(Exception):
    """A checkpoint cannot be written or used; the message names what is wrong and where."""


class SaveError(CheckpointError):
    """A checkpoint could not be written; those that were complete are as they were."""


class DamagedError(CheckpointError):
    """A checkpoint is not as it was written; an older one may be."""


class TargetError(CheckpointError):
    """A folder cannot be written where it was asked for; nothing of it is left behind."""
