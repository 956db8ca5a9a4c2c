"""Analysis of a model: scores, explained steps, and a warning if drafts keep failing."""
