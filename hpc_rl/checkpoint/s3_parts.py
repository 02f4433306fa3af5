"""A large file to S3 in parts, going on with those that an upload before it left. No torch.

boto3's own transfer begins a large object anew after a kill, and the parts that were there cost their owner
money until somebody removes them. Here the unfinished upload of the key is looked for; a part of it counts
when the bytes on this disk have its size and checksum. An upload that fails is left as it is, for the next.
"""

from __future__ import annotations

import base64
import hashlib
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from botocore.exceptions import ClientError
from s3transfer.utils import ChunksizeAdjuster, ReadFileChunk

_WORKERS = 4
_ALGORITHM = "CRC32"
_CHECKSUM = f"Checksum{_ALGORITHM}"
_READ = 8 << 20


@dataclass(frozen=True)
class Part:
    """Part `number`, counted from 1: `nbytes` of the file from `start`."""

    number: int
    start: int
    nbytes: int


def parts_of(nbytes: int, part_bytes: int) -> list[Part]:
    """The parts of a file, larger than asked where S3's limit of 10,000 parts wants it."""
    size = ChunksizeAdjuster().adjust_chunksize(part_bytes, nbytes)
    starts = range(0, nbytes, size)
    return [Part(number, start, min(size, nbytes - start)) for number, start in enumerate(starts, 1)]


def upload_in_parts(
    client: Any,
    bucket: str,
    key: str,
    path: Path,
    metadata: Mapping[str, str],
    part_bytes: int,
    on_part: Callable[[int], None] = lambda nbytes: None,
) -> int:
    """Store `path` under `key`; how many bytes had to be sent. `on_part` is called with the bytes of each
    part that was. Raises botocore's errors and OSError.

    The metadata are those of the upload's beginning: whoever goes on with an old one looks at the object.
    """
    upload = _unfinished(client, bucket, key)
    have: dict[int, dict[str, Any]] = {}
    if upload is None:
        begun = client.create_multipart_upload(
            Bucket=bucket, Key=key, Metadata=dict(metadata), ChecksumAlgorithm=_ALGORITHM
        )
        upload = str(begun["UploadId"])
    else:
        pages = client.get_paginator("list_parts").paginate(Bucket=bucket, Key=key, UploadId=upload)
        have = {int(part["PartNumber"]): part for page in pages for part in page.get("Parts", [])}
    parts = parts_of(path.stat().st_size, part_bytes)
    missing = [part for part in parts if not is_stored(path, part, have.get(part.number))]

    def send(part: Part) -> None:
        with ReadFileChunk.from_filename(str(path), part.start, part.nbytes) as body:
            have[part.number] = client.upload_part(
                Bucket=bucket,
                Key=key,
                UploadId=upload,
                PartNumber=part.number,
                Body=body,
                ChecksumAlgorithm=_ALGORITHM,
            )
        on_part(part.nbytes)

    with ThreadPoolExecutor(_WORKERS, thread_name_prefix="s3-part") as pool:
        jobs = [pool.submit(send, part) for part in missing]
        done, left = wait(jobs, return_when=FIRST_EXCEPTION)
        for job in left:
            job.cancel()
        for job in done:
            job.result()
    client.complete_multipart_upload(
        Bucket=bucket,
        Key=key,
        UploadId=upload,
        MultipartUpload={"Parts": [_receipt(part.number, have[part.number]) for part in parts]},
    )
    return sum(part.nbytes for part in missing)


def _unfinished(client: Any, bucket: str, key: str) -> str | None:
    """The newest upload of `key` that was begun and not finished. None where they may not be listed."""
    try:
        pages = client.get_paginator("list_multipart_uploads").paginate(Bucket=bucket, Prefix=key)
        found = [item for page in pages for item in page.get("Uploads", []) if item["Key"] == key]
    except ClientError as error:
        if error.response["Error"].get("Code") in ("AccessDenied", "403", "NotImplemented"):
            return None
        raise
    return str(max(found, key=lambda item: item["Initiated"])["UploadId"]) if found else None


def is_stored(path: Path, part: Part, stored: Mapping[str, Any] | None) -> bool:
    """Whether the stored part has the bytes that the file has there."""
    if stored is None or int(stored["Size"]) != part.nbytes:
        return False
    if _CHECKSUM in stored:
        crc = 0
        for block in _blocks(path, part):
            crc = zlib.crc32(block, crc)
        return bool(stored[_CHECKSUM] == base64.b64encode(crc.to_bytes(4, "big")).decode())
    md5 = hashlib.md5(usedforsecurity=False)  # what an ETag is where the store does not encrypt
    for block in _blocks(path, part):
        md5.update(block)
    return bool(stored["ETag"].strip('"') == md5.hexdigest())


def _blocks(path: Path, part: Part) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(part.start)
        left = part.nbytes
        while left and (block := file.read(min(_READ, left))):
            left -= len(block)
            yield block


def _receipt(number: int, stored: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "PartNumber": number,
        "ETag": stored["ETag"],
        **{name: stored[name] for name in (_CHECKSUM,) if name in stored},
    }
