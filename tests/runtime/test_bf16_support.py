"""If this fails, a run is silently ten times slower than necessary on an older processor or GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qlora_dist.runtime import process_group

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
ROME = "processor\t: 0\nmodel name\t: AMD EPYC 7742\nflags\t\t: fpu vme sse4_2 avx avx2 f16c fma sha_ni\n"
SAPPHIRE_RAPIDS = "processor\t: 0\nflags\t\t: fpu avx2 avx512f avx512_bf16 amx_bf16 amx_tile amx_int8\n"
GENOA = "processor\t: 0\nflags\t\t: fpu avx2 avx512f avx512_bf16 avx512_vnni\n"
GRAVITON_2 = "processor\t: 0\nFeatures\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp\n"
GRAVITON_3 = GRAVITON_2.replace("asimdhp", "asimdhp svebf16 i8mm bf16")


@pytest.mark.parametrize(
    ("cpuinfo", "is_slow"),
    [(ROME, True), (SAPPHIRE_RAPIDS, False), (GENOA, False), (GRAVITON_2, True), (GRAVITON_3, False), ("", False)],
)
def test_processors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, cpuinfo: str, is_slow: bool) -> None:
    (tmp_path / "cpuinfo").write_text(cpuinfo)
    monkeypatch.setattr(process_group, "_CPUINFO", tmp_path / "cpuinfo")
    warning = process_group.bf16_warning(CPU)
    assert (warning is not None) == is_slow
    assert warning is None or warning.endswith("set model.compute_dtype=fp32")


def test_a_system_without_cpuinfo_gives_no_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_group, "_CPUINFO", tmp_path / "none")
    assert process_group.bf16_warning(CPU) is None


@pytest.mark.parametrize(("capability", "is_slow"), [((7, 5), True), ((8, 0), False), ((9, 0), False)])
def test_gpus(monkeypatch: pytest.MonkeyPatch, *, capability: tuple[int, int], is_slow: bool) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    warning = process_group.bf16_warning(GPU)
    assert (warning is not None) == is_slow
    assert warning is None or (
        "Tesla T4 (compute capability 7.5" in warning and "set model.compute_dtype=fp16" in warning
    )
