"""A model's name -> the folder that holds it, fetched where it has to be; and a folder published under a name.

Enters: a name: a folder, 'tiny', OWNER/NAME, one of Apple's archives.
Leaves: where the model lies, what it is called and where it is from; what caches hold.
May import: errors, version, files, storage.
"""
