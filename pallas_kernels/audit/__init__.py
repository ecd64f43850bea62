"""Compiles the kernels for a described GPU and reads the machine code; needs no GPU and no driver.

What comes out is static: registers, spills, instruction counts, and bounds from a *model* of the
pipes. Nothing here is a measurement of speed.
"""
