"""Proving the project on a GPU: what a bare machine is given (`prepare`), and what runs there (`run`)."""
