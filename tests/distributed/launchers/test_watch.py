"""A rank whose launcher or reader has ended: it is told, goes on writing, and loses no step by it."""

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
watch, ended, deadline = LauncherWatch(), 0, time.monotonic() + 60
with watch.outlive_readers():
    while time.monotonic() < deadline and ended < 100:
        print("x" * 1000, file=getattr(sys, sys.argv[1]), flush=True)
        ended += watch.has_ended()
print("after the block", file=getattr(sys, sys.argv[1]), flush=True)
Path(sys.argv[2]).write_text(f"told {ended} times")
"""


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_output_without_a_reader_ends_nothing_and_is_told(tmp_path, stream):
    words = [sys.executable, "-c", RANK, stream, str(tmp_path / "told")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(words, cwd=ROOT, **pipes) as process:
        pipe = getattr(process, stream)
        assert pipe.readline() == b"x" * 1000 + b"\n"
        pipe.close()
        assert process.wait(90) == 0
        other = process.stderr if stream == "stdout" else process.stdout
        said = other.read().count(b"the launcher has ended: this rank finishes the step, then saves")
    assert (tmp_path / "told").read_text() == "told 100 times"
    assert said == (stream == "stdout"), "a reader who is there is told once"


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
