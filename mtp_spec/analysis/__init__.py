"""What is asked about a model rather than of it: scores, explained steps, agreement of its MTP modules."""
