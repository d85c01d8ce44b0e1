"""Shards that lie elsewhere are read as those that lie here, by copies that a limit bounds."""

import shutil
from pathlib import Path

import fsspec
import numpy as np
import pytest
from remote_server import FolderServer, serve_folder
from shard_folders import make_documents, write

import minimind.remote as remote
from data_prep.verify_shards import verify_corpus
from minimind.data.dataset import load_shards
from minimind.data.manifest import ShardError
from minimind.data.shards import ShardReader, open_split
from minimind.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(remote, "RETRY_SECONDS", (0.0, 0.0))
    monkeypatch.setenv("MINIMIND_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def server(tmp_path: Path, tokenizer_file: Path):
    """A corpus of 15 shards of about 100 tokens, and a validation split."""
    for split, seed in (("train", 0), ("val", 1)):
        write(tmp_path / "served/corpus" / split, tokenizer_file, make_documents(60, seed=seed))
    with serve_folder(tmp_path / "served") as found:
        yield found


def copies(cache: Path) -> list[Path]:
    return [path for path in (cache / "files").iterdir() if not path.name.startswith(".")]


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch):
    """A bucket of moto's server, where that is installed (pip install "moto[server]" s3fs: 300 MB)."""
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    server = pytest.importorskip("moto.server", reason="moto is not installed").ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "not-a-secret")
    fsspec.filesystem("s3", skip_instance_cache=True).mkdir("bucket")
    yield "s3://bucket"
    server.stop()


@pytest.mark.parametrize("store", ["http", "memory", "s3"])
def test_they_are_those_that_lie_here(
    server: FolderServer, cache: Path, store: str, request: pytest.FixtureRequest
) -> None:
    here, url = server.folder / "corpus", f"{server.url}/corpus"
    if store != "http":
        url = f"{request.getfixturevalue('s3') if store == 's3' else 'memory://somewhere'}/corpus"
        remote.store_folder(here, url, ("manifest.json",))
    for split in ("train", "val"):
        local, far = open_split(here, split), open_split(Path(url), split)
        assert far.fingerprint == local.fingerprint and far.manifest == local.manifest
        if split == "train":
            assert not (cache / "files").exists(), "nothing is fetched before it is read"
        assert (far.read(0, far.num_tokens) == local.read(0, local.num_tokens)).all()
        starts = local.document_starts(0, local.num_tokens)
        assert (far.document_starts(0, far.num_tokens) == starts).all()
        assert (ShardReader(Path(url) / split).read(5, 300) == local.read(5, 300)).all()
    dataset = load_shards(url, seq_len=16)
    assert (dataset[3].input_ids == load_shards(here, seq_len=16)[3].input_ids).all()
    verify_corpus(Path(url))
    if store == "memory":
        fsspec.filesystem("memory").rm("/somewhere", recursive=True)


def test_the_copies_take_no_more_than_the_limit(
    server: FolderServer, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MINIMIND_CACHE_SIZE", "2000")
    local, far = open_split(server.folder / "corpus", "train"), open_split(Path(f"{server.url}/corpus"), "train")
    assert "more than the cache of 2.0 KiB" in capsys.readouterr().err
    (cache / "files").mkdir(parents=True)
    (cache / "files" / ".left.123.tmp").write_bytes(bytes(5000))  # by a process that was killed
    for start in np.random.default_rng(0).integers(0, local.num_tokens - 50, size=40).tolist():
        assert (far.read(start, 50) == local.read(start, 50)).all()
        assert sum(path.stat().st_size for path in copies(cache)) <= 2000
    assert not list((cache / "files").glob(".*.tmp"))
    monkeypatch.setenv("MINIMIND_CACHE_SIZE", "200")
    with pytest.raises(ShardError, match="more than the cache of 200 B: raise MINIMIND_CACHE_SIZE"):
        open_split(Path(f"{server.url}/corpus"), "train").read(0, local.num_tokens)


def test_a_server_that_fails_for_a_while_is_not_noticed(server: FolderServer) -> None:
    local, far = open_split(server.folder / "corpus", "train"), open_split(Path(f"{server.url}/corpus"), "train")
    for start in range(0, local.num_tokens - 100, 100):
        server.fail = [503, "cut"]
        assert (far.read(start, 100) == local.read(start, 100)).all()


def test_what_stays_wrong_is_one_line(server: FolderServer, cache: Path) -> None:
    url, here = Path(f"{server.url}/corpus"), server.folder / "corpus/train"
    far = open_split(url, "train")
    (here / "shard_00001.npy").write_bytes((here / "shard_00002.npy").read_bytes())
    with pytest.raises(ShardError, match=r"shard_00001\.npy is damaged: its sha256"):
        far.read(100, 100)
    assert far.read(0, 50).size and len(copies(cache)) == 1 and not list((cache / "files").glob(".*.tmp"))
    (here / "shard_00003.npy").unlink()  # a source that disappears in the middle
    third = sum(shard.tokens for shard in far.manifest.shards[:3])
    with pytest.raises(ShardError, match=r"shard_00003\.npy: no such file or folder"):
        far.read(third, 10)
    with pytest.raises(ShardError, match=r"shard_00003\.npy is missing"):
        open_split(url, "train")
    server.fail = [503] * 50
    with pytest.raises(UserError, match=r"the server answers 503 \(3 tries\)"):
        open_split(url, "train")
    server.fail = []
    shutil.rmtree(server.folder / "corpus")
    with pytest.raises(ShardError, match="holds no finished shards"):
        open_split(url, "train")
