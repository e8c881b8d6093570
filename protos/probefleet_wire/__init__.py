"""The language between operator and agents: messages, columns and merges."""
