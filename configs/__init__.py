"""Shipped YAML configs; ``seqssm fit --config dna/quickstart`` finds them by name."""
