"""Objects of an S3 bucket: put, get and listed, with checksums, and errors that say what to change. No torch.

Every object carries the XXH3-64 of its bytes as metadata (`xxh3`). One that is there with the same size and
checksum is not sent again, nor is a part of a large one (`s3_parts`), so an upload that was cut off goes on
where it stopped; what is downloaded is compared with it. (The transfer itself is checked by S3's own
checksums, which botocore adds.) boto3 is imported when the first store is made: it takes a noticeable part
of a second.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from hpc_rl.checkpoint.manifest import FileEntry, checksum

KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION")
PART_BYTES = 64 << 20
TRIES = 4  # per request, by botocore: with exponential back-off
CONNECT_S, READ_S = 10.0, 60.0
_DENIED = ("403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "AllAccessDisabled")


class UploadError(RuntimeError):
    """What was to be stored or read is not; the message says why. `permanent`: no use to try again."""

    def __init__(self, message: str, *, permanent: bool = False) -> None:
        super().__init__(message)
        self.permanent = permanent


@dataclass(frozen=True)
class Location:
    """`s3://bucket/prefix`; `prefix` has no slash at its ends and may be empty."""

    bucket: str
    prefix: str

    @classmethod
    def parse(cls, url: str) -> Location:
        """Raises UploadError if `url` is not s3://bucket[/prefix]."""
        scheme, _, rest = url.partition("://")
        bucket, _, prefix = rest.partition("/")
        if scheme != "s3" or not bucket:
            raise UploadError(f"{url!r} is not s3://bucket/prefix", permanent=True)
        return cls(bucket, prefix.strip("/"))

    def under(self, *parts: str) -> Location:
        return Location(self.bucket, "/".join(part for part in (self.prefix, *parts) if part))

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")


def missing_keys(environ: Mapping[str, str]) -> list[str]:
    return [name for name in KEYS if not environ.get(name)]


