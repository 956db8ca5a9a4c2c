"""`bench cpu-peers`: other libraries on this processor, each in a Python of its own, beside this one."""
