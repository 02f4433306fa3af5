"""The state file: what `up` started, so that `down` and `status` work from any process, after a crash too."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hpc_rl.cluster.devcluster.errors import DevClusterError
from hpc_rl.cluster.devcluster.processes import ProcessRecord
from hpc_rl.cluster.devcluster.spec import ProfileSpec

FILE = "state.json"
_FORMAT = 1


@dataclass
class State:
    """`token` marks the daemons' environment; `made_dir` says that `down` may remove the folder itself."""

    spec: ProfileSpec
    token: str
    made_dir: bool
    ctld_port: int
    node_ports: dict[str, int]
    dbd_port: int | None
    commands: dict[str, list[str]] = field(default_factory=dict)
    processes: list[ProcessRecord] = field(default_factory=list)

    def save(self, root: Path) -> None:
        """Written anew after each daemon's start and renamed into place: never half, never behind."""
        data = {**asdict(self), "spec": self.spec.to_json(), "format": _FORMAT}
        temporary = root / (FILE + ".new")
        temporary.write_text(json.dumps(data, indent=1))
        os.replace(temporary, root / FILE)

    @classmethod
    def load(cls, root: Path) -> State | None:
        """The state of the devcluster in `root`; None when there is none."""
        try:
            data: dict[str, Any] = json.loads((root / FILE).read_text())
        except FileNotFoundError:
            return None
        except (ValueError, PermissionError) as error:
            raise DevClusterError(f"{root / FILE} cannot be read: {error}") from error
        if data.pop("format", None) != _FORMAT:
            raise DevClusterError(f"{root / FILE} was written by another version; use that one's `down`")
        data["spec"] = ProfileSpec.from_json(data["spec"])
        data["processes"] = [ProcessRecord(**record) for record in data["processes"]]
        return cls(**data)

    def record(self, name: str) -> ProcessRecord:
        """The newest process of this name. Raises DevClusterError naming those there are."""
        for record in reversed(self.processes):
            if record.name == name:
                return record
        names = sorted({record.name for record in self.processes})
        raise DevClusterError(f"no daemon {name!r}; there are {', '.join(names)}")
