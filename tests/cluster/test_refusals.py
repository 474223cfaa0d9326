import errno

import pytest
from botocore.exceptions import EndpointConnectionError, NoCredentialsError

from prefixquant.cluster.errors import StoreUnavailable, StoreUnreadable, StoreUnwritable
from prefixquant.cluster.refusals import holds_secrets, refusal, without_secrets

SECRET = "hunter2"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"s3://key:{SECRET}@bucket/a", "s3://...@bucket/a"),
        (f"see http://me:{SECRET}@host:1/x and http://other/y", "see http://...@host:1/x and http://other/y"),
        (f"https://h/x?X-Amz-Signature={SECRET}&n=1'", "https://h/x?X-Amz-Signature=...&n=...'"),
        ("s3://bucket/a b@c/d", "s3://bucket/a b@c/d"),
        ("me@example.org wrote to /a?b", "me@example.org wrote to /a?b"),
    ],
    ids=["store", "sentence", "signature", "at-in-path", "no-url"],
)
def test_secrets_in_urls_are_left_out_of_a_text_and_nothing_else_is(text, shown):
    assert without_secrets(text) == shown


def test_a_url_with_credentials_or_a_signature_holds_secrets_and_a_path_does_not():
    assert holds_secrets(f"s3://key:{SECRET}@bucket")
    assert holds_secrets(f"s3://bucket/a?token={SECRET}")
    assert not any(map(holds_secrets, ("s3://bucket/a", "/data/a?b=c", "meta-llama/Llama", "memory://x", "a@b/c")))


@pytest.mark.parametrize(
    ("err", "writing", "kind", "words"),
    [
        (OSError(errno.ENOSPC, "full"), True, StoreUnwritable, "no space left"),
        (PermissionError("The provided token has expired."), False, StoreUnreadable, "expired"),
        (NoCredentialsError(), True, StoreUnwritable, "credentials"),
        (OSError(errno.EBUSY, "SlowDown"), True, StoreUnavailable, "tried several times"),
        (EndpointConnectionError(endpoint_url=f"http://me:{SECRET}@host:1/x"), False, StoreUnavailable, "host:1"),
        (TimeoutError("timed out"), False, StoreUnavailable, "timed out"),
        (OSError(errno.EINVAL, "Bad Request"), False, StoreUnreadable, "may be read"),
    ],
    ids=["full", "expired", "none", "slow-down", "dead", "timeout", "bad-request"],
)
def test_an_error_of_a_client_becomes_one_that_says_whether_another_try_is_worth_it(err, writing, kind, words):
    found = refusal("artifact store s3://bucket", "do it", err, writing=writing)
    assert type(found) is kind
    assert str(found).startswith("artifact store s3://bucket: cannot do it: ")
    assert words in str(found)
    assert SECRET not in str(found)
