"""What the tests of the Python tools share."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))


def folder(variable: str) -> Path:
    """The folder that an environment variable names; without it the test is skipped."""
    value = os.environ.get(variable)
    if not value:
        raise unittest.SkipTest(f"{variable} is not set")
    return Path(value)


@functools.cache
def results_schema() -> dict[str, Any]:
    """The JSON schema of what llmcache-bench --json writes, as the program in LLMCACHE_BIN_DIR prints it."""
    program = folder("LLMCACHE_BIN_DIR") / "llmcache-bench"
    return json.loads(subprocess.run([program, "--schema"], capture_output=True, text=True, check=True).stdout)


class ToolTest(unittest.TestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)

    @staticmethod
    def run_tool(tool: Any, *arguments: object) -> tuple[int, str, str]:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                status = tool.main([str(argument) for argument in arguments])
            except SystemExit as stop:  # argparse
                status = stop.code if isinstance(stop.code, int) else 1
        return status, out.getvalue(), err.getvalue()
