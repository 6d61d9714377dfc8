"""Figures beside their limits (`make bench`): each `bench_NAME.py` here has `rows()`, which yields one `Row` each."""
