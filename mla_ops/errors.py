"""One exception class per failure mode.

Every message names the argument, the rule, what arrived and, where there is one, the fix. Each class also derives from
the builtin a caller would reach for (`ValueError`, `NotImplementedError`, ...), so code that knows nothing of this
package still catches the right thing. What is raised while `torch.compile` traces, Dynamo turns into its
`TorchRuntimeError`, a `RuntimeError`, with the message inside.
"""


class MlaOpsError(Exception):
    """Base of every error this package raises on purpose."""


class InvalidInputError(MlaOpsError, ValueError):
    """An argument breaks a rule of the operator's contract, whatever the device."""


class QuantizedInputError(InvalidInputError, TypeError):
    """A quantised wrapper tensor came where a plain tensor must; nothing is dequantised unless asked for."""


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


class ForwardModeError(MlaOpsError, NotImplementedError):
    """A forward-mode derivative was asked for; the operator is differentiable in reverse mode."""


class NotDifferentiableError(MlaOpsError, NotImplementedError):
    """An argument requires grad of an operator that has no gradients; nothing is detached unasked."""


class MissingExtraError(MlaOpsError, ImportError):
    """A feature needs an optional dependency that cannot be imported; the message says why and holds the pip line."""

    def __init__(self, feature: str, package: str, extra: str, *, problem: str = "is not installed") -> None:
        super().__init__(f"{feature} needs {package}, which {problem}; pip install 'mla_ops[{extra}]'")


class OutOfPagesError(MlaOpsError, MemoryError):
    """A cache has too few free pages, or no row of the batch left; nothing was changed."""


class InvalidSettingError(MlaOpsError, ValueError):
    """An environment variable or an override of `mla_ops.settings` has a value it cannot take."""


class MLAAdapterError(MlaOpsError):
    """Base of what the seam and the adapters raise: before a kernel, an allocation of its size or a rotary call."""


class MLAMetadataError(MLAAdapterError, ValueError):
    """A layer's description lacks fields or has impossible ones; all of them are named at once."""

    def __init__(
        self, message: str, *, missing: tuple[str, ...] = (), bad: tuple[str, ...] = (), source: str = ""
    ) -> None:
        super().__init__(message)
        self.missing = missing  # field names, in the source's own spelling
        self.bad = bad  # one sentence per impossible field
        self.source = source  # where the description came from


class MLALayoutError(MLAAdapterError, ValueError):
    """Tensors, layout, packed sequence or indices disagree with each other or with the layer's description."""


class UnsupportedBackendError(MLAAdapterError, UnsupportedProblemError):
    """No backend (or not the named one) runs a layer; the message holds every backend's reasons and what to choose."""


class UnsupportedFeatureError(MLAAdapterError, NotImplementedError):
    """A framework asks its attention for what the operator does not do (dropout, weights, windows); all at once."""
