"""A model's name -> the folder that holds it, downloaded where it has to be; and a folder published under a name.

Enters: a name: a folder, 'tiny', OWNER/NAME, or one of Apple's archives.
Leaves: the folder, the model's name and where it is from; what is in the download caches.
May import: errors, version, files, storage.
"""
