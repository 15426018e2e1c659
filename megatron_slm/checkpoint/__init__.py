"""Checkpoints: folder.py names and checks folders (no torch), optimizer_state.py, store.py saves and loads."""
