"""The errors of the devcluster: each message says what to do."""

from __future__ import annotations


class DevClusterError(RuntimeError):
    """The devcluster cannot do what was asked; the message says why and what helps."""


class MissingPackages(DevClusterError):
    """Programs are not installed. `packages` are the Debian packages that bring them."""

    def __init__(self, programs: list[str], packages: list[str]) -> None:
        self.programs, self.packages = programs, packages
        super().__init__(
            f"devcluster: {', '.join(programs)} not found; install the Debian packages: "
            f"apt-get install --no-install-recommends {' '.join(packages)}"
        )
