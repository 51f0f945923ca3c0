"""What a hook changes: frozen values that act on a model for the length of a `with` block, and their files.

Knows hooks, maps and regions; knows nothing of the methods that find what to change, nor of how it is measured.
"""
