"""The CPU engine: a whole forward pass as one call of C, with the same bits on every processor.

`engine` calls it, `reference` defines each operation in NumPy, to the last bit, and `build` compiles it.
"""
