"""Drivers for remotes; see base.py for the contract."""
