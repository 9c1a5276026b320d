"""Train the same model, data, batch shape, LoRA and steps with qlora-dist and with other tools, and compare them.

    python benchmarks/peers/run.py --base FOLDER --data my-data.jsonl [--systems ours transformers ...] [--ranks 1 2]
        [--rows 2] [--seq-len 1024] [--steps 3] [--repeats 3] [--json FILE]

FOLDER is a model in 16 bit, which is quantized first, or in 4 bit from `qlora-dist quantize`, which torchtune refuses.
Each peer runs in a virtual environment with the versions of its requirements file in this folder. The first run
installs them, which needs a network and some minutes (1.5 GB each). In each repeat the systems load one after another
and then take turns, a step at a time (peer_process.py). All stay in memory, and a waiting system needs about 0.8 GB a
rank. The error of a system that cannot run is reported. The output is Markdown.

Every run trains full rows, which are equal for all systems, and then uneven rows (workload.py). qlora-dist packs the
uneven rows. Its peers get as many conversations, one per row, padded to the longest. A run begins each kind with one
step that is not timed, followed by --steps timed ones. One process has --threads threads, and two ranks share them.

- tokens/s: tokens without padding, as the median over the steps of all repeats, by rank 0's clock. A ratio of speeds is
  the median over steps of the same turn, followed by its range in brackets.
- Peaks: a rank's VmHWM. The peak at load is above the memory after the imports, and mapped files count. It is taken
  from the second repeat on, if there is one, because the first one compiles imports.
- Static: the storages of all live tensors after the last step, each once, of the rank with most.
- Wire: bytes that the loopback of a separate network namespace sends in a full step, per rank. It needs root or user
  namespaces, and is left out without them.

The adapter's initial values are equal for all systems, except for torchtune's A.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from environments import python_of
from figures import figures
from peer_process import PeerProcess
from systems import SYSTEMS
from table import exception_line, render_tables

HERE = Path(__file__).resolve().parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, help="folder of the model, in 4 or 16 bit")
    parser.add_argument("--data", type=Path, help="JSONL of conversations")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=[n for n, s in SYSTEMS.items() if s.default])
    parser.add_argument("--ranks", type=int, nargs="+", choices=[1, 2], default=[1, 2])
    parser.add_argument("--rows", type=int, default=2, help="rows of a step over all ranks")
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each kind")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2, help="threads of all ranks together")
    parser.add_argument("--json", type=Path, help="file for figures, losses, errors and versions")
    parser.add_argument("--show", type=Path, help="print the table of a file written by --json, and exit")
    args = parser.parse_args()
    if args.show:
        print(render_tables(json.loads(args.show.read_text())))
        return 0
    if args.base is None or args.data is None:
        parser.error("--base and --data are needed, or --show")
    if args.rows % max(args.ranks):
        parser.error(f"--rows {args.rows} is not divided by {max(args.ranks)} ranks")
    from workload import write_material  # late, because importing torch takes seconds

    from qlora_dist.runtime.system import machine_info

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = str(quantize_base(args.base, folder))
        each = args.steps + 1
        args.material = folder / "material"
        write_material(args.material, base, str(args.data), args.rows, args.seq_len, each, each)
        steps = json.loads((args.material / "steps.json").read_text())
        settings = {key: getattr(args, key) for key in ("rows", "seq_len", "steps", "repeats", "threads")}
        settings |= {"base": args.base.name, "machine": machine_info("cpu")}
        runs: list[dict[str, Any]] = []
        for run in measure(args, base, folder, len(steps)):
            runs.append(run)
            tree = {"settings": settings, "systems": figures(runs, steps, args.steps), "runs": runs}
            if args.json:  # after each run, so that an interruption loses nothing
                args.json.write_text(json.dumps(tree, indent=1) + "\n")
    print(render_tables(tree))
    return 0


def quantize_base(base: Path, folder: Path) -> Path:
    """Return the folder itself if it is quantized, else a quantized copy."""
    if "quantization_config" in json.loads((base / "config.json").read_text()):
        return base
    from qlora_dist.model.quantize_folder import quantize_folder
    from qlora_dist.model.quantize_plan import QuantizeOptions

    quantize_folder(base, folder / "nf4", QuantizeOptions())
    return folder / "nf4"


def measure(args: argparse.Namespace, base: str, folder: Path, steps: int) -> Iterator[dict[str, Any]]:
    """Yield a run of each system on each number of ranks in each repeat. A failed system is not tried again."""
    failed: set[tuple[str, int]] = set()
    for repeat in range(args.repeats):
        for ranks in sorted(args.ranks):
            names = [name for name in args.systems if ranks in SYSTEMS[name].ranks and (name, ranks) not in failed]
            for run in side_by_side(names, ranks, args, base, folder / f"{repeat}-{ranks}", steps):
                if run["error"]:
                    failed.add((run["system"], ranks))
                yield run | {"ranks": ranks, "repeat": repeat}


def side_by_side(
    names: list[str], ranks: int, args: argparse.Namespace, base: str, folder: Path, steps: int
) -> list[dict[str, Any]]:
    """Load the systems one after another, train in turns, and return each system's marks, error and seconds."""
    namespace = network_namespace_prefix()
    running: dict[str, PeerProcess] = {}
    runs = []
    try:
        for name in names:
            log(f"{name}, {ranks} ranks: loads")
            try:
                command, variables = peer_command(name, ranks, len(running), args, base)
            except RuntimeError as error:  # its environment cannot be made
                failed = {"system": name, "marks": [], "seconds": 0.0, "cpu_s": 0.0, "namespace": False}
                runs.append(failed | {"error": str(error)})
                continue
            variables["PEERS_MATERIAL"] = str(args.material)
            running[name] = PeerProcess([*namespace, *command], ranks, folder / name.replace(" ", "-"), variables)
        for step in range(steps):
            log(f"{ranks} ranks: step {step + 1} of {steps}")
            for system in running.values():
                if system.code is None:
                    system.turn()
    finally:
        for system in running.values():
            system.end()
    for name, system in running.items():
        error = system.error()
        if error:
            log(f"{name}, {ranks} ranks: {exception_line(error)}")
        run = {"system": name, "marks": system.marks(), "seconds": system.seconds, "cpu_s": system.cpu_s}
        runs.append(run | {"error": error, "namespace": bool(namespace)})
    return runs


