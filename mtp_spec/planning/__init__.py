"""Which tree to draft: costs measured on the machine, chances learned from the text."""
