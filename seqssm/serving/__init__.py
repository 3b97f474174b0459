"""Live transcription and tagging over WebSockets; `seqssm serve` starts it. Needs the extra `serve`."""
