"""A checkpoint folder's files: names, keys, spellings and formats. `checkpoint` turns them into a model."""
