"""If this fails, a rank can hold the whole model, or its scales, unnoticed until a GPU runs out of memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from qlora_dist.config.config_file import load_config
from qlora_dist.config.schema import Config
from qlora_dist.io import read_ahead
from qlora_dist.model import shard_reader
from qlora_dist.model.model_folder import ModelFolder
from qlora_dist.parallel.loaded_model import load_model, shard_model
from qlora_dist.parallel.static_bytes import check_static_bytes, model_static_bytes
from qlora_dist.runtime.environment import read_rank_info
from qlora_dist.runtime.process_group import process_group
from qlora_dist.shard_view import local_tensor_and_offset
from qlora_dist.train.run_setup import set_up_run
from tests.helpers import tiny_models
from tests.helpers.ranks import run_ranks


@pytest.fixture(scope="module")
def config_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.make_large_config(tmp_path_factory.mktemp("static"))


def load(config: Config, tamper: str = "") -> dict[str, int | str]:
    """Load on this rank, then add memory that the check must notice."""
    ranks = read_rank_info()
    setup = set_up_run(config, ranks)
    whole = {True: 0, False: 0}
    for parameter in setup.model.parameters():
        whole[parameter.requires_grad] += parameter.nbytes
    with process_group(ranks, torch.device("cpu")):
        loaded = load_model(shard_model(setup.model, config, ranks, setup.device), setup.folder)
        layer = setup.model.model.layers[0]
        if tamper == "keeps a gathered layer":
            layer.unshard()
            layer.mlp.kept = layer.mlp.gate_proj.get_base_layer().packed.detach().clone()
            layer.reshard()
        elif tamper == "hides scales in an attribute":
            layer.scales = torch.zeros(50_000)
        elif tamper == "a shard is a view of the whole":
            packed = layer.mlp.gate_proj.get_base_layer().packed
            local = packed.to_local()
            whole_buffer = torch.zeros(packed.numel(), dtype=torch.uint8)
            packed._local_tensor = whole_buffer[: local.numel()]
        try:
            held: int | str = check_static_bytes(setup.model, setup.sizes)
        except RuntimeError as error:
            held = str(error)
        return {
            "held": held,
            "counted": model_static_bytes(setup.model),
            "base": whole[False],
            "adapters": whole[True],
            "read": loaded.read_bytes,
        }


@pytest.mark.parametrize(
    ("world_size", "nodes", "base", "adapter", "base_shards", "adapter_shards"),
    [(1, 1, "world", "world", 1, 1), (2, 1, "world", "world", 2, 2), (3, 1, "world", "world", 3, 3),
     (4, 2, "node", "world", 2, 4), (4, 2, "node", "node", 2, 2), (4, 1, "replicate", "world", 1, 4)],
)  # fmt: skip
def test_a_rank_holds_its_share_within_one_per_cent(
    world_size: int, nodes: int, base: str, adapter: str, base_shards: int, adapter_shards: int, config_path: Path
) -> None:
    config = load_config(config_path, [f"parallel.base={base}", f"parallel.adapter={adapter}", "lora.r=16"])
    for result in run_ranks(world_size, load, config, nodes=nodes):
        share = result["base"] / base_shards + result["adapters"] / adapter_shards
        assert result["held"] == pytest.approx(share, rel=0.01)
        assert result["held"] == result["counted"]


@pytest.mark.parametrize(
    "tamper", ["keeps a gathered layer", "hides scales in an attribute", "a shard is a view of the whole"]
)
def test_replication_is_an_error(tamper: str, config_path: Path) -> None:
    config = load_config(config_path, ["parallel.base=world"])
    for result in run_ranks(2, load, config, tamper):
        assert "holds" in str(result["held"]) and "share" in str(result["held"])


def load_paged(config: Config, tamper: str = "") -> tuple[int | str, int, int]:
    """Load with pages. Return all held bytes, the bytes of pages, and all others. `tamper` keeps a paged layer."""
    ranks = read_rank_info()
    setup = set_up_run(config, ranks)
    with process_group(ranks, torch.device("cpu")):
        loaded = load_model(shard_model(setup.model, config, ranks, setup.device), setup.folder)
        layers, pages = list(setup.model.model.layers), loaded.paged_layers
        assert pages is not None
        rest = model_static_bytes(setup.model)
        if tamper:
            layers[0].unshard()
            layers[1].mlp.kept = layers[0].mlp.gate_proj.get_base_layer().packed.detach().clone()
            layers[0].reshard()
        try:
            held: int | str = check_static_bytes(setup.model, setup.sizes, pages.held_bytes, pages.budget)
        except RuntimeError as error:
            held = str(error)
        pages.close()
        return held, pages.held_bytes, rest


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_rank_holds_the_budget_of_paged_layers(world_size: int, config_path: Path) -> None:
    config = load_config(config_path, ["parallel.base=paged", "parallel.resident_bytes=0"])
    everything = [result["held"] for result in run_ranks(world_size, load, load_config(config_path, []))]
    for (held, in_pages, rest), whole in zip(run_ranks(world_size, load_paged, config), everything, strict=True):
        assert held == in_pages + rest
        # two of four layers are held, and everything else as before
        assert int(whole) - int(held) == pytest.approx(in_pages, rel=0.01)


def test_replication_of_paged_layers_is_an_error(config_path: Path) -> None:
    config = load_config(config_path, ["parallel.base=paged", "parallel.resident_bytes=0"])
    for held, _, _ in run_ranks(2, load_paged, config, "keeps a gathered layer"):
        assert "holds" in str(held) and "share" in str(held)


@pytest.mark.parametrize("base", ["world", "node", "replicate"])
def test_all_ranks_together_read_a_4_bit_folder_once(base: str, config_path: Path) -> None:
    config = load_config(config_path, [f"parallel.base={base}"])
    folder = ModelFolder(config.model.base)
    everything = sum(p.stat().st_size for p in folder.path.glob("*.safetensors"))
    results = run_ranks(4, load, config, nodes=2)
    for result in results:
        # includes rounding to whole rows and bytes, not code tables and JSON of each weight, which are read before
        assert int(result["read"]) <= 1.05 * result["base"] / 4
    assert 0.9 * results[0]["base"] < sum(int(r["read"]) for r in results) < everything


def collect_shards(config: Config) -> dict[str, tuple[int, bytes]]:
    ranks = read_rank_info()
    setup = set_up_run(config, ranks)
    with process_group(ranks, torch.device("cpu")):
        load_model(shard_model(setup.model, config, ranks, setup.device), setup.folder)
        shards = {}
        for name, parameter in setup.model.named_parameters():
            if not parameter.requires_grad:
                local, offset = local_tensor_and_offset(parameter)
                shards[name] = (offset[0], local.contiguous().view(torch.uint8).numpy().tobytes())
        return shards


@pytest.mark.slow
@pytest.mark.parametrize("piece_bytes", [read_ahead.READ_CHUNK_BYTES, 2**14])
def test_all_ways_of_loading_give_the_same_parameters(
    piece_bytes: int, config_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights quantized while loading, read by range, or exchanged by replicas are equal."""
    monkeypatch.setattr(shard_reader, "_EXCHANGED_BYTES", min(piece_bytes, 2000))
    monkeypatch.setattr(read_ahead, "READ_CHUNK_BYTES", piece_bytes)  # a tensor has up to 36 of the small chunks
    nf4 = load_config(config_path, ["parallel.base=world"])
    source = load_config(config_path, ["parallel.base=world", f"model.base={config_path.parent / 'source'}"])
    two_copies = load_config(config_path, ["parallel.base=node"])
    layouts = [run_ranks(3, collect_shards, config) for config in (nf4, source)] + [run_ranks(1, collect_shards, nf4)]
    first_copy, second_copy = (run_ranks(4, collect_shards, two_copies, nodes=2)[i : i + 2] for i in (0, 2))
    for name in layouts[0][0]:
        whole = {b"".join(shards[name][1] for shards in ranks) for ranks in (*layouts, first_copy, second_copy)}
        assert len(whole) == 1


