"""Networks, one file each: a frozen config and a thin Flax Linen module."""
