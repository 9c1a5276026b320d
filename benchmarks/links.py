"""Compare full sharding with a base that stays in its node, on two nodes with a link of adjustable speed.

    python benchmarks/links.py [--mbit 0 1000 500 200 100 50] [--steps 3] [--layers 4] [--hidden 2048] [--tokens 64]
        [--dir /tmp] [--json FILE] [--plot FILE.png]

It needs root, ip and tc. Each of the two nodes is a network namespace with a torchrun of two ranks. The link is a pair
of veth devices with a token bucket at each end (0 means no limit). Each layout is one run of `qlora-dist train` on a
folder of random codes with Llama's layers. The link's speed changes during the run, after each --steps steps and one
step that is not timed.

The kernel counts the bytes that a node sends over the link in all steps of a speed. A collective's ring leaves a node
once. So a node should send the bytes that one of its ranks receives in a mesh that crosses nodes (`comm_bytes` of
metrics.jsonl). It sends more because of TCP's headers and the sum of gradients: gloo's reduce-scatter is an all-reduce,
which sends twice as much.

The plan's figures come from `qlora-dist plan --calibrate` on the same four ranks without a limit, and from the link's
speed. Losses of both runs must agree to 1e-3, because bf16 sums depend on their order.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from base_paging import write_base
from rich.console import Console
from rich.table import Table

from qlora_dist.config.schema import Config
from qlora_dist.plan.calibration_file import calibrated_speeds, load_calibration
from qlora_dist.plan.memory_estimate import estimate_memory
from qlora_dist.plan.run_spec import make_run_spec
from qlora_dist.plan.step_time import estimate_step_time

LAYOUTS = {"full sharding": "world", "two meshes": "node"}
"""Values of `parallel.base` by layout. Both shard adapters over all ranks."""
NODES, RANKS_PER_NODE = 2, 2
ADDRESS = "10.93.8."


def ip(*args: str) -> None:
    subprocess.run(["ip", *args], check=True, capture_output=True)


class Link:
    """A link between two nodes."""

    def __init__(self, names: tuple[str, str]) -> None:
        self.names = names

    def command_on_node(self, node: int, *command: str) -> list[str]:
        """Return the command line that runs a command on a node."""
        return ["nsenter", f"--net=/run/netns/{self.names[node]}", *command]

    def set_speed(self, mbit: int) -> None:
        """Limit the speed in Mbit/s; 0 removes the limit."""
        for node, name in enumerate(self.names):
            rate = f"tbf rate {mbit}mbit burst 256kb latency 100ms" if mbit else "noqueue"
            command = self.command_on_node(node, *f"tc qdisc replace dev {name} root {rate}".split())
            subprocess.run(command, check=True, capture_output=True)

    def sent_bytes(self) -> int:
        """Return the bytes that node 0 has sent."""
        table = subprocess.check_output(self.command_on_node(0, "cat", "/proc/net/dev"), text=True)
        (line,) = (line for line in table.splitlines() if self.names[0] in line)
        return int(line.partition(":")[2].split()[8])


@contextmanager
def two_nodes() -> Iterator[Link]:
    names = (f"ql{os.getpid() % 100000}a", f"ql{os.getpid() % 100000}b")
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", names[0], "netns", names[0], "type", "veth", "peer", "name", names[1], "netns", names[1])
        for index, name in enumerate(names):
            ip("-n", name, "addr", "add", f"{ADDRESS}{index + 1}/24", "dev", name)
            for device in ("lo", name):
                ip("-n", name, "link", "set", device, "up")
        yield Link(names)
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def start(link: Link, folder: Path, *command: str) -> list[subprocess.Popen[bytes]]:
    """Start torchrun on each node."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(NODES), "--nproc-per-node"]
    torchrun += [str(RANKS_PER_NODE), "--master-addr", f"{ADDRESS}1", "--master-port", "29400", "--node-rank"]
    started = []
    for node, name in enumerate(link.names):
        with (folder / f"node{node}.txt").open("ab") as output:
            environ = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": name}
            line = link.command_on_node(node, *torchrun, str(node), "-m", "qlora_dist", *command)
            started.append(subprocess.Popen(line, stdout=output, stderr=output, env=environ))
    return started


def are_running(processes: list[subprocess.Popen[bytes]], folder: Path) -> bool:
    """Return whether a process still runs; if one has failed, exit with the output of all."""
    codes = [process.poll() for process in processes]
    if any(codes):
        for process in processes:
            process.kill()
        raise SystemExit("".join((folder / f"node{node}.txt").read_text() for node in range(NODES)))
    return None in codes


def configuration(folder: Path, args: argparse.Namespace, layout: str) -> Config:
    return Config.model_validate(
        {
            "model": {"base": str(folder / "model")},
            "lora": {"r": 8, "alpha": 16, "dropout": 0.0},
            "data": {"train": [str(folder / "data.jsonl")], "seq_len": args.tokens, "cache": str(folder / "cache")},
            "parallel": {"base": LAYOUTS[layout]},
            "optim": {"lr": 1e-3, "warmup_steps": 0},
            "train": {
                "steps": (args.steps + 1) * len(args.mbit),
                "global_batch": NODES * RANKS_PER_NODE,
                "save_every": 0,
                "device": "cpu",
            },
            "run": {"dir": str(folder / "runs"), "name": layout.replace(" ", "-"), "report": False},
        }
    )


