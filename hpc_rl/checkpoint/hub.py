"""The final export as a model repository of the Hugging Face Hub. No torch.

`python -m hpc_rl.checkpoint.hub NAME private|public` prints the full name if HF_TOKEN may write there.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hpc_rl.checkpoint.s3 import UploadError

TOKEN = "HF_TOKEN"
EXIT_REFUSED, EXIT_AWAY = 3, 4
# Files of an earlier upload, which may have had another number of them; what is sent now stays.
STALE = ["*.safetensors", "*.safetensors.index.json"]


class HubRepo:
    """`name` is `owner/name`, or a bare name of the token's owner. Raises UploadError.

    `endpoint` None means huggingface.co, or what HF_ENDPOINT says.
    """

    def __init__(
        self,
        name: str,
        private: bool = True,
        environ: Mapping[str, str] | None = None,
        endpoint: str | None = None,
    ) -> None:
        from huggingface_hub import HfApi

        token = (os.environ if environ is None else environ).get(TOKEN)
        if not token:
            raise UploadError(
                f"{TOKEN} not set: needed to upload to the Hub repository {name}", permanent=True
            )
        self.name, self.private = name, private
        self._api: Any = HfApi(token=token, endpoint=endpoint)

    def __str__(self) -> str:
        return f"hub:{self.name}"

    def full_name(self) -> str:
        """`owner/name`; asks the Hub who owns the token if `name` is bare."""
        if "/" in self.name:
            return self.name
        return f"{self._who()['name']}/{self.name}"

    def prove_access(self) -> str:
        """The full name, if the token may write there. Creates nothing."""
        who = self._who()
        repo = self.name if "/" in self.name else f"{who['name']}/{self.name}"
        role = who.get("auth", {}).get("accessToken", {}).get("role", "")
        if role == "read":
            raise UploadError(
                f"{TOKEN} may only read; make one with write access at {self._api.endpoint}/settings/tokens",
                permanent=True,
            )
        owners = {who["name"], *(org["name"] for org in who.get("orgs", []))}
        if repo.partition("/")[0] not in owners:
            raise UploadError(
                f"{TOKEN} is {who['name']}'s, who is not a member of {repo.partition('/')[0]} ({repo})",
                permanent=True,
            )
        with self._told(f"look at {repo}"):
            if self._api.repo_exists(repo):
                self._api.auth_check(repo, write=True)
                self._check_private(repo)
        return repo

    def upload(self, folder: Path, message: str) -> str:
        """Make the repository hold the files of `folder`; its address. Files that are there are not sent
        again, so a second call finishes what was cut off."""
        repo = self.full_name()
        with self._told(f"create {repo}"):
            self._api.create_repo(repo, private=self.private, exist_ok=True)
            self._check_private(repo)
        with self._told(f"upload {folder.name} to {repo}"):
            self._api.upload_folder(
                repo_id=repo,
                folder_path=folder,
                commit_message=message,
                ignore_patterns=[".*", "**/.*"],
                delete_patterns=STALE,
            )
            there = set(self._api.list_repo_files(repo))
        names = {str(path.relative_to(folder)) for path in folder.rglob("[!.]*") if path.is_file()}
        lost = names - there
        if lost:
            raise UploadError(f"{repo} lacks {sorted(lost)[0]} after the upload")
        return f"{self._api.endpoint}/{repo}"

    def _check_private(self, repo: str) -> None:
        if self.private and not self._api.repo_info(repo).private:
            raise UploadError(
                f"the Hub repository {repo} exists and is public; choose another name, or set "
                "checkpoint.upload_hub.private: false",
                permanent=True,
            )

    def _who(self) -> dict[str, Any]:
        with self._told("ask whose the token is"):
            return dict(self._api.whoami())

    @contextmanager
    def _told(self, doing: str) -> Iterator[None]:
        """The Hub's errors as ours, in words."""
        # HTTPError is that of the HTTP library which this version of huggingface_hub uses.
        from huggingface_hub.errors import (
            HfHubHTTPError,
            HFValidationError,
            HTTPError,  # type: ignore[attr-defined]
            OfflineModeIsEnabled,
        )

        try:
            yield
        except HfHubHTTPError as error:
            status = error.response.status_code if error.response is not None else 0
            fix = f"; {TOKEN} needs write access there" if status in (401, 403) else ""
            said = str(error).strip().splitlines()[0]
            raise UploadError(f"cannot {doing}: {said}{fix}", permanent=400 <= status < 500) from error
        except (HFValidationError, OfflineModeIsEnabled) as error:
            raise UploadError(f"cannot {doing}: {error}", permanent=True) from error
        except (HTTPError, OSError, RuntimeError) as error:
            if isinstance(error, UploadError):
                raise
            raise UploadError(f"cannot reach {self._api.endpoint} to {doing}: {error}") from error


def main(name: str, visibility: str) -> int:
    try:
        print(HubRepo(name, visibility == "private").prove_access())
    except UploadError as error:
        print(error)
        return EXIT_REFUSED if error.permanent else EXIT_AWAY
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))
