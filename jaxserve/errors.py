"""Every error that jaxserve raises on purpose.

JaxserveError
├── StartupError          the process cannot start: one line on stderr, non-zero exit
│   ├── ModelNotFound     a hub id, folder or file that cannot be had
│   ├── UnsupportedModel  an architecture or option that no code here serves
│   ├── WeightsError      missing, extra, mis-shaped or truncated tensors
│   ├── DeviceError       a mesh larger than the devices, or too little memory
│   └── HostsDisagree     hosts that were started otherwise than each other
├── InvalidRequest        the client's fault: a 4xx naming the field
│   └── ContextTooLong    prompt (and output) longer than the model or the cache holds
├── Overloaded            no permit left: 429 with Retry-After
├── EngineUnavailable     the engine process is down or coming back: 503 with Retry-After
└── GenerationFailed      a request that was accepted could not be finished
    └── HostsFailed       another host of the mesh is lost or cannot go on
"""

_MOST_TOLD = 2000  # characters


class JaxserveError(Exception):
    """Base of all errors raised on purpose; the message is fit for a user."""


class StartupError(JaxserveError):
    """The process cannot start.

    The message is one line of what can be printed, and no longer than a page, whatever the names out of files in it are.
    """

    def __init__(self, message: str):
        printable = "".join(c if c.isprintable() else " " if c.isspace() else repr(c)[1:-1] for c in message[: _MOST_TOLD + 1])
        super().__init__(printable if len(message) <= _MOST_TOLD else f"{printable[:_MOST_TOLD]} ...")


class ModelNotFound(StartupError):
    """The model's files cannot be found or fetched."""


class UnsupportedModel(StartupError):
    """The checkpoint asks for something that no code here serves."""


class WeightsError(StartupError):
    """The checkpoint's tensors are not those the model declares."""


class DeviceError(StartupError):
    """The devices are too few or their memory too small."""


class HostsDisagree(StartupError):
    """The hosts of a mesh were started otherwise than each other; all of them say so."""


class InvalidRequest(JaxserveError):
    """The client sent something that cannot be served.

    Args:
        message: what is wrong, fit for the client.
        param: name of the offending request field, None where no single field is to blame.
    """

    def __init__(self, message: str, param: str | None = None):
        super().__init__(message)
        self.param = param


class ContextTooLong(InvalidRequest):
    """Prompt and requested output do not fit the model's context or the KV cache."""


class Overloaded(JaxserveError):
    """No permit is free.

    Args:
        message: fit for the client.
        retry_after: seconds after which a retry makes sense.
    """

    def __init__(self, message: str = "Model is overloaded", retry_after: int = 1):
        super().__init__(message)
        self.retry_after = retry_after


class EngineUnavailable(JaxserveError):
    """The engine process is not there (yet).

    Args:
        message: fit for the client.
        retry_after: seconds after which a retry makes sense.
    """

    def __init__(self, message: str = "the engine is not available", retry_after: int = 5):
        super().__init__(message)
        self.retry_after = retry_after


class GenerationFailed(JaxserveError):
    """An accepted request could not be finished (the engine died or the step failed)."""


class HostsFailed(GenerationFailed):
    """Another host of the mesh is lost, or told why it cannot go on."""
