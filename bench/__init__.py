"""`make bench`: nbmountd, `rclone mount --vfs-cache-mode full` and a local directory, side by side in one run."""
