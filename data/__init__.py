"""Files to batches; imports neither models nor kernels. Imported as ``seqssm.data``."""
