"""Compare the planner's formulas with figures that others have published of their QLoRA trainers.

    python benchmarks/published.py                # every row: predicted, published, error, and the switches
    python benchmarks/published.py --efficiency   # each GPU's fraction of its peak operations that its rows reach

Each system is modelled with its own switches (`published_systems.py`). The rows and their sources are in
`data/published_qlora.csv`.
"""

from __future__ import annotations

import argparse
import csv
from collections import defaultdict
from pathlib import Path
from statistics import median

from published_systems import (
    bundled_model_name,
    run_spec_of_row,
    system_memory,
    system_reserved_bytes,
    tokens_per_s,
    trainer_system_of_row,
)

from qlora_dist.plan.hardware import load_hardware
from qlora_dist.plan.model_config import read_model_config

ROWS = Path(__file__).parent / "data" / "published_qlora.csv"
GIB = 2**30
GENERIC = {"24gb": "rtx-4090", "40gb": "a100-40gb", "80gb": "a100-80gb"}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=Path, default=ROWS)
    parser.add_argument("--efficiency", action="store_true")
    args = parser.parse_args()
    with args.rows.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if args.efficiency:
        print_efficiencies(rows)
        return
    hardware = load_hardware()
    errors: dict[str, list[float]] = defaultdict(list)
    bands: dict[str, list[bool]] = defaultdict(list)
    predicted_ooms: list[bool] = []
    for row in rows:
        name = f"{row['model']} {row['gpus']}x{row['gpu']} {row['batch_per_gpu']}x{row['seq_len']}"
        run, system = (
            run_spec_of_row(row, read_model_config(bundled_model_name(row["model"]))),
            trainer_system_of_row(row),
        )
        memory = system_memory(run, system)
        confidence = " (offload)" if system.offload else ""
        parts = []
        for column, figure, predicted in (
            ("static_gib", "static", memory.static_bytes / GIB),
            ("peak_alloc_gib", "peak", memory.peak_bytes / GIB),
        ):
            if row[column]:
                parts.append(compare(figure + confidence, predicted, float(row[column]), errors))
        low, high = (nbytes / GIB for nbytes in system_reserved_bytes(memory, system))
        if row["peak_reserved_gib"]:
            published, plain = float(row["peak_reserved_gib"]), high - memory.phases["head"]["loss"] / GIB
            bands["x1.10 to x1.20"].append(low <= published <= plain)
            bands["x1.10 to x1.20, whole logits twice"].append(low <= published <= high)
            verdict = "in" if low <= published <= high else "out"
            parts.append(f"reserved {low:.2f} to {high:.2f} / {published:.2f} {verdict}")
        gpu = hardware.gpu(GENERIC.get(row["gpu"], row["gpu"]))
        if row["tokens_per_s_per_gpu"] == "OOM":
            predicted_ooms.append(not memory.fits(gpu.memory_bytes))
            verdict = "predicted" if predicted_ooms[-1] else "NOT PREDICTED"
            parts.append(f"published: out of memory; {verdict}, peak {memory.peak_bytes / GIB:.1f} GiB")
        elif row["tokens_per_s_per_gpu"]:
            predicted = tokens_per_s(run, system, gpu, hardware.link(gpu.link))
            parts.append(compare("tokens/s" + confidence, predicted, float(row["tokens_per_s_per_gpu"]), errors))
        print(f"{name}: {'; '.join(parts)}  [{system.description}]")
    print()
    for figure, values in errors.items():
        print(f"{figure}: {len(values)} rows, median {median(map(abs, values)):.1%}, worst {max(values, key=abs):+.1%}")
    for band, hits in bands.items():
        print(f"reserved within {band} of the predicted peak: {sum(hits)} of {len(hits)} rows")
    print(f"out of memory, predicted: {sum(predicted_ooms)} of {len(predicted_ooms)} rows")


def compare(figure: str, predicted: float, published: float, errors: dict[str, list[float]]) -> str:
    """Add the relative error of a figure to `errors`, and return a text with both values."""
    error = predicted / published - 1
    errors[figure].append(error)
    digits = 0 if figure.startswith("tokens") else 2
    return f"{figure} {predicted:.{digits}f} / {published:.{digits}f} {error:+.1%}"


def print_efficiencies(rows: list[dict[str, str]]) -> None:
    """Print each GPU's median efficiency, found by bisection, with which the formulas give the published speed."""
    hardware, efficiencies = load_hardware(), defaultdict(list)
    for row in rows:
        if row["tokens_per_s_per_gpu"] in ("", "OOM") or row["gpu"] not in hardware.gpus:
            continue
        run, system, gpu = (
            run_spec_of_row(row, read_model_config(bundled_model_name(row["model"]))),
            trainer_system_of_row(row),
            hardware.gpu(row["gpu"]),
        )
        low, high = 0.01, 1.0
        for _ in range(30):
            middle = (low + high) / 2
            slow = tokens_per_s(run, system, gpu, hardware.link(gpu.link), middle) < float(row["tokens_per_s_per_gpu"])
            low, high = (middle, high) if slow else (low, middle)
        efficiencies[row["gpu"]].append(low)
    for gpu_name, values in efficiencies.items():
        print(f"{gpu_name}: {median(values):.2f}, from {len(values)} rows, {min(values):.2f} to {max(values):.2f}")


if __name__ == "__main__":
    main()
