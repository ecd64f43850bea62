"""Independent implementations, in PyTorch or plain NumPy, that the library is compared with."""
