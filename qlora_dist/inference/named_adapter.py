"""The adapters that the command line names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora_dist.adapters.saved_adapter import SavedAdapter, read_saved_adapter
from qlora_dist.errors import UserError


@dataclass(frozen=True)
class NamedAdapter:
    """An adapter that has a name."""

    name: str
    """By which it is chosen."""
    path: Path
    saved: SavedAdapter

    @property
    def base(self) -> str:
        """The folder that it was trained on, as its configuration names it; may be empty."""
        return self.saved.base


def parse_named_adapters(texts: Sequence[str]) -> list[NamedAdapter]:
    """The adapters of `NAME=FOLDER` or `FOLDER`, which is named as its run (`runs/NAME/adapter`), or as itself.

    Raises:
        UserError: a name stands twice or is no name, or a folder holds no adapter.
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
            raise UserError(f"--adapter {text}: {name} stands twice; write another NAME=FOLDER")
        folders[name] = read_named_adapter(Path(folder), name)
    return list(folders.values())


def read_named_adapter(path: Path, name: str) -> NamedAdapter:
    """Read the configuration and the file's header.

    Raises:
        UserError: it is missing, damaged, or no LoRA adapter; or it has something that is not known here.
    """
    return NamedAdapter(name, path, read_saved_adapter(path))


def common_base(adapters: Sequence[NamedAdapter]) -> str:
    """The folder that all of them were trained on.

    Raises:
        UserError: they name none, or several.
    """
    if not adapters:
        raise UserError("no adapter and no base; give an adapter's folder, or a model's with --base")
    first = adapters[0]
    for adapter in adapters:
        if not adapter.base:
            raise UserError(f"{adapter.path}: names no base; give its folder with --base")
        if adapter.base != first.base:
            raise UserError(
                f"{adapter.path}: was trained on {adapter.base}, and {first.path} on {first.base}; adapters share "
                "their base, which --base names if it is one"
            )
    return first.base
