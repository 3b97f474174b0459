"""Task heads, losses, metrics and evaluation; imported as ``seqssm.tasks``."""
