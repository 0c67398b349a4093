"""Connecting to a cluster, and whether it has room."""
