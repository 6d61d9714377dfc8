"""Needs a CUDA device; skipped without one."""
