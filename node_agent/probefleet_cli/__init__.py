"""The command line: `probefleet` on one machine, `kubectl probefleet` on a cluster."""
