"""The CPU engine: a whole pass of a model as one call of C, with the same bits on every processor.

`engine` calls it, `reference` says in NumPy what each operation computes, to the last bit, and `build` compiles it.
"""
