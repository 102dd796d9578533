"""The file system, without FUSE and without a remote's protocol."""
