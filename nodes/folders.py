"""The folders of SideNets and SiTs, and the shipped demo's files."""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import folder_paths

WEIGHTS = Path(__file__).resolve().parents[1] / "weights"
DEMO = "demo (shipped)"
# Folders of recordings and unfinished training, beside the SideNet that is made of them.
MAKING = (".trajectories", ".run")


@dataclass(frozen=True)
class ModelFolder:
    """A kind of model file.

    Attributes:
        key: the folder's name under `models`, and in `extra_model_paths.yaml`.
        extensions: of the files that are listed.
        demo: the file shipped with this pack.
        label: of the kind, in messages.
        from_output: also list files under `output`, where nodes write.
    """

    key: str
    extensions: frozenset[str]
    demo: Path
    label: str
    from_output: bool = False

    def register(self) -> None:
        """Add the folder to the user's own paths for this key, and list files of the extensions only."""
        own = [os.path.join(folder_paths.models_dir, self.key)]
        if self.from_output:
            own.append(os.path.join(folder_paths.get_output_directory(), self.key))
        known = folder_paths.folder_names_and_paths.get(self.key, ([], set()))[0]
        paths = [*known, *(path for path in own if path not in known)]
        # Reading extra_model_paths.yaml, before packs load, gives a new key an empty set, which would list every file.
        folder_paths.folder_names_and_paths[self.key] = (paths, set(self.extensions))
        with suppress(OSError):  # a read-only installation: the user's extra paths and the demo still work
            os.makedirs(own[0], exist_ok=True)

    def names(self) -> list[str]:
        """The entries of the drop-down list; the demo first."""
        try:
            return [DEMO, *filter(_is_finished, folder_paths.get_filename_list(self.key))]
        except OSError as error:  # an unreadable folder, for which the nodes must not be missing
            logging.warning(f"BA-solver: the {self.label} files cannot be listed: {error}")
            return [DEMO]

    def path(self, name: str) -> Path:
        """The file of a listed name.

        Raises:
            FileNotFoundError: it was moved or deleted.
        """
        if name == DEMO:
            return self.demo
        found = folder_paths.get_full_path(self.key, name)
        if found is None:
            places = ", ".join(folder_paths.get_folder_paths(self.key))
            raise FileNotFoundError(
                f"The {self.label} file {name!r} is not there (any more). Looked in: {places}. Put it back, or press R "
                "in ComfyUI to refresh the lists and choose another."
            )
        return Path(found)

    def fingerprint(self, name: str) -> str:
        """Changes when the file does, so that a replaced file is read again."""
        try:
            path = self.path(name)
            return f"{path}:{path.stat().st_mtime_ns}"
        except OSError:
            return f"missing {name}"


def _is_finished(name: str) -> bool:
    """Whether a listed file is none of those that lie beside a SideNet while it is made."""
    return not any(part.endswith(MAKING) for part in Path(name).parent.parts)


SIDENETS = ModelFolder(
    "sidenets", frozenset({".safetensors"}), WEIGHTS / "demo_sidenet.safetensors", "SideNet", from_output=True
)
SITS = ModelFolder("sit", frozenset({".safetensors", ".pt", ".pth"}), WEIGHTS / "demo_sit.safetensors", "SiT")


def register() -> None:
    """Make the folders known to ComfyUI."""
    for folder in (SIDENETS, SITS):
        folder.register()
