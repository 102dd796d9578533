"""Promises of POSIX on a real mount; what is right is computed by running the same call on a local directory."""