def measure(link: Link, folder: Path, args: argparse.Namespace, layout: str) -> list[dict[str, Any]]:
    """Train with a layout, and return the figures for each speed of the link."""
    config = configuration(folder, args, layout)
    path = folder / f"{config.run.name}.yaml"
    path.write_text(config.model_dump_json())  # JSON is YAML
    link.set_speed(args.mbit[0])
    processes = start(link, folder, "train", str(path))
    metrics, each, sent, done = folder / "runs" / config.run.name / "metrics.jsonl", args.steps + 1, [], 0
    while are_running(processes, folder):
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        if len(lines) > done:
            done = len(lines)
            if done % each == 1:  # exclude the bytes that loading has sent
                sent.append(link.sent_bytes())
            if done % each == 0 and done // each < len(args.mbit):
                link.set_speed(args.mbit[done // each])
            if done % each == 0:
                sent.append(link.sent_bytes())
        time.sleep(0.005)
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    result = []
    for index, mbit in enumerate(args.mbit):
        timed = rows[index * each + 1 : (index + 1) * each]
        result.append(
            {
                "layout": layout,
                "mbit": mbit,
                "step_s": statistics.median(row["step_s"] for row in timed),
                "tokens_per_s": statistics.median(row["tokens_per_s"] for row in timed),
                "sent_bytes": (sent[2 * index + 1] - sent[2 * index]) / args.steps,
                "comm_bytes": timed[0]["comm_bytes"],
                "losses": [row["loss"] for row in rows[index * each : (index + 1) * each]],
            }
        )
    return result


def planned_tokens_per_s(folder: Path, args: argparse.Namespace, layout: str, mbit: int) -> float:
    """Return the tokens per second by the plan, with the machine's calibrated speeds."""
    model = json.loads((folder / "model" / "config.json").read_text())
    run = make_run_spec(configuration(folder, args, layout), model, NODES * RANKS_PER_NODE, NODES, "cpu")
    speeds = calibrated_speeds(load_calibration(folder / "speeds.json").devices["cpu"])
    if mbit:
        speeds = replace(speeds, inter_node_bytes_per_s=min(speeds.inter_node_bytes_per_s, 1e6 * mbit / 8))
    return estimate_step_time(run, estimate_memory(run), speeds).tokens_per_s


def inter_node_bytes(row: dict[str, Any]) -> int:
    """Return the counted bytes of a step that cross nodes, which are the bytes of the mesh over all ranks."""
    return row["comm_bytes"].get("world", 0)


def print_rows(rows: list[dict[str, Any]], console: Console) -> None:
    table = Table(title="two nodes of two ranks", title_justify="left")
    for head in (
        "Mbit/s",
        "layout",
        "step, s",
        "on the link",
        "tokens/s",
        "plan",
        "sent by a node, MB",
        "counted, MB",
        "times",
    ):
        table.add_column(head, justify="left" if head == "layout" else "right")
    fast = {row["layout"]: row["step_s"] for row in rows if row["mbit"] == 0}
    for row in sorted(rows, key=lambda row: (row["mbit"] == 0, row["mbit"]), reverse=True):
        full = next(r for r in rows if r["mbit"] == row["mbit"] and r["layout"] == "full sharding")
        waiting = 1 - fast[row["layout"]] / row["step_s"] if row["layout"] in fast else 0.0
        table.add_row(
            str(row["mbit"] or "no limit"),
            row["layout"],
            f"{row['step_s']:.2f}",
            f"{100 * max(0.0, waiting):.0f} %",
            f"{row['tokens_per_s']:.1f}",
            f"{row['planned_tokens_per_s']:.1f}",
            f"{row['sent_bytes'] / 1e6:.2f}",
            f"{inter_node_bytes(row) / 1e6:.2f}",
            f"{row['tokens_per_s'] / full['tokens_per_s']:.2f}",
        )
    console.print(table)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    for index, layout in enumerate(LAYOUTS):
        limited = sorted((row for row in rows if row["layout"] == layout and row["mbit"]), key=lambda row: row["mbit"])
        speeds = [row["mbit"] for row in limited]
        axis.plot(speeds, [row["tokens_per_s"] for row in limited], "o-", color=f"C{index}", label=layout)
        label = f"{layout}, by the plan"
        axis.plot(speeds, [row["planned_tokens_per_s"] for row in limited], "--", color=f"C{index}", label=label)
    axis.set(xlabel="link between the nodes, Mbit/s", ylabel="tokens/s", xscale="log", yscale="log")
    axis.legend()
    figure.savefig(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mbit", type=int, nargs="+", default=[0, 1000, 500, 200, 100, 50])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    if os.geteuid() != 0:
        parser.error("network namespaces need root; run this as root, or in a container")
    console = Console(width=120, highlight=False)
    with tempfile.TemporaryDirectory(dir=args.dir) as name, two_nodes() as link:
        folder = Path(name)
        write_base(folder / "model", args)
        line = json.dumps({"text": "a line of text, " * (args.tokens // 16 + 1)})
        (folder / "data.jsonl").write_text(f"{line}\n" * 512)
        calibration = start(link, folder, "plan", "--calibrate", "--calibration", str(folder / "speeds.json"))
        while are_running(calibration, folder):
            time.sleep(0.1)
        rows = []
        for layout in LAYOUTS:
            for row in measure(link, folder, args, layout):
                planned = planned_tokens_per_s(folder, args, layout, row["mbit"])
                rows.append({**row, "planned_tokens_per_s": planned})
    print_rows(rows, console)
    if args.json:
        args.json.write_text(json.dumps({"ranks": [NODES, RANKS_PER_NODE], "rows": rows}, indent=2) + "\n")
    if args.plot:
        plot(rows, args.plot)
    losses = [[loss for row in rows if row["layout"] == layout for loss in row["losses"]] for layout in LAYOUTS]
    worst = max(abs(a / b - 1) for a, b in zip(*losses, strict=True))
    console.print(f"losses differ by {worst:.1e} at most")
    return 0 if worst < 1e-3 else 1


if __name__ == "__main__":
    sys.exit(main())
