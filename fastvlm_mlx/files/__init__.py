"""Reading and writing single files; what a file claims about itself is checked before it is used.

Enters: a path that a person or a downloaded folder names.
Leaves: bytes, JSON objects, tensors, SHA-256 digests, unpacked files; CheckpointError where a file contradicts itself.
May import: errors.
"""
