"""Any file, read with suspicion: what it announces is checked before anything is believed.

Enters: a path that a person or a downloaded folder names.
Leaves: bytes, JSON tables, tensors, SHA-256 digests, unpacked files; CheckpointError where a file is not what it says.
May import: errors.
"""
