"""Brings the remote nearer to what is local."""
