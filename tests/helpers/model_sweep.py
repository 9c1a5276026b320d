"""Tiny models of many types: quantized, trained, and compared with transformers, PEFT and bitsandbytes.

All types of a group are trained in one process, and then in one pair of processes, because a start takes seconds.
"""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from qlora_dist.config.schema import Config
from qlora_dist.errors import UserError
from qlora_dist.model.quantize_folder import quantize_folder
from qlora_dist.model.quantize_plan import QuantizeOptions
from qlora_dist.runs.run_dir import run_path
from qlora_dist.runtime.environment import read_rank_info
from qlora_dist.runtime.process_group import process_group
from qlora_dist.train.console import RunConsole
from qlora_dist.train.run_setup import RunSetup, set_up_run
from qlora_dist.train.run_training import train_and_export
from tests.helpers.dequantized_folder import write_dequantized_folder
from tests.helpers.ranks import run_ranks
from tests.helpers.sweep_folder import SweepFolder
from tests.helpers.train_helpers import eval_losses, losses, sequence_loss

_TOLERANCE = 1e-5
"""Relative difference of losses in fp32 that are summed in another order."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Result of the sweep for one type."""

    refused: str | None = None
    """Sentence of the refusal, without folders; None if the model trains."""
    packing: bool | None = None
    """Whether rows may hold several sequences; None if it is refused."""
    experts: bool | None = None
    """Whether `lora.experts` trains its experts; None if it has none in 4 bit."""
    min_share: float | None = None
    """Share in 4 bit that has to be accepted, if it is too low without `--min-share`."""
    failed: str | None = None
    """Traceback or difference, which is a fault; None in each outcome that is right."""

    def as_entry(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class _Choices:
    """Settings with which a model trains."""

    packing: bool = True
    experts: bool = True

    @property
    def overrides(self) -> list[str]:
        return [f"data.packing={'best-fit' if self.packing else 'none'}", f"lora.experts={str(self.experts).lower()}"]


def sweep_models(model_types: Iterable[str], task: str, folder: Path) -> dict[str, dict[str, Any]]:
    """Return the outcome of each type, as an entry of the table. `task` is a key of `AUTO_CLASSES`."""
    sweep = ModelSweep(SweepFolder(folder, task))
    return {model_type: outcome.as_entry() for model_type, outcome in sweep.run(list(model_types)).items()}


class ModelSweep:
    """The steps for a group of types. A type that fails at one step has an outcome, and takes no part in the next."""

    def __init__(self, files: SweepFolder) -> None:
        self.files = files
        self.outcomes: dict[str, Outcome] = {}
        self.min_shares: dict[str, float] = {}

    def run(self, model_types: Sequence[str]) -> dict[str, Outcome]:
        for model_type in model_types:
            with self._recorded(model_type):
                self._quantize(model_type)
        todo = [model_type for model_type in model_types if model_type not in self.outcomes]
        choices, outcomes = run_ranks(1, self._train_on_one_rank, todo)[0]
        self.outcomes |= outcomes
        run_ranks(2, self._train_on_two_ranks, choices)
        for model_type, chosen in choices.items():
            with self._recorded(model_type):
                self._compare(model_type, chosen)
        return {model_type: self.outcomes[model_type] for model_type in model_types}

    @contextmanager
    def _recorded(self, model_type: str) -> Iterator[None]:
        """Record an exception in the `with` as the outcome of the type."""
        try:
            yield
        except UserError as error:
            self.outcomes[model_type] = Outcome(refused=self.files.without_folders(str(error)))
        except Exception:
            self.outcomes[model_type] = Outcome(failed=traceback.format_exc())

    def _quantize(self, model_type: str) -> None:
        source = self.files.make_source(model_type)
        out = self.files.quantized(model_type)
        try:
            quantize_folder(source, out, QuantizeOptions(min_share=0.9))
        except UserError as error:
            if "--min-share" not in str(error):
                raise
            self.min_shares[model_type] = float(str(error).rpartition(" ")[2])
            quantize_folder(source, out, QuantizeOptions(min_share=0.0))

    def _train_on_one_rank(self, model_types: Sequence[str]) -> tuple[dict[str, _Choices], dict[str, Outcome]]:
        """Return the settings of the types that were trained, and the outcomes of the others."""
        choices: dict[str, _Choices] = {}
        self.outcomes = {}
        with process_group(read_rank_info(), torch.device("cpu")):
            for model_type in model_types:
                with self._recorded(model_type):
                    setup, chosen = self._set_up(model_type)
                    with RunConsole(1) as console:
                        train_and_export(setup, console)
                    choices[model_type] = chosen
        return choices, self.outcomes

    def _train_on_two_ranks(self, choices: dict[str, _Choices]) -> None:
        ranks = read_rank_info()
        with process_group(ranks, torch.device("cpu")), RunConsole(1) as console:
            for model_type, chosen in choices.items():
                try:
                    train_and_export(set_up_run(self._config(model_type, chosen, 2), ranks), console)
                except Exception as error:
                    raise RuntimeError(f"{model_type} on two ranks") from error

    def _config(self, model_type: str, chosen: _Choices, world_size: int) -> Config:
        # the held-out loss on one rank is enough
        overrides = [*chosen.overrides, *(["data.eval=null"] if world_size == 2 else [])]
        return self.files.load_config(model_type, overrides, world_size)

    def _set_up(self, model_type: str) -> tuple[RunSetup, _Choices]:
        """Set up a run with experts and with packing, or without what is refused."""
        chosen = _Choices()
        while True:
            try:
                return set_up_run(self._config(model_type, chosen, 1), read_rank_info()), chosen
            except UserError as error:
                if chosen.packing and "set data.packing: none" in str(error):
                    chosen = _Choices(packing=False, experts=chosen.experts)
                elif chosen.experts and "has no experts in 4 bit" in str(error):
                    chosen = _Choices(packing=chosen.packing, experts=False)
                else:
                    raise

    def _compare(self, model_type: str, chosen: _Choices) -> None:
        """Compare losses with those on two ranks, of transformers, and of PEFT with the adapter."""
        one, two = (self._config(model_type, chosen, world_size) for world_size in (1, 2))
        assert losses(two) == pytest.approx(losses(one), rel=_TOLERANCE), "losses on two ranks"
        setup = set_up_run(one, read_rank_info({}))
        dequantized = self.files.folder(model_type) / "dequantized"
        write_dequantized_folder(self.files.source(model_type), self.files.quantized(model_type), dequantized)
        plain = self.files.auto_class.from_pretrained(dequantized, dtype=torch.float32, attn_implementation="eager")
        first = sequence_loss(plain, setup.loader.micro_batches(0))
        assert losses(one)[0] == pytest.approx(first, rel=_TOLERANCE), "loss of the first step"
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Found missing adapter keys")
            adapted = peft.PeftModel.from_pretrained(plain, run_path(two.run) / "adapter").eval()
        before, *_, after = eval_losses(one)
        assert after == pytest.approx(sequence_loss(adapted, setup.eval_batches), rel=_TOLERANCE), "held-out loss"
        assert abs(before - after) > 100 * _TOLERANCE * after, "the adapter has no effect"
        self.outcomes[model_type] = Outcome(
            packing=chosen.packing, experts=chosen.experts or None, min_share=self.min_shares.get(model_type)
        )
