"""Errors of the artifact store and of worker groups. Each message says where, what was wanted, what came, what next."""


class ArtifactError(Exception):
    """Base of every error of the artifact store. Survives pickling, so a Ray task can raise it."""

    def __init__(self, message: str, key: str | None = None, name: str | None = None) -> None:
        super().__init__(message)
        # Set as attributes rather than passed to super(): pickle rebuilds from the message, then restores these.
        self.key = key
        self.name = name


class ArtifactMissing(ArtifactError):  # noqa: N818 - named for the state it reports
    """The store holds no such artifact (`key`), or the artifact holds no such file (`name`)."""


class ArtifactCorrupted(ArtifactError):  # noqa: N818 - named for the state it reports
    """The bytes in the store are not the bytes that were published; `key` and `name` say which."""


class StoreUnwritable(ArtifactError):  # noqa: N818 - named for the state it reports
    """The store refused a write: no permission, no space, no such place, or no exclusive creation."""


class StoreUnreadable(ArtifactError):  # noqa: N818 - named for the state it reports
    """The store refused a read: credentials missing, wrong or expired, or no permission. Trying again is no use."""


class StoreUnavailable(ArtifactError, OSError):  # noqa: N818 - named for the state it reports
    """The store did not answer, or asked to slow down for longer than its client was willing to wait.

    An OSError, so that a task which meets it is tried again; what it had published stays.
    """


class BytesAltered(StoreUnavailable):
    """The store's client found that the bytes are not those the store had, by a checksum of the transfer."""


class CacheFull(ArtifactError):  # noqa: N818 - named for the state it reports
    """This node's disk has no room for a local copy of an object. The object itself can still be read."""


class ResourceError(Exception):
    """The cluster does not have what was asked for, be it idle."""


class RanksError(Exception):
    """Training was asked for something that its ranks cannot do, or would do otherwise than on a single one."""
