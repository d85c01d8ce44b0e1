"""Where the repository lies, for tests that run its commands and read its files."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
