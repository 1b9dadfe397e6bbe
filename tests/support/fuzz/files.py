"""Writing the files of cases."""

from pathlib import Path


def put(path: Path, content: bytes) -> None:
    """Creates the file anew: ext4 waits for the disk after a file is truncated and written, which takes 3 ms."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)
