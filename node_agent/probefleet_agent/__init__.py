"""The node agent: puts plans into the kernel of one machine and reads them back."""

from probefleet_wire import imports

with imports.without("rich"):
    import structlog  # noqa: F401  as the first to do so
