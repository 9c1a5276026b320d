"""Rows from the Hugging Face hub, streamed: nothing is kept on disk."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import chain

from qlora_dist.data.arrow_files import record_batch_to_rows
from qlora_dist.data.source_row import BadRow
from qlora_dist.data.validate import RawRow, format_exception_message
from qlora_dist.errors import UserError

_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)
_TIMEOUT_S = 10
_ROWS_PER_BATCH = 64
"""Rows made into Python objects at a time."""


def is_hub_dataset_name(name: str) -> bool:
    """Whether it can be a data set's name ('owner/name', 'name')."""
    return _NAME.fullmatch(name) is not None


class HubUnreachableError(UserError):
    """The hub cannot be asked."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(
            f"{name}: no such file or folder here, and the Hugging Face hub can't be asked ({reason}); correct the "
            "path, or download the data set where there is a network"
        )
        self.reason = reason


def fetch_hub_revision(name: str) -> str:
    """The commit at which a data set is now.

    Raises:
        UserError: it isn't on the hub, or (`HubUnreachableError`) the hub can't be reached; within seconds.
    """
    from huggingface_hub import HfApi  # and not by way of `datasets`, which tries for half a minute
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        return str(HfApi().dataset_info(name, timeout=_TIMEOUT_S).sha)
    except GatedRepoError:
        raise UserError(f"{name}: access to this data set must be asked for; do so on its page of the hub") from None
    except RepositoryNotFoundError:
        raise UserError(
            f"{name}: no such file or folder here, and no such data set on the Hugging Face hub; correct the path, or "
            "log in if the data set is private (hf auth login)"
        ) from None
    except Exception as error:  # the libraries below have dozens, of several families
        raise HubUnreachableError(name, format_exception_message(error)) from None


def read_hub_dataset(
    name: str, subset: str | None, split: str, revision: str | None = None
) -> Iterator[RawRow | BadRow]:
    """The rows of a data set on the hub. No code of the data set's is run: `datasets` no longer can.

    Args:
        name: of the data set.
        subset: its configuration.
        split: one of its splits.
        revision: a commit; None: the newest.

    Raises:
        UserError: as `fetch_hub_revision`; or there is no such split or subset; or the connection breaks.
    """
    revision = revision or fetch_hub_revision(name)
    import datasets  # seconds

    row = 0
    try:
        streamed = datasets.load_dataset(name, subset, split=split, revision=revision, streaming=True)
        for table in streamed.with_format("arrow").iter(
            _ROWS_PER_BATCH
        ):  # as Arrow, because its types tell which nulls it filled
            for fields in chain.from_iterable(map(record_batch_to_rows, table.to_batches())):
                row += 1
                place = f"{name}, row {row}"
                yield BadRow(place, fields) if isinstance(fields, str) else (place, fields)
    except Exception as error:
        where = f"after row {row}" if row else f"with split: {split}" + (f", subset: {subset}" if subset else "")
        raise UserError(
            f"{name}: cannot be read from the Hugging Face hub {where} ({format_exception_message(error)}); correct that, or download the "
            "data set and give the folder"
        ) from None
