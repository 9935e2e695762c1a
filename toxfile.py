"""A plugin of tox's for this project alone: how little of a disk the tests can do with."""

import os
import shutil

from tox.plugin import impl
from tox.tox_env.api import ToxEnv

DISCARD = "GPTJ_TOX_DISCARD"


@impl
def tox_after_run_commands(tox_env: ToxEnv, exit_code: int, outcomes: list[object]) -> None:
    """Removes an environment that has run, where GPTJ_TOX_DISCARD asks for it.

    All of them together hold 18 GB, of which no two are needed at once: so 4 GB are enough.
    """
    if os.environ.get(DISCARD):
        shutil.rmtree(tox_env.env_dir, ignore_errors=True)
