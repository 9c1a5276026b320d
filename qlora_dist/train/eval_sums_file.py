"""The sums of an interrupted evaluation, kept in the run's folder, so that the next start continues it.

Without them, an evaluation that takes longer than a job's time limit would never end.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from qlora_dist.runtime.object_collectives import all_gather_json, broadcast_json
from qlora_dist.train.evaluation_loop import EvalSums
from qlora_dist.train.run_setup import RunSetup

EVAL_SUMS_FILE = "evaluation.json"


class EvalSumsFile:
    """File with the sums of all ranks. Methods are called on all ranks, and rank 0 reads and writes the file.

    The sums are used only if the number of ranks, the data, the settings and the weights are unchanged.
    """

    def __init__(
        self, path: Path, setup: RunSetup, fingerprint: dict[str, Any], weights: Sequence[torch.Tensor]
    ) -> None:
        self._path, self._is_rank_0, self._weights = path, setup.ranks.rank == 0, weights
        same = [fingerprint, setup.data_sha256.get("eval"), setup.config.train.micro_batch, setup.ranks.world_size]
        self._fingerprint = hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()

    def pop(self, step: int) -> EvalSums:
        """Return this rank's sums of the evaluation after `step`, or empty ones, and remove the file."""
        kept = broadcast_json(self._read() if self._is_rank_0 else None)
        sums, weights = EvalSums(), None
        with suppress(ValueError, KeyError, TypeError, IndexError, AttributeError):
            if (kept["step"], kept["identity"]) == (step, self._fingerprint):
                batches, loss, tokens, weights = kept["ranks"][torch.distributed.get_rank()]
                sums = EvalSums(int(batches), float(loss), float(tokens))
        fits = all_gather_json([weights == self._weights_sum(), sums.batches])
        self.remove()
        return sums if all(fit == [True, sums.batches] for fit in fits) else EvalSums()

    def save(self, step: int, sums: EvalSums) -> None:
        ranks = all_gather_json([sums.batches, sums.loss, sums.tokens, self._weights_sum()])
        if self._is_rank_0 and sums.batches:
            with suppress(OSError):  # on a full disk the evaluation starts again from its beginning
                text = json.dumps({"step": step, "identity": self._fingerprint, "ranks": ranks})
                self._path.write_text(text + "\n", encoding="utf-8")

    def remove(self) -> None:
        if self._is_rank_0:
            with suppress(OSError):
                self._path.unlink()

    def _read(self) -> Any:
        try:
            return json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def _weights_sum(self) -> float:
        return sum(float(weight.detach().double().sum()) for weight in self._weights)
