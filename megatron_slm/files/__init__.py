"""Files that survive kills and have one writer: atomic.py writes a file whole or not at all, folder_lock.py keeps a second writer out. No torch."""
