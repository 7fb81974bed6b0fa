"""Pictures and text, made ready for the network.

Enters: image files and arrays, the text of a conversation, a tokenizer.json.
Leaves: pixels (S, S, 3), runs of token ids with image slots between them.
May import: errors, config, files.
"""
