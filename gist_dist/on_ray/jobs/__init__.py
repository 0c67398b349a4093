"""Runs submitted as Ray jobs."""
