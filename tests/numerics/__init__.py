"""Numbers against independent oracles and published values."""
