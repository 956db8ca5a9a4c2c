"""`bench step --whole`: all layers of a published shape on ranks, and a model of more ranks (`--fit`)."""
