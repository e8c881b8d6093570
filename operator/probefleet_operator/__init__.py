"""The operator: watches policies, drives agents over gRPC, writes reports."""