class S3Store:
    """The objects under one location. Keys are relative to it. Raises UploadError."""

    def __init__(
        self,
        location: Location,
        environ: Mapping[str, str] | None = None,
        tries: int = TRIES,
        part_bytes: int = PART_BYTES,
    ) -> None:
        import boto3
        from boto3.s3.transfer import TransferConfig
        from botocore.config import Config

        environ = os.environ if environ is None else environ
        if missing := missing_keys(environ):
            raise UploadError(f"{', '.join(missing)} not set: needed for {location}", permanent=True)
        self.location = location
        self.endpoint = environ.get("AWS_ENDPOINT_URL") or None
        # Elsewhere than at Amazon a bucket is seldom a host name.
        style = {"addressing_style": "path" if self.endpoint else "auto"}
        session = boto3.session.Session(
            aws_access_key_id=environ["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=environ["AWS_SECRET_ACCESS_KEY"],
            aws_session_token=environ.get("AWS_SESSION_TOKEN") or None,
            region_name=environ["AWS_DEFAULT_REGION"],
        )
        self._client: Any = session.client(
            "s3",
            endpoint_url=self.endpoint,
            config=Config(
                retries={"total_max_attempts": tries, "mode": "standard"},
                connect_timeout=CONNECT_S,
                read_timeout=READ_S,
                s3=style,
            ),
        )
        self._transfer = TransferConfig(
            multipart_threshold=part_bytes, multipart_chunksize=part_bytes, max_concurrency=4
        )
        self._part_bytes = part_bytes

    # --- writing -----------------------------------------------------------------------------------
    def put(self, key: str, data: bytes) -> None:
        """Store a small object."""
        metadata = {"xxh3": xxhash.xxh3_64_hexdigest(data)}
        with self._told(f"write {key}"):
            self._client.put_object(
                Bucket=self.location.bucket, Key=self._key(key), Body=data, Metadata=metadata
            )

    def put_file(
        self, key: str, path: Path, entry: FileEntry, on_part: Callable[[int], None] = lambda nbytes: None
    ) -> int:
        """Store the file unless it is there already; how many bytes had to be sent. `on_part` is called with
        the bytes of each part of a large file that was sent."""
        if self.find(key) == entry:
            return 0
        target, metadata = (self.location.bucket, self._key(key)), {"xxh3": entry.xxh3}
        with self._told(f"write {key}"):
            if entry.nbytes >= self._part_bytes:
                from hpc_rl.checkpoint.s3_parts import upload_in_parts

                sent = upload_in_parts(self._client, *target, path, metadata, self._part_bytes, on_part)
            else:
                self._client.upload_file(str(path), *target, {"Metadata": metadata}, Config=self._transfer)
                sent = entry.nbytes
        stored = self.find(key)
        if stored != entry:
            raise UploadError(f"{self.location}/{key} is {stored} after the upload, not {entry}")
        return sent

    def delete(self, key: str) -> None:
        with self._told(f"delete {key}"):
            self._client.delete_object(Bucket=self.location.bucket, Key=self._key(key))

    # --- reading -----------------------------------------------------------------------------------
    def find(self, key: str) -> FileEntry | None:
        """Size and checksum of an object; None if there is none."""
        from botocore.exceptions import ClientError

        with self._told(f"look at {key}"):
            try:
                head = self._client.head_object(Bucket=self.location.bucket, Key=self._key(key))
            except ClientError as error:
                if error.response["Error"]["Code"] in ("404", "NoSuchKey", "NotFound"):
                    return None
                raise
        return FileEntry(int(head["ContentLength"]), str(head["Metadata"].get("xxh3", "")))

    def list(self, prefix: str = "") -> dict[str, int]:
        """Keys that begin with `prefix`, and their sizes."""
        found: dict[str, int] = {}
        whole = self._key(prefix)
        with self._told("list"):
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self.location.bucket, Prefix=whole
            )
            for page in pages:
                for item in page.get("Contents", []):
                    found[item["Key"][len(self._key("")) :]] = int(item["Size"])
        return found

    def get(self, key: str) -> bytes:
        """A small object, compared with its checksum."""
        with self._told(f"read {key}"):
            answer = self._client.get_object(Bucket=self.location.bucket, Key=self._key(key))
            data: bytes = answer["Body"].read()
        wanted = str(answer["Metadata"].get("xxh3", ""))
        if wanted and xxhash.xxh3_64_hexdigest(data) != wanted:
            raise UploadError(f"{self.location}/{key} is damaged: its checksum does not fit")
        return data

    def get_file(self, key: str, path: Path, entry: FileEntry) -> None:
        """Download to `path`, which appears when size and checksum are those of `entry`."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            with self._told(f"read {key}"):
                self._client.download_file(
                    self.location.bucket, self._key(key), str(temporary), Config=self._transfer
                )
            found = FileEntry(temporary.stat().st_size, checksum(temporary) if entry.xxh3 else "")
            if found != entry:
                raise UploadError(
                    f"{self.location}/{key} is damaged: {found.nbytes} bytes with checksum "
                    f"{found.xxh3 or '-'}, the upload had {entry.nbytes} with {entry.xxh3 or '-'}"
                )
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    # --- access ------------------------------------------------------------------------------------
    def prove_access(self, key: str) -> None:
        """Write a tiny object, read it back and remove it."""
        with self._told("find the bucket"):
            self._client.head_bucket(Bucket=self.location.bucket)
        self.put(key, b"hpc-rl")
        if self.get(key) != b"hpc-rl":
            raise UploadError(f"{self.location}/{key} does not read back")
        self.delete(key)

    def _key(self, key: str) -> str:
        return f"{self.location.prefix}/{key}" if self.location.prefix else key

    @contextmanager
    def _told(self, doing: str) -> Iterator[None]:
        """botocore's errors as ours, in words."""
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError

        at = f" at {self.endpoint}" if self.endpoint else ""
        try:
            yield
        except ClientError as error:
            raise self._of_answer(error.response, doing, at) from error
        except (BotoCoreError, HTTPClientError) as error:
            raise UploadError(f"cannot reach {self.location}{at} to {doing}: {error}") from error
        except Boto3Error as error:  # of the transfer manager; the answer is its context
            cause = error.__context__
            if isinstance(cause, ClientError):
                raise self._of_answer(cause.response, doing, at) from error
            raise UploadError(f"cannot {doing} in {self.location}{at}: {error}") from error

    def _of_answer(self, response: Any, doing: str, at: str) -> UploadError:
        code = str(response["Error"].get("Code", ""))
        if code in _DENIED:
            fix = "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and the policy of the bucket"
            return UploadError(
                f"access to {self.location}{at} denied ({code}) to {doing}; {fix}", permanent=True
            )
        if code == "NoSuchBucket" or (code == "404" and doing == "find the bucket"):
            fix = "create it, or correct checkpoint.upload_s3.bucket, AWS_DEFAULT_REGION or AWS_ENDPOINT_URL"
            return UploadError(f"there is no bucket {self.location.bucket}{at}; {fix}", permanent=True)
        message = response["Error"].get("Message", "")
        return UploadError(f"cannot {doing} in {self.location}{at}: {code} {message}".rstrip())
