"""One exception class per failure mode.

Every message names the argument, the rule, what arrived and, where there is one, the fix. Each class also derives from
the builtin a caller would reach for (`ValueError`, `NotImplementedError`, ...), so code that knows nothing of this
package still catches the right thing.
"""


class MlaOpsError(Exception):
    """Base of every error this package raises on purpose."""


class InvalidInputError(MlaOpsError, ValueError):
    """An argument breaks a rule of the operator's contract, whatever the device."""


class UnknownBackendError(MlaOpsError, ValueError):
    """`backend=` names no backend; the message lists the known ones."""


class UnsupportedProblemError(MlaOpsError, NotImplementedError):
    """The call is valid but no backend (or not the named one) runs it; the message holds every backend's reasons."""


class UnsupportedShardingError(MlaOpsError, NotImplementedError):
    """DTensor arguments are placed as no sharding rule serves; raised on every rank, before any communication.

    `NotImplementedError` is also the one exception that DTensor's dispatcher passes on as it is.
    """


class DoubleBackwardError(MlaOpsError, NotImplementedError):
    """A gradient of a gradient was asked for; the operator is differentiable once."""


class MissingExtraError(MlaOpsError, ImportError):
    """A feature needs an optional dependency that is not installed; the message holds the pip line."""

    def __init__(self, feature: str, package: str, extra: str) -> None:
        super().__init__(f"{feature} needs {package}, which is not installed; pip install 'mla_ops[{extra}]'")


class InvalidSettingError(MlaOpsError, ValueError):
    """An environment variable or an override of `mla_ops.settings` has a value it cannot take."""