def peer_command(
    name: str, ranks: int, index: int, args: argparse.Namespace, base: str
) -> tuple[list[str], dict[str, str]]:
    """Return the command that starts all ranks of a system, and its environment variables.

    Raises:
        RuntimeError: the system's virtual environment cannot be made.
    """
    system = SYSTEMS[name]
    command = [str(python_of(system.requirements)) if system.requirements else sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--nnodes", "1", "--nproc-per-node", str(ranks)]
        command += ["--master-addr", "127.0.0.1", "--master-port", str(29417 + index)]
    command += [str(HERE / system.script), "--base", str(args.base) if system.quantizes else base, *system.arguments]
    if system.requirements is None:
        command += ["--data", str(args.data), "--rows", str(args.rows), "--seq-len", str(args.seq_len)]
    variables = {
        "OMP_NUM_THREADS": str(max(1, args.threads // ranks)),
        "GLOO_SOCKET_IFNAME": "lo",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": f"{HERE.parents[1]}:{HERE}" if system.requirements is None else str(HERE),
    } | dict(system.environment)
    return command, variables


def log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def network_namespace_prefix() -> list[str]:
    """Return the prefix that gives a command a separate loopback; empty where that is not allowed."""
    up = ["sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    for unshare in (["unshare", "-n"], ["unshare", "-rn"]):
        if shutil.which("unshare") and not subprocess.run([*unshare, *up, "true"], capture_output=True).returncode:
            return [*unshare, *up]
    return []


if __name__ == "__main__":
    sys.exit(main())
