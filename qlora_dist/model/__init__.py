"""Base model: its folder, its class on the meta device, its output head, and loading of its weights by byte range."""
