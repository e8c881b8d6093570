"""The operator: watches policies, drives agents over gRPC, writes reports."""

from probefleet_wire import imports

with imports.without("rich"):
    import structlog  # noqa: F401  as the first to do so
