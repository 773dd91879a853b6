"""Base models: found by name or folder, loaded, quantised, with their heads; each choice with its reason."""
