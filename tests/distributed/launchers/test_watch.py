"""A rank whose launcher or reader has ended: it is told once, goes on writing, and loses no step by it."""

import os
import subprocess
import sys

import pytest
from repository import ROOT

from minimind.distributed.launchers.watch import outlive_reader

RANK = """
import sys, time
from pathlib import Path
from minimind.distributed.launchers.watch import LauncherWatch
told, watch = [], LauncherWatch()
watch.start(lambda: told.append(time.monotonic()))
deadline = time.monotonic() + 60
while time.monotonic() < deadline and not (told and time.monotonic() > told[0] + 1):
    print("x" * 1000, file=getattr(sys, sys.argv[1]), flush=True)
watch.close()
Path(sys.argv[2]).write_text(f"told {len(told)} times")
"""


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_output_without_a_reader_ends_nothing_and_is_told_once(tmp_path, stream):
    words = [sys.executable, "-c", RANK, stream, str(tmp_path / "told")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(words, cwd=ROOT, **pipes) as process:
        pipe = getattr(process, stream)
        assert pipe.readline() == b"x" * 1000 + b"\n"
        pipe.close()
        assert process.wait(90) == 0
    assert (tmp_path / "told").read_text() == "told 1 times"


def test_a_full_disk_is_still_an_error():
    losses: list[None] = []
    with open("/dev/full", "w", encoding="utf-8") as file:
        stream = outlive_reader(file, lambda: losses.append(None))
        for close in (stream.flush, stream.close):
            print("x", file=stream, end="")
            with pytest.raises(OSError, match="No space left"):
                close()
    assert not losses


def test_what_was_written_before_comes_first_and_the_descriptor_stays_open(tmp_path):
    with open(tmp_path / "out", "w", encoding="utf-8") as file:
        file.write("a")
        outlive_reader(file, lambda: None).close()
        os.write(file.fileno(), b"b")
    assert (tmp_path / "out").read_text() == "ab"
