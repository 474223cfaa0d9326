"""What a file system's error means for a store: full, refused, or worth another try; in words without secrets."""

import errno
import re
import shutil

from prefixquant.cluster.errors import ArtifactError, StoreUnavailable, StoreUnreadable, StoreUnwritable

_PASSING = (errno.EBUSY, errno.EIO, getattr(errno, "EREMOTEIO", errno.EIO), errno.ESTALE)
"""What s3fs makes of 503 and 500, of codes it does not know, and what network file systems say."""

_USERINFO = re.compile(r"(?<=://)[^/\s@]+@")
_QUERY = re.compile(r"(?<=[?&])([^=&\s]+)=[^&\s'\")]+")


def without_secrets(text: str) -> str:
    """Return a text in which every URL has lost its user name, its password and the values of its query."""
    return _QUERY.sub(r"\1=...", _USERINFO.sub("...@", text))


def holds_secrets(url: str) -> bool:
    """Return whether a URL carries a user name, a password or a query, in which signed URLs have their keys."""
    return "://" in url and without_secrets(url) != url


def is_full(err: Exception) -> bool:
    """Return whether a disk or a quota is exhausted."""
    return isinstance(err, OSError) and err.errno in (errno.ENOSPC, errno.EDQUOT)


def is_altered(err: Exception) -> bool:
    """Return whether a client of S3 found that bytes changed on their way, by the checksum that came along."""
    from botocore.exceptions import FlexibleChecksumError

    return isinstance(err, FlexibleChecksumError)


def refusal(place: str, action: str, err: Exception, *, writing: bool, local_root: str | None = None) -> ArtifactError:
    """Return the error of a store for an error of its client.

    Args:
        place: what refused, with its URL.
        action: what was to be done, after "cannot".
        err: what the client raised.
        writing: whether that was a write.
        local_root: the store's folder if it is a local one.
    """
    where, kind = f"{without_secrets(place)}: cannot {action}", type(err).__name__
    reason = f"{kind}: {without_secrets(str(err))}"
    refused = StoreUnwritable if writing else StoreUnreadable
    if is_full(err):
        free = f", {shutil.disk_usage(local_root).free} bytes free" if local_root is not None else ""
        advice = "free some (`prefixquant gc` removes what no run refers to) and run again"
        return refused(f"{where}: no space left there{free}; {advice}")
    if isinstance(err, PermissionError) or "Credential" in kind or "Token" in kind:
        advice = "check who you are there and what you may do; renew credentials that have expired, and run again"
        return refused(f"{where}: {reason}; {advice}")
    if (
        getattr(err, "errno", None) in _PASSING
        or isinstance(err, (TimeoutError, ConnectionError))
        or _is_of_the_network(err)
    ):
        advice = "it was tried several times; check the network and the endpoint, and run again to go on from here"
        return StoreUnavailable(f"{where}: {reason}; {advice}")
    return refused(
        f"{where}: {reason}; check that it exists and may be {'written' if writing else 'read'}, "
        f"or choose another store"
    )


def _is_of_the_network(err: Exception) -> bool:
    """Return whether a client of S3 could not reach its server, or lost it."""
    from botocore.exceptions import ConnectionError as NoConnection
    from botocore.exceptions import HTTPClientError
    from fsspec.exceptions import FSTimeoutError

    return isinstance(err, (NoConnection, HTTPClientError, FSTimeoutError))
