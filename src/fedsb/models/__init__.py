"""The base model: found by name or folder, loaded, quantised, its head; each choice with its reason."""
