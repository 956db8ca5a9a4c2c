"""`bench cpu-peers`: compares other libraries on this processor, each in its own Python, with this one."""
