"""Set-up of a machine: standard library only, run by the system's Python before `.venv` exists."""
