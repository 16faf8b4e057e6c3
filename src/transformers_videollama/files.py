"""Who may read what is written."""

import os
from pathlib import Path


def give_usual_permissions(path: Path) -> None:
    """Those of any new file, which others can read if the user lets them: `mkstemp` and `safetensors` let nobody."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)
