"""Fetches files and folders with pretrained weights."""

from hashlib import sha256
from pathlib import Path
from urllib.parse import urlsplit

import keras


def fetch_weights(weights: str, folder: str) -> Path:
    """Return the local path of a weights file or folder, given its path or URI.

    Args:
        weights: Path, http(s) URL of a file, or any URI that pyarrow supports.
        folder: Empty folder for a file or folder that has to be copied.

    Raises:
        OSError: If there is none at this address, or it cannot be fetched.
    """
    url = urlsplit(weights)
    if url.scheme in ("http", "https"):
        # Keras would reuse a cached file of the same name from another address.
        name = f"{sha256(weights.encode()).hexdigest()[:16]}-{Path(url.path).name}"
        return Path(keras.utils.get_file(name, origin=weights))
    if not url.scheme or Path(weights).exists():
        if not Path(weights).exists():
            raise FileNotFoundError(f"file {weights} does not exist")
        return Path(weights)
    from pyarrow import fs

    filesystem, path = fs.FileSystem.from_uri(weights)
    local = Path(folder) / Path(path).name
    fs.copy_files(path, str(local), source_filesystem=filesystem)
    return local
