"""What runs did: read run folders, picture them, show chosen tokens in their text, classify tokens
by how their loss moved.
"""
