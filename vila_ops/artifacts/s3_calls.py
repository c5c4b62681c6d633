"""Calls to S3: bounded in time and number, conditional where it matters, with errors that say what to do.

Credentials, region and endpoint come from boto3's own chain (environment, profile, instance) alone.
"""

import base64
import hashlib
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, TypeVar

import boto3
from boto3.exceptions import Boto3Error
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
    TokenRetrievalError,
)
from s3transfer.exceptions import RetriesExceededError

from vila_ops.artifacts.backend import Versioned
from vila_ops.config.secrets import PASSWORD
from vila_ops.errors import DamagedAnswer, OtherBytes, StoreRefused, StoreUnreachable

TRIES = 6
"""Attempts at one call, with growing waits and jitter between them."""
WAIT_SECONDS = 0.2
CONNECT_SECONDS = 10.0
READ_SECONDS = 60.0
"""How long an answer may pause between two bytes."""
CONNECTIONS = 64
PART_BYTES = 16 * 2**20
TRANSFER = TransferConfig(multipart_threshold=PART_BYTES, multipart_chunksize=PART_BYTES, max_concurrency=8)
NO_KEY = ("NoSuchKey", "404")
ACCESS_DENIED = (
    "AuthorizationHeaderMalformed",
    "ExpiredToken",
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
)
DAMAGED_IN_TRANSIT = ("BadDigest", "RequestTimeout", "XAmzContentSHA256Mismatch")
BAD_CREDENTIALS = (
    NoCredentialsError,
    PartialCredentialsError,
    CredentialRetrievalError,
    ProfileNotFound,
    TokenRetrievalError,
)
Condition = Mapping[str, str]
"""`IfNoneMatch: *` or `IfMatch: ETAG`."""
T = TypeVar("T")


def client() -> Any:
    """The client of this process; threads may share it, forked processes may not."""
    return client_of(os.getpid())


@lru_cache(maxsize=1)
def client_of(process: int) -> Any:
    """A client with boto3's default credentials and endpoint (AWS_ENDPOINT_URL).

    Raises StoreRefused for an endpoint with a password, which errors of boto3 would show.
    """
    if PASSWORD.search(_endpoint()):
        raise StoreRefused("AWS_ENDPOINT_URL holds a password; leave it out, as AWS_SECRET_ACCESS_KEY signs requests")
    with translated("s3://"):
        return boto3.session.Session().client(
            "s3",
            config=Config(
                retries={"mode": "standard", "total_max_attempts": TRIES},
                connect_timeout=CONNECT_SECONDS,
                read_timeout=READ_SECONDS,
                max_pool_connections=CONNECTIONS,
                response_checksum_validation="when_required",  # we compare every answer with our own sha256
            ),
        )


def place(uri: str) -> dict[str, str]:
    """Bucket and key of an `s3://bucket/key`."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return {"Bucket": bucket, "Key": key}


def get(uri: str) -> Versioned | None:
    """Bytes and ETag of an object that `put` wrote; None if it does not exist."""

    def once() -> Versioned:
        answer = client().get_object(**place(uri))
        with whole():
            data: bytes = answer["Body"].read()
        if answer["Metadata"].get("sha256", _sha256(data)) != _sha256(data):
            raise OtherBytes("the sha256 differs from that of the bytes that were put")
        return Versioned(data, answer["ETag"])

    with translated(uri):
        try:
            return again(once)
        except ClientError as error:
            if code_of(error) in NO_KEY:
                return None
            raise


def put(uri: str, data: bytes, condition: Condition) -> str | None:
    """Put an object if the condition holds; its ETag, or None where the condition does not hold.

    boto3 repeats a put whose answer was lost, and its own first put makes the second fail. So after a failure the
    object is read: equal bytes mean that this put succeeded.
    """
    checksum = base64.b64encode(hashlib.sha256(data).digest()).decode()
    request: dict[str, Any] = {
        "Body": data,
        "ChecksumSHA256": checksum,
        "Metadata": {"sha256": _sha256(data)},
        **condition,
    }
    with translated(uri):
        for turn in range(TRIES):
            try:
                return str(client().put_object(**place(uri), **request)["ETag"])
            except ClientError as error:
                if code_of(error) in NO_KEY:  # the object to replace was deleted
                    return None
                status = error.response["ResponseMetadata"]["HTTPStatusCode"]
                if status == 412:
                    there = get(uri)
                    return there.tag if there is not None and there.data == data else None
                if status != 409:  # 409: another conditional put is running
                    raise
                pause(turn)
    raise StoreUnreachable(f"{uri}: another conditional put was running at {TRIES} tries (409); run again")


def again(action: Callable[[], T]) -> T:
    """The result of an action, which is repeated after a DamagedAnswer, TRIES times in all."""
    for turn in range(TRIES - 1):
        try:
            return action()
        except DamagedAnswer:
            pause(turn)
    return action()


def pause(turn: int) -> None:
    """Wait before another try: longer each time, and at random so that callers spread out."""
    time.sleep(random.uniform(0, WAIT_SECONDS * 2**turn))


@contextmanager
def whole() -> Iterator[None]:
    """Translate a body that breaks off while it is read. Raises DamagedAnswer."""
    try:
        yield
    except (HTTPClientError, IncompleteReadError, RetriesExceededError) as error:
        raise DamagedAnswer(type(error).__name__) from error


@contextmanager
def translated(uri: str) -> Iterator[None]:
    """Translate the errors of a call about `uri`, without secrets. Raises StoreRefused, StoreUnreachable."""
    try:
        yield
    except ClientError as error:
        raise _answer(uri, error) from error
    except BAD_CREDENTIALS as error:
        raise StoreRefused(
            f"{uri}: no usable credentials ({type(error).__name__}); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
            f"or AWS_PROFILE"
        ) from error
    except (BotoCoreError, Boto3Error, DamagedAnswer) as error:
        raise StoreUnreachable(
            f"{uri}: S3 did not answer as it should ({type(error).__name__}, {TRIES} tries); check that "
            f"{_endpoint()} is up and reachable, and run again"
        ) from error


def code_of(error: ClientError) -> str:
    """S3's name of an error; for HEAD, whose answer has no body, the status."""
    return str(error.response["Error"]["Code"])


def _answer(uri: str, error: ClientError) -> StoreRefused | StoreUnreachable:
    code, status = code_of(error), error.response["ResponseMetadata"]["HTTPStatusCode"]
    bucket = place(uri)["Bucket"]
    if (status >= 500 and status != 501) or status in (408, 429) or code in DAMAGED_IN_TRANSIT:
        return StoreUnreachable(f"{uri}: S3 still answers {code} ({status}) after {TRIES} tries; run again later")
    if code == "NoSuchBucket":
        return StoreRefused(
            f"{uri}: {_endpoint()} has no bucket {bucket!r}; create it, or change resources.storage.store"
        )
    if status in (401, 403) or code in ACCESS_DENIED:
        return StoreRefused(
            f"{uri}: access refused by {_endpoint()} ({code}); check that the credentials of boto3's chain "
            f"(AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE) are right and may read, write, list and "
            f"delete in bucket {bucket!r}"
        )
    return StoreRefused(f"{uri}: S3 answers {code} ({status}); check bucket, region and endpoint ({_endpoint()})")


def _endpoint() -> str:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "AWS"


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
