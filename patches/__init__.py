"""Patches for serving engines: the engine that applies them, and one table per patched host path."""
