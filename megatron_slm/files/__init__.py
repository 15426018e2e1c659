"""Files that survive kills and have one writer: atomic.py writes a file whole or not at all,
folder_lock.py keeps a second writer out. export_note.py: the note about the tokenizer in an export.

Files that a stranger made: plain.py checks which of a folder's files may be opened, inert_pickle.py
reads a pickle without running it. No torch.
"""
