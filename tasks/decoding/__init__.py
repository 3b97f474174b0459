"""Log-probabilities to text: algorithms without models, whose state is plain data."""
