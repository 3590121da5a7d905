"""Starts the service as an image's command does, on this machine."""

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Self

from tests.service import ServiceProcess


def switched_user(user: str) -> dict[str, Any]:
    """Return Popen's arguments for running as `uid:gid` without supplementary groups; none, said aloud, if not root."""
    uid, _, gid = user.partition(":")
    if os.geteuid() != 0:
        print(f"not switching to user {user}: that takes root, and this is user {os.geteuid()}")
        return {}
    return {"user": int(uid), "group": int(gid), "extra_groups": []}


class CommandProcess(ServiceProcess):
    """The service by any command line, in any folder, as any user, and with no environment but what is given."""

    def __init__(self, command: list[str], folder: Path, environment: dict[str, str], user: str | None = None) -> None:
        """Prepare; `start` or a `with` block starts it.

        Args:
            command: The whole command line.
            folder: The working directory.
            environment: The whole environment.
            user: `uid:gid` to run as; None: this process's own.
        """
        super().__init__({})
        self.command = command
        self.folder = folder
        self.environment = environment
        self.user = user

    def start(self) -> Self:
        """Start it and wait for its `listening` line."""
        self.process = subprocess.Popen(  # noqa: S603  # what the Dockerfile says
            self.command,
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **(switched_user(self.user) if self.user else {}),
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        listening = self.wait_for("listening")
        self.port = listening["port"]
        self.metrics_port = listening["metrics_port"]
        return self


def own_python(command: list[str]) -> list[str]:
    """Return an image's command as it runs with this process's interpreter and packages."""
    assert command[0] == "python"
    return [sys.executable, *command[1:]]
