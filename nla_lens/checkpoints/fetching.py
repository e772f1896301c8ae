"""Single files of a checkpoint that is open."""

from __future__ import annotations

import os
from pathlib import Path

from nla_lens.checkpoints import hub
from nla_lens.checkpoints.files import Checkpoint
from nla_lens.checkpoints.folders import as_path
from nla_lens.checkpoints.hub import HubFolder
from nla_lens.checkpoints.layout import join


def fetch_file(checkpoint: Checkpoint, name: str) -> Path:
    """The path of one file of an open checkpoint, downloaded where that is on the hub.

    A directory on this machine is as it is: the file may be missing there.

    Raises:
        NLAError: The hub does not give it.
    """
    path = checkpoint.path / name
    if path.is_file() or os.path.isdir(as_path(checkpoint.name)):
        return path
    named = HubFolder.parse(checkpoint.name)
    if named is None:
        return path
    # The snapshot's directory is named after its commit.
    depth = named.folder.count("/") + bool(named.folder)
    commit = [checkpoint.path, *checkpoint.path.parents][depth].name
    return hub.download_one(named.repo, commit, join(named.folder, name))
