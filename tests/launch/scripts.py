"""Running the scripts of launch/, for their tests."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def script(name: str) -> str:
    """The path of a script."""
    return str(ROOT / "launch" / name)


def executable(path: Path, body: str) -> None:
    """Writes a program for bash."""
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)


def run_script(name: str, *arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    """Runs a script to its end and returns what it said."""
    return subprocess.run(
        [script(name), *arguments], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