def offsets(config: Config) -> list[tuple[str, tuple[int, ...], tuple[int, ...], int]]:
    """Return the start of this rank's part of each parameter: by `local_tensor_and_offset`, and by torch."""
    ranks = read_rank_info()
    setup = set_up_run(config, ranks)
    with process_group(ranks, torch.device("cpu")):
        shard_model(setup.model, config, ranks, setup.device)
        starts = []
        for name, parameter in setup.model.named_parameters():
            local, offset = local_tensor_and_offset(parameter)
            _, expected = compute_local_shape_and_global_offset(
                parameter.shape, parameter.device_mesh, parameter.placements
            )
            starts.append((name, offset, tuple(expected), local.numel()))
        return starts


@pytest.mark.parametrize(("base", "adapter"), [("world", "world"), ("node", "world"), ("node", "node")])
def test_a_shard_starts_where_torch_computes(base: str, adapter: str, config_path: Path) -> None:
    """Rows that the ranks do not divide leave the last rank fewer rows, or none."""
    config = load_config(config_path, [f"parallel.base={base}", f"parallel.adapter={adapter}", "lora.r=5"])
    starts = set()
    for result in run_ranks(6, offsets, config, nodes=2):
        for name, offset, expected, numel in result:
            assert offset == expected or numel == 0, name
            starts.add(offset)
    assert len(starts) > 6
