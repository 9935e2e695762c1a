"""The hub's client, whose repositories are folders of a test: nothing is asked of any network."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest


def pretend_hub(monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[dict[str, Any]]:
    """What the client is asked from now on, a record a call; `folder`/remote/OWNER/NAME are its repositories.

    What a call's patterns fit is copied to `folder`/snapshots/OWNER/NAME. `folder` becomes the current one.
    """
    import huggingface_hub

    calls: list[dict[str, Any]] = []

    def snapshot_download(repo_id: str, **options: Any) -> str:
        calls.append({"repo_id": repo_id, **options})
        snapshot, remote = folder / "snapshots" / repo_id, folder / "remote" / repo_id
        snapshot.mkdir(parents=True, exist_ok=True)
        for file in remote.rglob("*"):
            name = file.relative_to(remote)
            if file.is_file() and any(fnmatch(str(name), pattern) for pattern in options["allow_patterns"]):
                (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
                (snapshot / name).write_bytes(file.read_bytes())
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(folder)
    return calls
