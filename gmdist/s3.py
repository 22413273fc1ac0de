"""Object storage: clients, ranges of objects, and errors in plain words. The only importer of boto3.

Where the endpoint is comes from `data.s3` of the config or from boto3's own environment and profiles; credentials come
from boto3's chain alone and are never read, stored or shown here.
"""

import errno
import functools
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

from gmdist.errors import ConfigError, StorageError

_T = TypeVar("_T")

ADDRESSING_STYLES = ("auto", "path", "virtual")
_CONNECT_S, _READ_S = 5.0, 15.0
_CONNECTIONS = 64  # in the pool of a client; threads that fetch, save and list share it
_PIECE_BYTES = 1 << 18
_DELETE_ATTEMPTS = 5
_EXPIRED = ("ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired")
_BUCKET = re.compile(r"[a-zA-Z0-9.\-_]{1,255}")  # as boto3 has it
# What S3 and its gateways answer when they are busy or broken for a moment.
_TRANSIENT_CODES = ("SlowDown", "InternalError", "ServiceUnavailable", "RequestTimeout", "Throttling", "BadDigest")


@dataclass
class S3Config:
    """Where object storage is. None: what boto3's environment variables and profiles say."""

    endpoint_url: str | None = None  # of MinIO, Ceph, GCS and the like; None: AWS
    region: str | None = None
    addressing_style: str = "auto"  # path: http://endpoint/bucket/key; virtual: http://bucket.endpoint/key
    profile: str | None = None  # of ~/.aws/config
    timeout_s: float = 300.0  # that one read may go on without a byte, with all its attempts, before the run fails

    def validate(self) -> None:
        """Raise ConfigError for values that cannot be."""
        if self.addressing_style not in ADDRESSING_STYLES:
            valid = ", ".join(ADDRESSING_STYLES)
            raise ConfigError(f"data.s3.addressing_style: '{self.addressing_style}'; must be one of {valid}")
        if self.endpoint_url is not None and any(mark in self.endpoint_url for mark in "@?#"):  # it is not shown
            raise ConfigError(
                "data.s3.endpoint_url: must not hold credentials; they come from boto3's own chain, and it is "
                "https://HOST:PORT"
            )
        if self.endpoint_url is not None and not self.endpoint_url.lower().startswith(("http://", "https://")):
            raise ConfigError(f"data.s3.endpoint_url: '{self.endpoint_url}'; must begin with http:// or https://")
        if not self.timeout_s > 0:
            raise ConfigError(f"data.s3.timeout_s: {self.timeout_s}; must be above 0")


class TransientError(Exception):
    """A request that failed in a way that another attempt may mend."""


class StalledError(TransientError):
    """Nothing came for a while, or too little."""


class ExpiredError(Exception):
    """The credentials have expired; they may have been renewed where they came from. Its text is advice."""


class ChangedError(StorageError):
    """The object is not the version that was asked for."""


_config = S3Config()
_lock = threading.Lock()


def configure(config: S3Config) -> None:
    """Set where this process finds object storage."""
    global _config
    with _lock:
        _config = config
        _new_client.cache_clear()


def config() -> S3Config:
    """Where this process finds object storage."""
    return _config


def renew_credentials() -> None:
    """Ask boto3's chain for credentials anew at the next request."""
    with _lock:
        _new_client.cache_clear()


def client(*, retries: bool = True) -> Any:
    """A client that threads share; without retries, for callers that have their own."""
    with _lock:  # boto3 clients may be used by threads, but not made by them
        return _new_client(retries)


