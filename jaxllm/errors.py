"""The one family of errors that jaxllm raises on purpose.

Every message says what was asked, what was found, what is allowed and what to do. `JaxllmError` is what a caller
catches; the command line prints its text on one line and exits with `exit_status`.
"""
import contextlib


class JaxllmError(Exception):
    """Base of every error that jaxllm raises on purpose; `exit_status` is what the shell sees."""

    exit_status = 1
    where: object = None      # what it is about, as its caller knows it: which of many prompts, a file
    index: int | None = None  # the place of a prompt among them

    def __str__(self):
        return f"{self.where}: {super().__str__()}" if self.where else super().__str__()


@contextlib.contextmanager
def about(where, index: int | None = None):
    """Errors of the block say that they are about `where`: a file, or the prompt number `index`."""
    try:
        yield
    except JaxllmError as e:
        e.where, e.index = where, index
        raise


class UsageError(JaxllmError, ValueError):
    """A request or an option that cannot be served as asked: the caller has to change it."""

    exit_status = 2

    def __init__(self, message: str, param: str | None = None):
        super().__init__(message)
        self.param = param  # the field at fault, for protocols that report it


class CheckpointError(JaxllmError):
    """A checkpoint that is missing, damaged, hostile, or not what its own files claim."""


class UnsupportedError(JaxllmError):
    """A model, container, kernel or feature that exists in the field and is not in jaxllm, refused by name."""


class EndedError(JaxllmError):
    """A call whose requests were ended by something else: the engine was closed, or a step that they shared failed elsewhere."""


class CapacityError(JaxllmError):
    """Memory or a limit that cannot hold what was asked."""
