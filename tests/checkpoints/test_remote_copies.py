"""Checkpoints that are stored elsewhere: a run goes on from them on another machine, and models are opened there."""

import dataclasses
import shutil
from pathlib import Path

import fsspec
import pytest
import torch
from training_runs import flags_for, losses, train, weights

import minimind.remote as remote
from minimind.checkpoints.folder import list_checkpoints
from minimind.checkpoints.formats.source import open_source
from minimind.checkpoints.manifest import FileRecord, read_manifest
from minimind.checkpoints.remote_copies import fetch_newest
from minimind.errors import UserError
from minimind.files import replace_file

URL = "memory://runs/a"


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(remote, "RETRY_SECONDS", (0.0, 0.0))
    monkeypatch.setenv("MINIMIND_CACHE", str(tmp_path / "cache"))
    filesystem = fsspec.filesystem("memory")
    yield filesystem
    filesystem.store.clear()


def test_a_run_goes_on_on_another_machine(tiny_corpus: Path, tmp_path: Path, store) -> None:
    """From remote shards too."""
    remote.store_folder(tiny_corpus, "memory://corpus", ("manifest.json",))
    train(flags_for(tiny_corpus, tmp_path / "whole"))
    flags = flags_for(tiny_corpus, tmp_path / "run", shards="memory://corpus", store_checkpoints=URL)
    code, _ = train(flags)
    assert code == 0 and store.exists("/runs/a/checkpoints/step_00000002/manifest.json")
    assert store.cat("/runs/a/checkpoints/latest") == b"step_00000006"
    store.rm("/runs/a/checkpoints/step_00000006", recursive=True)  # as if the machine had been lost before
    shutil.rmtree(tmp_path / "run")
    code, printed = train(flags)
    assert code == 0 and "step_00000004 was fetched from memory://runs/a" in printed
    assert losses(tmp_path / "run") == {step: losses(tmp_path / "whole")[step] for step in (5, 6)}
    expected = weights(tmp_path / "whole")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(tmp_path / "run").items())
    # The model, by the run's address, by a checkpoint's, and of an export's folder.
    for url, step in ((URL, 6), (f"{URL}/checkpoints/step_00000002", 2)):
        source = open_source(Path(url))
        assert source.folder.name == f"step_{step:08d}" and len(list((tmp_path / "cache/models").glob("*"))) == 1
        assert (source.folder.parent.parent / "tokenizer.json").exists()
    for name, place in (("near", tmp_path / "whole"), ("far", URL)):
        train(flags_for(tiny_corpus, tmp_path / name, steps=2, init_from=place))
    assert losses(tmp_path / "far") == losses(tmp_path / "near")
    for path, message in [("memory://runs/b", "no such folder"), ("memory://corpus/train", "step_00001000")]:
        with pytest.raises(UserError, match=message):
            open_source(Path(path))
    with pytest.raises(UserError, match="store_checkpoints: 'here' is no address"):
        train([*flags, "--store-checkpoints", "here"])


def test_a_store_that_fails_ends_no_run(tiny_corpus: Path, tmp_path: Path, store, monkeypatch, capfd) -> None:
    real = remote.store

    def fail(path: Path, url: str) -> None:
        if "step_00000002" in url and path.name == "mp_rank_00_model_states.pt":
            raise remote.RemoteError(f"cannot write {url}: the server answers 503 (6 tries)")
        real(path, url)

    monkeypatch.setattr(remote, "store", fail)
    code, printed = train(flags_for(tiny_corpus, tmp_path / "run", steps=4, store_checkpoints=URL))
    said = [line for line in (printed + capfd.readouterr().out).splitlines() if "not stored" in line]
    assert code == 0 and len(said) == 1 and "step_00000002 is saved, and not stored: cannot write" in said[0]
    assert not store.exists("/runs/a/checkpoints/step_00000002/manifest.json")
    assert [folder.name for folder in list_checkpoints(tmp_path / "run")] == ["step_00000002", "step_00000004"]
    # The newest is there, and what is damaged there is not taken.
    newest = fetch_newest(URL, tmp_path / "other")
    assert newest is not None and newest.name == "step_00000004"
    record = read_manifest(newest).files[0]
    path = f"/runs/a/checkpoints/step_00000004/{record.path}"
    store.pipe(path, store.cat(path)[:-1] + b"x")
    with pytest.raises(UserError, match="is damaged: its sha256"):
        fetch_newest(URL, tmp_path / "third")
    manifest = dataclasses.replace(read_manifest(newest), files=(FileRecord("../../x", 1, "0" * 64),))
    replace_file(tmp_path / "manifest.json", manifest.to_json())
    store.pipe("/runs/a/checkpoints/step_00000004/manifest.json", (tmp_path / "manifest.json").read_bytes())
    with pytest.raises(UserError, match="leaves the checkpoint's folder"):
        fetch_newest(URL, tmp_path / "third")
    assert not list_checkpoints(tmp_path / "third") and not list((tmp_path / "third").rglob("*.partial"))
    assert fetch_newest("memory://runs/none", tmp_path / "third") is None
