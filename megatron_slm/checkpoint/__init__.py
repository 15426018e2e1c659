"""Checkpoints: folder.py names and checks folders, retention.py keeps and removes them (no torch);
optimizer_state.py, writing.py, store.py save and load.

What is read is data, whoever wrote it: metadata_file.py, plain_reader.py, extra_state.py,
weights_only.py and loading.py.
"""
