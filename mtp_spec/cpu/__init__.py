"""The step on a CPU: passes of the C engine or of torch, drafts, joint batches."""
