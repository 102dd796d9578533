"""Remote storages as ordinary directories in a notebook's home."""

__version__ = "0.1.0"
