"""Quantised tensors, quantisers, and the transforms that rewrite a parameter tree."""
