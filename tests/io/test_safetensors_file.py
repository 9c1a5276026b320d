"""If this fails, weights are read from the wrong place, or an incomplete file looks complete."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_dist.errors import UserError
from qlora_dist.io.safetensors_file import (
    SAFETENSORS_DTYPES,
    SafetensorsReader,
    SafetensorsWriter,
    read_safetensors_header,
)

TENSORS = {
    "a.weight": torch.arange(60, dtype=torch.float32).view(3, 4, 5),
    "b": torch.linspace(-3, 3, 77).bfloat16(),
    "half": torch.linspace(-3, 3, 5).half(),
    "empty": torch.empty(0, 7),
    "scalar": torch.tensor(4.5),
    "bytes": torch.arange(256, dtype=torch.uint8),
    "flags": torch.tensor([True, False, True]),
    "int": torch.tensor([2**40, -1]),
    "ünïcode": torch.ones(2),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(TENSORS, path)
    return path


def write(path: Path, tensors: dict[str, torch.Tensor], order: list[str] | None = None) -> None:
    writer = SafetensorsWriter(path, [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()])
    for name in order or tensors:
        writer.write(name, tensors[name])
    writer.close()


def assert_same(tensors: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name])


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.flatten().view(torch.uint8)


def test_whole_tensors_equal_the_librarys(file):
    header = read_safetensors_header(file)
    with SafetensorsReader() as reader:
        assert_same({name: reader.read(entry) for name, entry in header.items()}, TENSORS)
        assert reader.bytes_read == sum(tensor.nbytes for tensor in TENSORS.values())


@settings(deadline=None)
@given(dtype=st.sampled_from([torch.uint8, torch.bfloat16, torch.float32]), numel=st.integers(1, 300), data=st.data())
def test_a_range_is_a_slice_of_the_bytes(dtype, numel, data):
    tensors = {"before": torch.ones(3), "x": torch.randn(numel).mul(100).to(dtype), "after": torch.ones(3)}
    start = data.draw(st.integers(0, tensors["x"].nbytes))
    stop = data.draw(st.integers(start, tensors["x"].nbytes))
    with tempfile.TemporaryDirectory() as folder, SafetensorsReader() as reader:
        path = Path(folder) / "x.safetensors"
        safetensors.torch.save_file(tensors, path)
        out = torch.full((stop - start,), 7, dtype=torch.uint8)
        reader.read_into(out, read_safetensors_header(path)["x"], start)
        assert torch.equal(out, as_bytes(tensors["x"])[start:stop])
        assert reader.bytes_read == stop - start


def test_a_range_is_read_into_memory_of_any_type(file):
    out = torch.zeros(10, dtype=torch.bfloat16)
    with SafetensorsReader() as reader:
        reader.read_into(out[2:6], read_safetensors_header(file)["b"], start=2 * 30)
    assert torch.equal(out[2:6], TENSORS["b"][30:34])
    assert not out[:2].any()
    assert not out[6:].any()


def test_the_library_reads_what_the_writer_wrote(tmp_path):
    path = tmp_path / "out.safetensors"
    write(path, TENSORS, order=sorted(TENSORS, reverse=True))
    assert_same(safetensors.torch.load_file(path), TENSORS)
    with safetensors.safe_open(path, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}, "transformers refuses a file without it"


@settings(deadline=None, max_examples=40)
@given(
    st.dictionaries(
        st.text(min_size=1), st.tuples(st.sampled_from(list(SAFETENSORS_DTYPES.values())), st.integers(0, 9))
    )
)
def test_any_names_types_and_sizes_are_written_and_read_back(specs):
    specs.pop("__metadata__", None)
    tensors = {name: torch.arange(numel).to(dtype) for name, (dtype, numel) in specs.items()}
    with tempfile.TemporaryDirectory() as folder, SafetensorsReader() as reader:
        path = Path(folder) / "x.safetensors"
        write(path, tensors)
        assert_same({name: reader.read(entry) for name, entry in read_safetensors_header(path).items()}, tensors)


def test_the_file_has_its_name_only_when_it_is_complete(tmp_path):
    path = tmp_path / "out.safetensors"
    writer = SafetensorsWriter(path, [("x", torch.float32, (2,)), ("y", torch.float32, (2,))])
    writer.write("x", torch.ones(2))
    assert [p.name for p in tmp_path.iterdir()] == ["out.safetensors.partial"]
    with pytest.raises(AssertionError, match=r"never written.*y"):
        writer.close()
    assert not path.exists()
    writer.write("y", torch.ones(2))
    writer.close()
    assert [p.name for p in tmp_path.iterdir()] == ["out.safetensors"]


def test_a_tensor_is_written_in_parts(tmp_path):
    path = tmp_path / "out.safetensors"
    x = torch.arange(10, dtype=torch.int16)
    writer = SafetensorsWriter(path, [("x", torch.int16, (2, 5))])
    writer.write("x", x[6:].view(torch.uint8), 12)
    with pytest.raises(AssertionError, match=r"not as a whole.*x"):
        writer.close()
    with pytest.raises(AssertionError, match="x: 12 bytes from 10 on for 20"):
        writer.write("x", x[:6], 10)
    writer.write("x", x[:6])
    writer.close()
    assert torch.equal(safetensors.torch.load_file(path)["x"], x.view(2, 5))


def damage_header(path: Path, **changes: object) -> None:
    """Change an entry of the header and keep the data."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header["b"] |= changes
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


DAMAGES = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "three bytes": lambda path: path.write_bytes(b"\x01\x02\x03"),
    "no data": lambda path: path.write_bytes(path.read_bytes()[:400]),
    "last byte lost": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "a pickle": lambda path: path.write_bytes(b"\x80\x02}q\x00." * 100),
    "a pointer of git lfs": lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
    "a web page": lambda path: path.write_text("<!DOCTYPE html><html>not found</html>" * 10),
    "a list": lambda path: path.write_bytes((6).to_bytes(8, "little") + b"[1, 2]"),
    "no JSON": lambda path: path.write_bytes((6).to_bytes(8, "little") + b"{{{{{{"),
    "not UTF-8": lambda path: path.write_bytes((6).to_bytes(8, "little") + b"\xff\xfe\xff\xfe\xff\xfe"),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a type from the future": lambda path: damage_header(path, dtype="F3"),
    "offsets as text": lambda path: damage_header(path, data_offsets=["0", "154"]),
    "one offset": lambda path: damage_header(path, data_offsets=[0]),
    "more shape than bytes": lambda path: damage_header(path, shape=[78]),
    "bytes before the data": lambda path: damage_header(path, data_offsets=[-154, 0]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_refused_in_a_sentence_that_names_it(file, damage):
    DAMAGES[damage](file)
    with pytest.raises(UserError) as caught:
        read_safetensors_header(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert "\n" not in str(caught.value)


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_no_file_causes_a_traceback(content):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        for prefix in (b"", (len(content) // 2).to_bytes(8, "little")):
            path.write_bytes(prefix + content)
            try:
                entries = read_safetensors_header(path)
            except UserError as error:
                assert str(path) in str(error)
            else:
                assert all(entry.stop <= path.stat().st_size for entry in entries.values())


def test_a_file_that_shrinks_while_it_is_read_is_refused(file):
    entry = read_safetensors_header(file)["a.weight"]
    file.write_bytes(file.read_bytes()[: entry.start + 3])
    with SafetensorsReader() as reader, pytest.raises(UserError, match="became shorter"):
        reader.read(entry)
