"""Finds the media of a benchmark in a folder, however it is laid out."""

import os
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from ..media import IMAGE_ENDINGS, VIDEO_ENDINGS, MediaError


class MediaFiles:
    """
    The media in a folder and in the folders within it; folders of pictures, as frames of a video, among them.

    Only what is in the folder is ever found, whatever names the annotation files hold.

    Args:
        root (`Path`): The folder.

    Raises:
        NotADirectoryError: there is none.
    """

    def __init__(self, root: Path):
        if not root.is_dir():
            raise NotADirectoryError(f"There is no folder of media {root}.")
        self.root = root
        self._known: dict[str, list[PurePosixPath]] = defaultdict(list)  # relative paths by name and by stem
        for folder, _, names in os.walk(root, followlinks=True):
            here = PurePosixPath(Path(folder).relative_to(root).as_posix())
            endings = {os.path.splitext(name)[1].lower() for name in names}
            if endings.intersection(IMAGE_ENDINGS) and here.name:
                self._known[here.name].append(here)
            for name in sorted(names):
                stem, ending = os.path.splitext(name)
                if ending.lower() in VIDEO_ENDINGS + IMAGE_ENDINGS:
                    for key in {name, stem}:
                        self._known[key].append(here / name)

    def find(self, names: Iterable[str], kind: str = "video") -> Path:
        """
        The file or folder of frames that has one of some names.

        Args:
            names (`Iterable[str]`):
                Names with or without ending; what stands before a slash has to be the folder that the file is in.
            kind (`str`, defaults to `"video"`): Or `"image"`; what is preferred where a video and a picture fit.

        Raises:
            MediaError: there is none, or several that fit equally.
        """
        names = tuple(names)
        others = IMAGE_ENDINGS if kind == "video" else VIDEO_ENDINGS
        for name in names:
            wanted = PurePosixPath(name)
            stem, ending = os.path.splitext(wanted.name)
            keys = [wanted.name, *([stem] if ending.lower() in VIDEO_ENDINGS + IMAGE_ENDINGS else [])]
            folders = tuple(part for part in wanted.parent.parts if part != "/")
            for key in keys:
                found = [
                    path
                    for path in self._known.get(key, ())
                    if path.parent.parts[len(path.parent.parts) - len(folders) :] == folders
                ]
                if len({path.parent for path in found}) > 1:
                    raise MediaError(f"{name} may be {' or '.join(map(str, sorted(found)[:3]))} in {self.root}.")
                if found:
                    return self.root / min(found, key=lambda path: (path.suffix.lower() in others, path))
        raise MediaError(f"There is no {' or '.join(names)} in {self.root}.")
