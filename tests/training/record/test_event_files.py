"""TensorBoard's files keep their order, and all come before one that is made now."""

from minimind.training.record.event_files import put_in_the_past


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_files_of_the_future_go_to_the_past_in_their_order(tmp_path):
    for stamp, text in ((990, "a"), (999, "b"), (1500, "c"), (2000, "d")):
        (tmp_path / f"events.out.tfevents.{stamp:010d}.host.{text}").write_text(text)
    (tmp_path / "notes.txt").write_text("not ours")
    put_in_the_past(tmp_path, 1000.5)
    events = [path for path in sorted(tmp_path.iterdir()) if path.name.startswith("events")]
    assert [path.read_text() for path in events] == ["a", "b", "c", "d"]
    assert all(path.name < "events.out.tfevents.0000001000" for path in events)
    before = names(tmp_path)
    put_in_the_past(tmp_path, 1001)
    assert names(tmp_path) == before


def test_a_missing_folder_is_left_missing(tmp_path):
    put_in_the_past(tmp_path / "tensorboard", 1000)
    assert names(tmp_path) == []
