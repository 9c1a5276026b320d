"""If this fails, a data set's name ends in a traceback or in minutes of waiting, or its rows are not read.

The tests run a server with one data set, which implements the part of the hub's protocol that `datasets` needs.
"""

from __future__ import annotations

import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from qlora_dist.data.hub import is_hub_dataset_name

SHA = "0" * 39 + "1"
API = "/api/datasets/owner"
ROWS = b'{"text": "a"}\n{"text": ""}\n{"text": "c"}\n'


class Hub(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    data_sets: ClassVar[dict[str, dict[str, bytes]]] = {
        "name": {"train.jsonl": ROWS, "test.jsonl": b'{"text": "test"}\n'},
        "script": {"script.py": b"raise SystemExit('the data set\\'s own code ran')", "train.jsonl": ROWS},
        "empty": {},
    }

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        for name, files in self.data_sets.items():
            if path in (f"{API}/{name}", f"{API}/{name}/revision/{SHA}"):
                siblings = [{"rfilename": file} for file in files]
                return self.answer(json.dumps({"id": f"owner/{name}", "sha": SHA, "siblings": siblings}).encode())
            if path == f"{API}/{name}/tree/{SHA}":
                entries = [{"type": "file", "path": f, "size": len(files[f]), "oid": "a" * 40} for f in files]
                return self.answer(json.dumps(entries).encode())
            file = path.removeprefix(f"/datasets/owner/{name}/resolve/{SHA}/")
            if file in files:
                return self.answer(files[file], ETag=f'"{file}"', X_Repo_Commit=SHA, Accept_Ranges="bytes")
            if path.startswith((f"{API}/{name}/", f"/datasets/owner/{name}/")):
                return self.answer(b"{}", 404, X_Error_Code="EntryNotFound")
        return self.answer(b"{}", 404, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET

    def answer(self, body: bytes, code: int = 200, **headers: str) -> None:
        if "Range" in self.headers and code == 200:
            first, last = self.headers["Range"].removeprefix("bytes=").split("-")
            headers["Content_Range"] = f"bytes {first}-{min(int(last), len(body) - 1)}/{len(body)}"
            body, code = body[int(first) : int(last) + 1], 206
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


READ = """
import json, sys, dataclasses
from qlora_dist.config.sections import SourceConfig
from qlora_dist.data.source import read_source_rows
from qlora_dist.errors import UserError
for source in json.loads(sys.argv[1]):
    try:
        result = [dataclasses.asdict(row) for row in read_source_rows(SourceConfig(**source))]
    except UserError as error:
        result = str(error)
    print(json.dumps(result))
"""


def read(home: Path, sources: list[dict[str, str]], **environ: str) -> list[Any]:
    """Return rows or refusal of each source, in a new process that has this hub in its environment."""
    result = subprocess.run(
        [sys.executable, "-c", READ, json.dumps(sources)],
        env={name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        | {"HF_HOME": str(home), "PYTHONPATH": str(Path(__file__).parents[2]), "no_proxy": "127.0.0.1"}
        | environ,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.slow
def test_rows_from_the_hub(hub, tmp_path, refusal):
    name = {"path": "owner/name"}
    rows, test, *mistakes = read(
        tmp_path,
        [
            name,
            name | {"split": "test"},
            name | {"split": "dev"},
            name | {"subset": "other"},
            {"path": "owner/script"},
            {"path": "owner/empty"},
            {"path": "owner/nothing"},
        ],
        HF_ENDPOINT=hub,
    )
    assert rows == [
        {"location": "owner/name, row 1", "text": "a"},
        {"location": "owner/name, row 2", "reason": "`text` is empty; fill it or take the row out"},
        {"location": "owner/name, row 3", "text": "c"},
    ]
    assert test == [{"location": "owner/name, row 1", "text": "test"}]
    for mistake, (start, hint) in zip(
        mistakes,
        [
            ("owner/name: cannot be read from the Hugging Face hub with split: dev (", "Available splits: ['train'"),
            ("owner/name: cannot be read from the Hugging Face hub with split: train, subset: other (", "'other'"),
            ("owner/script: cannot be read from the Hugging Face hub with split: train (", "scripts are no longer"),
            ("owner/empty: cannot be read from the Hugging Face hub with split: train (", "; correct that, or downl"),
            ("owner/nothing: no such file or folder here, and no such data set on the Hugging Face hub; ", "log in"),
        ],
        strict=True,
    ):
        message = refusal(UserWarning(mistake))
        assert message.startswith(start)
        assert hint in message
    assert not list(tmp_path.rglob("*.arrow")), "no files are kept"


@pytest.mark.parametrize("environ", [{"HF_ENDPOINT": "http://127.0.0.1:9"}, {"HF_HUB_OFFLINE": "1"}])
def test_a_hub_that_cannot_be_reached(tmp_path, refusal, environ):
    """`datasets` alone would retry for half a minute."""
    (mistake,) = read(tmp_path, [{"path": "owner/name"}], **environ)
    assert refusal(UserWarning(mistake)).startswith(
        "owner/name: no such file or folder here, and the Hugging Face hub cannot be reached ("
    )


@pytest.mark.parametrize(
    ("name", "possible"),
    [
        ("name", True), ("owner/name", True), ("my-org/data_set.v2", True),
        ("a/b/c", False), ("/a", False), ("./a", False), ("../a", False), ("a/", False), ("a b", False), ("", False),
        ("C:\\data", False), ("ä/b", False), ("a/.b", False),
    ],
)  # fmt: skip
def test_names_of_data_sets(name, possible):
    assert is_hub_dataset_name(name) == possible


PREPARE = """
import io, json, multiprocessing, sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from rich.console import Console
from qlora_dist.config.sections import DataConfig
from qlora_dist.data.prepare_datasets import prepare_datasets
from qlora_dist.data.tokenizer import load_tokenizer
from qlora_dist.errors import UserError

tokenizer, cache = sys.argv[1:]

def rank(split):
    tree = {"train": [{"path": "owner/name", "split": split}], "cache": cache, "on_bad_row": "skip"}
    output = io.StringIO()
    try:
        (source,), _ = prepare_datasets(
            DataConfig.model_validate(tree), load_tokenizer(Path(tokenizer)), Console(file=output, width=1000)
        )
        return [*output.getvalue().splitlines(), source.stats.rows]
    except UserError as error:
        return [str(error)]

for splits in sys.stdin:
    with ProcessPoolExecutor(2, multiprocessing.get_context("fork")) as pool:
        print(json.dumps(list(pool.map(rank, splits.split()))), flush=True)
"""


class Counting(Hub):
    requested_paths: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.requested_paths.append(self.path.split("?")[0])
        super().do_GET()

    do_HEAD = do_GET


@pytest.mark.slow
def test_prepared_with_a_network_and_used_without(make_tokenizer, tmp_path):
    """Data are prepared on a login node and used on compute nodes. The ranks of a start make one request together."""
    make_tokenizer("none").save_pretrained(tmp_path / "tokenizer")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Counting)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    own = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    own |= {"HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(Path(__file__).parents[2]), "no_proxy": "127.0.0.1"}
    with subprocess.Popen(
        [sys.executable, "-c", PREPARE, str(tmp_path / "tokenizer"), str(tmp_path / "cache")],
        env=own | {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:

        def ranks(*splits: str) -> list[list[Any]]:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(" ".join(splits) + "\n")
            process.stdin.flush()
            result: list[list[Any]] = json.loads(process.stdout.readline())
            return result

        assert [output[-1] for output in ranks("train", "train")] == [3, 3]
        times = [path for path in Counting.requested_paths if path == f"{API}/name"]
        assert len(times) <= 2, "one request, however many ranks; or two, if a minute ends in between"
        (memory,) = (tmp_path / "cache" / "hub").glob("*.json")
        assert json.loads(memory.read_text()) == {"name": "owner/name", "revision": SHA}

        server.shutdown()
        server.server_close()
        for answer in memory.parent.glob("*-*"):  # This simulates that the minute is over.
            shutil.rmtree(answer) if answer.is_dir() else answer.unlink()
        (line, rows), (refused,) = ranks("train", "test")
        process.stdin.close()
    assert rows == 3
    assert line.startswith("owner/name: the Hugging Face hub cannot be reached (")
    assert line.endswith("the rows of revision 000000000000 are used, which were prepared before")
    assert "cannot be reached (" in refused and "; correct the path, or run qlora-dist preprocess with this" in refused
