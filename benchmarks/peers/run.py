"""The same model, data, batch shape, LoRA and steps through qlora-dist and through the tools that people use.

python benchmarks/peers/run.py --base FOLDER --data my-data.jsonl [--systems ours transformers ...] [--ranks 1 2]
    [--rows 2] [--seq-len 1024] [--steps 3] [--repeats 3] [--json FILE]

FOLDER is in 16 bit and is quantized first, or in 4 bit, as `qlora-dist quantize` makes it, which torchtune refuses.
Each peer runs in a virtual environment of its own with the versions of its file of requirements in this folder; the
first time they are installed, which needs a network and some minutes (1.5 GB each). In each repeat the systems load one
after another and then take turns, a step at a time (peer_process.py). All stay in memory; those that wait need some
0.8 GB a rank. A system that cannot run is told with its own error. All is written in Markdown.

Every run trains one step that is not timed and --steps of full rows, the same for all; then one and --steps of uneven
rows: ours packed, theirs as many conversations, one to a row, padded to the longest (workload.py). One process has
--threads threads, two ranks share them.

tokens/s counts tokens that are not padding, median over the steps of all repeats, by the clock of rank 0 from a step's
begin to its end. A ratio of speeds is the median over steps that followed each other, in brackets least and most.
Peaks are the kernel's VmHWM of a rank: at load beyond what was resident after the imports (mapped files count; from
the second repeat on, if there is one, as first imports are compiled), in training all of it. Static: the storages of
all tensors that are alive after the last step, each once, of the rank with most. Wire: what the loopback of a network
namespace of its own has sent in a full step, over ranks; needs root or user namespaces, and is left out without. The
adapter's first values are the same for all (torchtune's A is its own).
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
    parser.add_argument("--rows", type=int, default=2, help="of a step, over all ranks")
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each kind")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2, help="of all ranks together")
    parser.add_argument("--json", type=Path, help="write figures, losses, errors and versions here")
    parser.add_argument("--show", type=Path, help="only print the table of a file that --json has written")
    args = parser.parse_args()
    if args.show:
        print(render_tables(json.loads(args.show.read_text())))
        return 0
    if args.base is None or args.data is None:
        parser.error("--base and --data are needed, or --show")
    if args.rows % max(args.ranks):
        parser.error(f"--rows {args.rows} is not divided by {max(args.ranks)} ranks")
    from workload import write_material  # behind the arguments: torch takes seconds

    from qlora_dist.runtime.machine_info import machine_info

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
            if args.json:  # each time: what is there is not lost if the rest is interrupted
                args.json.write_text(json.dumps(tree, indent=1) + "\n")
    print(render_tables(tree))
    return 0


def quantize_base(base: Path, folder: Path) -> Path:
    """The folder itself, or a quantized one of it."""
    if "quantization_config" in json.loads((base / "config.json").read_text()):
        return base
    from qlora_dist.model.quantize_folder import quantize_folder
    from qlora_dist.model.quantize_plan import QuantizeOptions

    quantize_folder(base, folder / "nf4", QuantizeOptions())
    return folder / "nf4"


def measure(args: argparse.Namespace, base: str, folder: Path, steps: int) -> Iterator[dict[str, Any]]:
    """A run of each system on each number of ranks in each repeat; what failed is not tried again."""
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
    """Load one after another, train in turns. Of each: its marks, its error or None, its seconds."""
    namespace = network_namespace_prefix()
    running: dict[str, PeerProcess] = {}
    found = []
    try:
        for name in names:
            log(f"{name}, {ranks} ranks: loads")
            try:
                command, variables = peer_command(name, ranks, len(running), args, base)
            except RuntimeError as error:  # its environment cannot be made
                nothing = {"system": name, "marks": [], "seconds": 0.0, "cpu_s": 0.0, "namespace": False}
                found.append(nothing | {"error": str(error)})
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
        told = {"system": name, "marks": system.marks(), "seconds": system.seconds, "cpu_s": system.cpu_s}
        found.append(told | {"error": error, "namespace": bool(namespace)})
    return found


def peer_command(
    name: str, ranks: int, index: int, args: argparse.Namespace, base: str
) -> tuple[list[str], dict[str, str]]:
    """The command that starts all its ranks, and its variables. RuntimeError: its environment cannot be made."""
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
    """What to put before a command so that it has a loopback of its own; nothing where that isn't allowed."""
    up = ["sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    for unshare in (["unshare", "-n"], ["unshare", "-rn"]):
        if shutil.which("unshare") and not subprocess.run([*unshare, *up, "true"], capture_output=True).returncode:
            return [*unshare, *up]
    return []


if __name__ == "__main__":
    sys.exit(main())