@functools.cache
def _new_client(retries: bool) -> Any:
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    config = Config(
        retries={"mode": "standard", "total_max_attempts": 8 if retries else 1},
        connect_timeout=_CONNECT_S,
        read_timeout=_READ_S,
        max_pool_connections=_CONNECTIONS,
        s3={"addressing_style": _config.addressing_style},
        # Servers other than AWS's refuse or ignore checksums in trailers; gmdist has its own.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    try:
        session = boto3.session.Session(profile_name=_config.profile, region_name=_config.region)
        return session.client("s3", endpoint_url=_config.endpoint_url, config=config)
    except (BotoCoreError, ValueError) as error:
        if "endpoint" in str(error):  # which may hold a password, in a place where no pattern would find it
            raise ConfigError(
                "data.s3.endpoint_url, or AWS_ENDPOINT_URL: not an address as https://HOST:PORT"
            ) from None
        raise ConfigError(f"data.s3: {_words(error)}") from error


def ask(request: Callable[[Any], _T]) -> _T:
    """What a request of a client gives; where the credentials have expired, once more with those that are there now.

    Args:
        request: made with a client, from its beginning each time.

    Raises:
        Exception: boto3's errors.
    """
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import ClientError

    try:
        return request(client())
    except (ClientError, Boto3Error) as error:
        if not any(code in str(error) for code in _EXPIRED):
            raise
    renew_credentials()
    return request(client())


def split(location: str) -> tuple[str, str]:
    """Bucket and key of an s3:// location; ConfigError if no bucket can have such a name."""
    bucket, _, key = location.removeprefix("s3://").partition("/")
    if not _BUCKET.fullmatch(bucket):
        raise ConfigError(f"{location}: '{bucket}' cannot be a bucket's name; locations look like s3://bucket/prefix")
    return bucket, key


class Body:
    """The bytes of a range as they come from the network. A context manager; leaving it early drops the connection."""

    def __init__(self, body: Any, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self._body, self._left = body, num_bytes

    def __enter__(self) -> "Body":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._body.close()

    def read(self) -> bytes:
        """What has arrived, as soon as there is any; b"" at the end of the body. TransientError if it breaks off."""
        from urllib3.exceptions import HTTPError

        try:
            # Of the stream's ways to read, the only one that does not wait until all that it is asked for is there.
            piece: bytes = self._body._raw_stream.read1(min(_PIECE_BYTES, self._left))
        except (HTTPError, OSError) as error:
            raise _broken(error) from error
        self._left -= len(piece)
        return piece


def open_range(location: str, start: int, stop: int, *, etag: str, num_bytes: int) -> Body:
    """Ask for the bytes [start, stop) of one version of an object.

    Args:
        location: s3://bucket/key.
        start, stop: bytes, start < stop.
        etag: of the version.
        num_bytes: of the whole object.

    Raises:
        TransientError: another attempt may succeed.
        ExpiredError: the credentials have expired.
        ChangedError: the object is another version.
        FileNotFoundError: there is no such object.
        StorageError: no attempt will succeed.
    """
    answer = _get(location, Range=f"bytes={start}-{stop - 1}", IfMatch=f'"{etag}"')
    status = answer["ResponseMetadata"]["HTTPStatusCode"]
    expected = f"bytes {start}-{stop - 1}/{num_bytes}"
    if status != 206 or answer.get("ContentRange") != expected:
        answer["Body"].close()
        got = answer.get("ContentRange", "the whole object")
        raise TransientError(f"asked for '{expected}', got '{got}' ({status})")
    return Body(answer["Body"], stop - start)


def head(location: str) -> tuple[int, str]:
    """Size, bytes, and ETag of an object; boto3's errors."""
    from botocore.exceptions import ClientError

    bucket, key = split(location)
    try:
        answer = client().head_object(Bucket=bucket, Key=key)
    except ClientError as error:
        if error.response.get("Error", {}).get("Code") != "400":
            raise
        # Answers to HEAD have no body, and so give no reason; those to GET do, and boto3 learns the region from them.
        answer = ask(lambda asked: asked.get_object(Bucket=bucket, Key=key))
        answer["Body"].close()
    return answer["ContentLength"], answer["ETag"].strip('"')


def open_object(location: str) -> Body:
    """Ask for a whole object, of whatever version; errors as in `open_range`."""
    answer = _get(location)
    return Body(answer["Body"], int(answer["ContentLength"]))


def _delete(bucket: str, named: dict[str, Any], client: Any) -> Any:
    return client.delete_objects(Bucket=bucket, Delete=named)


def delete_objects(bucket: str, keys: list[str]) -> None:
    """Delete 1 to 1000 objects; boto3's errors, and a StorageError that names the first that stays, and why."""
    from botocore.exceptions import ClientError

    for attempt in range(_DELETE_ATTEMPTS):
        named = {"Objects": [{"Key": key} for key in keys], "Quiet": True}
        # The answer is 200 whatever became of each object.
        errors = ask(functools.partial(_delete, bucket, named)).get("Errors", [])
        if not errors:
            return
        # What will not pass comes first.
        errors.sort(key=lambda error: error.get("Code") in _TRANSIENT_CODES)
        if errors[0].get("Code") not in _TRANSIENT_CODES:
            break
        keys = [error["Key"] for error in errors]
        time.sleep(0.1 * 2**attempt)
    raise explain(f"s3://{bucket}/{errors[0]['Key']}", ClientError({"Error": errors[0]}, "DeleteObjects"))


def _get(location: str, **options: str) -> Any:
    from botocore.exceptions import BotoCoreError, ClientError, ConnectionError, HTTPClientError

    bucket, key = split(location)
    try:
        return client(retries=False).get_object(Bucket=bucket, Key=key, **options)
    except ClientError as error:
        raise _refusal(location, error) from error
    except (HTTPClientError, ConnectionError) as error:
        raise _broken(error) from error
    except BotoCoreError as error:
        raise explain(location, error) from error


def _refusal(location: str, error: Any) -> Exception:
    """What an error answer means for whoever may try again."""
    status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    code = str(error.response.get("Error", {}).get("Code", ""))
    if code in _EXPIRED:
        return ExpiredError(_ADVICE[code])
    if status == 412:
        return ChangedError(f"{location}: the object was overwritten")
    if status >= 500 or status in (409, 429) or code in _TRANSIENT_CODES:
        return TransientError(f"{code or 'HTTP'} ({status})")
    return explain(location, error)


def explain(location: str, error: Exception) -> Exception:
    """An error of boto3's as one that names the location and the way out."""
    code = str(getattr(error, "response", {}).get("Error", {}).get("Code", "")) or type(error).__name__
    if code in ("404", "NoSuchKey", "NotFound"):
        return FileNotFoundError(errno.ENOENT, "no such object", location)
    advice = _ADVICE.get(code) or f"{_words(error)}{_MORE_ADVICE.get(code, '')}"
    return StorageError(f"{location}: {advice}")


_REGION_ADVICE = "the bucket is in another region; set data.s3.region or AWS_REGION to it"
_CREDENTIALS_ADVICE = (
    "no credentials found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or give this machine a role"
)
_ADVICE = {
    "NoSuchBucket": "there is no such bucket; check its name and the endpoint (data.s3.endpoint_url, AWS_ENDPOINT_URL)",
    "403": "access denied; check the credentials and their permissions for this bucket",
    "AccessDenied": "access denied; check the credentials' permissions for this bucket",
    "InvalidAccessKeyId": "the access key is not known there; check the credentials and the endpoint",
    "SignatureDoesNotMatch": "the secret key is wrong; check the credentials and data.s3.region",
    "RequestTimeTooSkewed": "this machine's clock is wrong; set it, the storage refuses requests of another time",
    "AuthorizationHeaderMalformed": _REGION_ADVICE,
    "PermanentRedirect": _REGION_ADVICE,
    "301": _REGION_ADVICE,
    "NoCredentialsError": _CREDENTIALS_ADVICE,
    "PartialCredentialsError": _CREDENTIALS_ADVICE,
    **dict.fromkeys(_EXPIRED, "the credentials have expired; renew them, then run the same command again"),
}


_ENDPOINT_ADVICE = "; check data.s3.endpoint_url or AWS_ENDPOINT_URL, and the network"
_MORE_ADVICE = {
    **dict.fromkeys(("EndpointConnectionError", "ConnectTimeoutError", "SSLError"), _ENDPOINT_ADVICE),
    "ProxyConnectionError": "; check HTTPS_PROXY, HTTP_PROXY and NO_PROXY",
    "ParamValidationError": "; locations look like s3://bucket/prefix",
}


def _broken(error: Exception) -> TransientError:
    """A failure of the connection."""
    if "timed out" in str(error) or "Timeout" in type(error).__name__:
        return StalledError("no answer in time")
    return TransientError(_words(error))


def _words(error: Exception) -> str:
    """An error's text in one line, without credentials of an endpoint; not one that holds a signed address."""
    text = re.sub(r"//[^/@\s]*@", "//", " ".join(str(error).split())).replace(" (reached max retries: 0)", "")
    return text if text and "X-Amz-" not in text else type(error).__name__
