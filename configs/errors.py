"""The errors that end a run with a message instead of a traceback.

The command line maps each class to its exit code: 1 failed, 2 the input or the config is wrong, 3 a quality gate fell
short. A message names the file, field or row and says what to do about it. No message holds a secret: a location is
shown without its password (configs/secrets.py).
"""

from configs.secrets import redact


class WatchtowerError(Exception):
    """A run could not go on; the message is for the person who started it."""

    exit_code = 1

    def __init__(self, *args: object):
        super().__init__(*(redact(each) if isinstance(each, str) else each for each in args))


class InputError(WatchtowerError):
    """The input or the config is wrong. The message names the file, field or row and the fix."""

    exit_code = 2


class LostError(WatchtowerError):
    """Another process, or a node, does not answer any more: starting again may mend it."""


class QualityGateError(WatchtowerError):
    """A measured quality fell below the threshold that the config sets."""

    exit_code = 3
