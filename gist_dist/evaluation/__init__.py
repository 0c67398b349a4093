"""MTEB tasks and local sets: one task scored, results read back."""
