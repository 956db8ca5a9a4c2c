"""What is asked about a model rather than of it: scores, explained steps, drafts that keep failing."""
