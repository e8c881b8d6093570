"""The boundary to the kernel: everything below this package is I/O, everything above it is not."""
