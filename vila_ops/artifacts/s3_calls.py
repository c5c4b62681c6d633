"""Calls to S3: bounded in time and number, conditional where it matters, and errors that say what to do.

Credentials, region and endpoint come from boto3's own chain (environment, profile, instance) and from nowhere else.
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
from vila_ops.errors import DamagedAnswer, OtherBytes, StoreRefused, StoreUnreachable

TRIES = 6
"""Attempts at one call, the first included; waits between them grow, with jitter."""
WAIT_SECONDS = 0.2
CONNECT_SECONDS = 10.0
READ_SECONDS = 60.0
"""Between two bytes of an answer."""
CONNECTIONS = 64
PART_BYTES = 16 * 2**20
TRANSFER = TransferConfig(multipart_threshold=PART_BYTES, multipart_chunksize=PART_BYTES, max_concurrency=8)
NO_KEY = ("NoSuchKey", "404")
NOT_LET_IN = (
    "AuthorizationHeaderMalformed",
    "ExpiredToken",
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
)
BROKEN_ON_THE_WAY = ("BadDigest", "RequestTimeout", "XAmzContentSHA256Mismatch")
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
    """This process's client: safe for threads, not for a fork."""
    return client_of(os.getpid())


@lru_cache(maxsize=1)
def client_of(process: int) -> Any:
    """A client of boto3's default credentials and endpoint (AWS_ENDPOINT_URL)."""
    with told("s3://"):
        return boto3.session.Session().client(
            "s3",
            config=Config(
                retries={"mode": "standard", "total_max_attempts": TRIES},
                connect_timeout=CONNECT_SECONDS,
                read_timeout=READ_SECONDS,
                max_pool_connections=CONNECTIONS,
                response_checksum_validation="when_required",  # never: every answer is compared with our own sha256
            ),
        )


def place(uri: str) -> dict[str, str]:
    """Bucket and key of an `s3://bucket/key`."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return {"Bucket": bucket, "Key": key}


def get(uri: str) -> Versioned | None:
    """Bytes and ETag of an object that `put` made; None where there is none."""

    def once() -> Versioned:
        found = client().get_object(**place(uri))
        with whole():
            data: bytes = found["Body"].read()
        if found["Metadata"].get("sha256", _sha256(data)) != _sha256(data):
            raise OtherBytes("the bytes are not those that were put")
        return Versioned(data, found["ETag"])

    with told(uri):
        try:
            return again(once)
        except ClientError as error:
            if code_of(error) in NO_KEY:
                return None
            raise


def put(uri: str, data: bytes, condition: Condition) -> str | None:
    """Put an object if the condition holds; its ETag, or None where it does not hold.

    A put whose answer was lost is asked again and refused for its own sake: what is there then tells who was first.
    """
    checksum = base64.b64encode(hashlib.sha256(data).digest()).decode()
    request: dict[str, Any] = {
        "Body": data,
        "ChecksumSHA256": checksum,
        "Metadata": {"sha256": _sha256(data)},
        **condition,
    }
    with told(uri):
        for turn in range(TRIES):
            try:
                return str(client().put_object(**place(uri), **request)["ETag"])
            except ClientError as error:
                if code_of(error) in NO_KEY:  # what should be replaced was deleted
                    return None
                status = error.response["ResponseMetadata"]["HTTPStatusCode"]
                if status == 412:
                    found = get(uri)
                    return found.tag if found is not None and found.data == data else None
                if status != 409:  # 409: another conditional put is under way
                    raise
                pause(turn)
    raise StoreUnreachable(f"{uri}: another conditional put was under way {TRIES} times (409); run again")


def again(action: Callable[[], T]) -> T:
    """The action's result; tried again, a bounded number of times, while its answers come damaged."""
    for turn in range(TRIES - 1):
        try:
            return action()
        except DamagedAnswer:
            pause(turn)
    return action()


def pause(turn: int) -> None:
    """Wait before another try: longer each time, and not all at the same moment."""
    time.sleep(random.uniform(0, WAIT_SECONDS * 2**turn))


@contextmanager
def whole() -> Iterator[None]:
    """Reading a body: one that breaks off is a damaged answer."""
    try:
        yield
    except (HTTPClientError, IncompleteReadError, RetriesExceededError) as error:
        raise DamagedAnswer(type(error).__name__) from error


@contextmanager
def told(uri: str) -> Iterator[None]:
    """What goes wrong with a call about `uri`, told so that it can be acted on, and without a word of secrets."""
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
            f"{uri}: S3 did not answer as it should ({type(error).__name__}, {TRIES} tries); see whether "
            f"{_endpoint()} is up and reachable, and run again"
        ) from error


def code_of(error: ClientError) -> str:
    """S3's own name of an error; HEAD has no body to carry it, so there it is the status."""
    return str(error.response["Error"]["Code"])


def _answer(uri: str, error: ClientError) -> StoreRefused | StoreUnreachable:
    code, status = code_of(error), error.response["ResponseMetadata"]["HTTPStatusCode"]
    bucket = place(uri)["Bucket"]
    if (status >= 500 and status != 501) or status in (408, 429) or code in BROKEN_ON_THE_WAY:
        return StoreUnreachable(f"{uri}: S3 still answers {code} ({status}) after {TRIES} tries; run again later")
    if code == "NoSuchBucket":
        return StoreRefused(
            f"{uri}: {_endpoint()} has no bucket {bucket!r}; make it, or change resources.storage.store"
        )
    if status in (401, 403) or code in NOT_LET_IN:
        return StoreRefused(
            f"{uri}: access refused by {_endpoint()} ({code}); see that the credentials of boto3's chain "
            f"(AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE) are right and may read, write, list and "
            f"delete in bucket {bucket!r}"
        )
    return StoreRefused(f"{uri}: S3 answers {code} ({status}); see bucket, region and endpoint ({_endpoint()})")


def _endpoint() -> str:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "AWS"


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
