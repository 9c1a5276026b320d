"""Adapters that the command line names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora_dist.adapters.saved_adapter import SavedAdapter, read_saved_adapter
from qlora_dist.errors import UserError


@dataclass(frozen=True)
class NamedAdapter:
    """Saved adapter with the name that selects it."""

    name: str
    path: Path
    saved: SavedAdapter

    @property
    def base(self) -> str:
        """Folder of the base that it was trained on, as its configuration names it. It may be empty."""
        return self.saved.base


def parse_named_adapters(texts: Sequence[str]) -> list[NamedAdapter]:
    """Read adapters given as `NAME=FOLDER` or `FOLDER`.

    The default name is that of the run (`runs/NAME/adapter`), else that of the folder.
    """
    folders: dict[str, NamedAdapter] = {}
    for text in texts:
        name, equals, folder = text.partition("=")
        if not equals:
            path = Path(text)
            name, folder = (path.parent if path.name == "adapter" else path).resolve().name, text
        if not name.strip() or " " in name or name == "base":
            raise UserError(f"--adapter {text}: {name or 'nothing'} is no name for an adapter; write NAME=FOLDER")
        if name in folders:
            raise UserError(f"--adapter {text}: the name {name} is given twice; write another NAME=FOLDER")
        folders[name] = read_named_adapter(Path(folder), name)
    return list(folders.values())


def read_named_adapter(path: Path, name: str) -> NamedAdapter:
    """Read an adapter's configuration and the header of its file, as `read_saved_adapter` does."""
    return NamedAdapter(name, path, read_saved_adapter(path))


def common_base(adapters: Sequence[NamedAdapter]) -> str:
    """Return the base that all adapters were trained on. If they name none, or several, it is a `UserError`."""
    if not adapters:
        raise UserError("no adapter and no base; give an adapter's folder, or a model's with --base")
    first = adapters[0]
    for adapter in adapters:
        if not adapter.base:
            raise UserError(f"{adapter.path}: names no base; give its folder with --base")
        if adapter.base != first.base:
            raise UserError(
                f"{adapter.path}: was trained on {adapter.base}, and {first.path} on {first.base}; give adapters "
                "of one base, or its folder with --base if both paths are the same model"
            )
    return first.base
