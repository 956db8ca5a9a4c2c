"""A checkpoint folder's files: their names, keys, spellings and formats. What a model makes of them is `checkpoint`."""
